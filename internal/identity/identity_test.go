package identity

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"mosimg/internal/api"
)

// world is a CA, the head's certificate and a way to shake hands over a pipe.
type world struct {
	t  *testing.T
	ca *CA
}

func newWorld(t *testing.T) *world {
	t.Helper()
	ca, err := NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	return &world{t, ca}
}

func (w *world) node(n api.NodeID, now time.Time) *tls.Certificate {
	w.t.Helper()
	k, err := NewKey()
	if err != nil {
		w.t.Fatal(err)
	}
	leaf, err := w.ca.IssueNode(k.Public(), n, net.IPv4(10, 77, 0, 2), now)
	if err != nil {
		w.t.Fatal(err)
	}
	return TLSCertificate(leaf, w.ca.Cert, k)
}

func (w *world) head(now time.Time) *tls.Certificate {
	w.t.Helper()
	k, err := NewKey()
	if err != nil {
		w.t.Fatal(err)
	}
	leaf, err := w.ca.IssueHead(k.Public(), now)
	if err != nil {
		w.t.Fatal(err)
	}
	return TLSCertificate(leaf, w.ca.Cert, k)
}

func source(c *tls.Certificate) Source {
	return func() (*tls.Certificate, error) { return c, nil }
}

// shake runs a handshake and one byte each way, so that TLS 1.3's late client
// verification is seen by the client too.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			done <- err
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		s := tls.Server(c, server)
		if err := s.Handshake(); err != nil {
			done <- err
			return
		}
		_, err = s.Write([]byte("x"))
		done <- err
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	cc := tls.Client(c, client)
	_, clientErr = io.ReadFull(cc, make([]byte, 1))
	return <-done, clientErr
}

func TestMembersTalkToEachOther(t *testing.T) {
	w := newWorld(t)
	now := time.Now()
	a, b := w.node(2, now), w.node(3, now)
	s, c := shake(t, ServerConfig(source(b), w.ca.Cert, nil, false), ClientToNode(source(a), w.ca.Cert, 3, nil))
	if s != nil || c != nil {
		t.Fatalf("handshake of two members: server %v, client %v; want none", s, c)
	}
}

func TestStrangersAreRefused(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	now := time.Now()
	srv := w.node(3, now)
	revoked := w.node(4, now)
	isRevoked := func(s string) bool { return s == Serial(revoked.Leaf) }
	for _, tc := range []struct {
		name   string
		client *tls.Config
		want   string
	}{
		{"foreign CA", ClientToNode(source(other.node(2, now)), w.ca.Cert, 3, nil), "certificate"},
		{"stale certificate", ClientToNode(source(w.node(2, now.Add(-48*time.Hour))), w.ca.Cert, 3, nil), "expired"},
		{"no certificate", &tls.Config{RootCAs: poolOf(w.ca.Cert), ServerName: "node3.mosimg"}, "certificate"},
		{"revoked certificate", ClientToNode(source(revoked), w.ca.Cert, 3, nil), "revoked"},
		{"server is another node", ClientToNode(source(w.node(2, now)), w.ca.Cert, 9, nil), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, c := shake(t, ServerConfig(source(srv), w.ca.Cert, isRevoked, false), tc.client)
			if c == nil {
				t.Fatal("client got through")
			}
			if tc.want != "" && (s == nil || !strings.Contains(s.Error(), tc.want)) {
				t.Errorf("server error = %v; want one that says %q", s, tc.want)
			}
		})
	}
}

func TestPinnedClient(t *testing.T) {
	w, other := newWorld(t), newWorld(t)
	now := time.Now()
	serve := func(c *tls.Certificate, ca *CA) *tls.Config {
		return ServerConfig(source(c), ca.Cert, nil, true)
	}
	if s, c := shake(t, serve(w.head(now), w.ca), PinnedClient(Pin(w.ca.Cert))); s != nil || c != nil {
		t.Errorf("right head: server %v, client %v; want none", s, c)
	}
	if _, c := shake(t, serve(other.head(now), other.ca), PinnedClient(Pin(w.ca.Cert))); !errors.Is(c, ErrPin) {
		t.Errorf("foreign head: %v; want ErrPin", c)
	}
	// A member must not be able to play the head.
	if _, c := shake(t, serve(w.node(2, now), w.ca), PinnedClient(Pin(w.ca.Cert))); c == nil {
		t.Error("a node's certificate passed as the head's")
	}
	// The right authority's certificate appended to a leaf it did not sign.
	forged := other.head(now)
	forged.Certificate = [][]byte{forged.Leaf.Raw, w.ca.Cert.Raw}
	if _, c := shake(t, serve(forged, w.ca), PinnedClient(Pin(w.ca.Cert))); c == nil {
		t.Error("a leaf signed by another authority passed under the right pin")
	}
	// The head's certificate lies decades away from this machine's clock:
	// enrolment must still work, it is how the machine learns the time.
	if s, c := shake(t, serve(w.head(now.AddDate(-20, 0, 0)), w.ca), PinnedClient(Pin(w.ca.Cert))); s != nil || c != nil {
		t.Errorf("wrong clock: server %v, client %v; want none", s, c)
	}
}

func TestNodeOf(t *testing.T) {
	w := newWorld(t)
	if n, err := NodeOf(w.node(7, time.Now()).Leaf); err != nil || n != 7 {
		t.Errorf("NodeOf = %v, %v; want 7", n, err)
	}
	if _, err := NodeOf(w.head(time.Now()).Leaf); err == nil {
		t.Error("NodeOf(head's certificate) = no error")
	}
}

func TestCSRProvesTheKey(t *testing.T) {
	k, _ := NewKey()
	der, err := NewCSR(k)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ParseCSR(der); err != nil {
		t.Fatal(err)
	}
	der[len(der)-1] ^= 1
	if _, err := ParseCSR(der); err == nil {
		t.Error("a CSR with a broken signature was accepted")
	}
}

func FuzzParseCSR(f *testing.F) {
	k, _ := NewKey()
	der, _ := NewCSR(k)
	f.Add(der)
	f.Fuzz(func(_ *testing.T, b []byte) { ParseCSR(b) })
}
