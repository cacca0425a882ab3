package direct_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/agent/homefiles/direct"
	"mosimg/agent/homefiles/rootsock"
	"mosimg/internal/api"
	"mosimg/internal/identity"
)

func pair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func newIdentity(t testing.TB) *direct.Identity {
	t.Helper()
	i, err := direct.New()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

type shaken struct {
	net.Conn
	err error
}

// shake shakes hands on both ends of a connection, each with a key that it was told.
func shake(ctx context.Context, a, b net.Conn, mount, keeper *direct.Identity, toldMount, toldKeeper direct.Key) (client, server shaken) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Conn, server.err = keeper.Server(ctx, b, toldKeeper)
		if server.err == nil { // the client's certificate is seen after its handshake is done
			_, server.err = server.Write([]byte("hello"))
		}
	}()
	client.Conn, client.err = mount.Client(ctx, a, toldMount)
	if client.err == nil {
		_, client.err = io.ReadFull(client, make([]byte, 5))
	}
	<-done
	return client, server
}

// Bytes get through whole in both directions at once, whatever the sizes of the writes.
func TestStream(t *testing.T) {
	a, b := pair(t)
	mount, keeper := newIdentity(t), newIdentity(t)
	c, s := shake(t.Context(), a, b, mount, keeper, keeper.Key, mount.Key)
	if c.err != nil || s.err != nil {
		t.Fatal(c.err, s.err)
	}
	content := make([]byte, 5<<20)
	rand.NewChaCha8([32]byte{}).Read(content)
	send := func(w net.Conn, seed uint64) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		for rest := content; len(rest) > 0; {
			n := min(len(rest), 1+rnd.IntN(1<<rnd.IntN(21)))
			if _, err := w.Write(rest[:n]); err != nil {
				t.Error(err)
				return
			}
			rest = rest[n:]
		}
	}
	go send(c, 1)
	go send(s, 2)
	for _, r := range []net.Conn{s, c} {
		got := make([]byte, len(content))
		if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%v; what arrives is what was sent: %v", err, bytes.Equal(got, content))
		}
	}
}

// Who got hold of the connection, but is not whom the agents spoke for, is refused
// by either side.
func TestWrongKey(t *testing.T) {
	mount, keeper, other := newIdentity(t), newIdentity(t), newIdentity(t)
	for name, told := range map[string][2]direct.Key{
		"the keeper is another": {other.Key, mount.Key},
		"the mount is another":  {keeper.Key, other.Key},
		"no key was told":       {"", ""},
	} {
		a, b := pair(t)
		if c, s := shake(t.Context(), a, b, mount, keeper, told[0], told[1]); c.err == nil || s.err == nil {
			t.Errorf("%s: mount %v, keeper %v; want that both are without a connection", name, c.err, s.err)
		}
	}
}

// A peer that says nothing, or something else, holds nobody up for ever.
func TestNoHandshake(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	a, _ := pair(t)
	if _, err := newIdentity(t).Server(ctx, a, ""); err == nil {
		t.Error("a silent peer has shaken hands")
	}
	a, b := pair(t)
	if _, err := io.WriteString(b, "GET / HTTP/1.1\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := newIdentity(t).Server(t.Context(), a, ""); err == nil {
		t.Error("HTTP was taken for a handshake")
	}
}

// The way of a connection, as the agents make it: over TLS with the cluster's
// certificates, then handed to another process each, where nothing of that TLS is in
// the way; and its end is an end for all who have it.
func TestIntroduction(t *testing.T) {
	ca, err := identity.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	a, b := pair(t)
	atHome := tls.Server(b, identity.ServerConfig(source(t, ca, 1), ca.Cert, func(string) bool { return false }, false))
	here := tls.Client(a, identity.ClientToNode(source(t, ca, 2), ca.Cert, 1, func(string) bool { return false }))
	mount, keeper := newIdentity(t), newIdentity(t)

	keeperGets := make(chan net.Conn, 1)
	go func() {
		defer close(keeperGets)
		bare, err := direct.Answer(atHome, func(k direct.Key) (direct.Key, error) {
			if k != mount.Key {
				t.Errorf("the keeper is told %q; want the mount's key", k)
			}
			return keeper.Key, nil
		})
		if err != nil {
			t.Error(err)
			return
		}
		keeperGets <- handed(t, bare) // and the agent keeps its own
	}()
	key, bare, err := direct.Ask(here, mount.Key)
	if err != nil || key != keeper.Key {
		t.Fatalf("the mount is told %q, %v; want the keeper's key", key, err)
	}
	mine := handed(t, bare)
	bare.Close()
	theirs := <-keeperGets
	if theirs == nil {
		t.FailNow()
	}
	c, s := shake(t.Context(), mine, theirs, mount, keeper, key, mount.Key)
	if c.err != nil || s.err != nil {
		t.Fatal(c.err, s.err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
		t.Errorf("after the keeper's end, which the agent has not shared: %d, %v; want an end", n, err)
	}
}

// handed is a connection as another process has it that was handed it.
func handed(t *testing.T, conn syscall.Conn) net.Conn {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
		return nil
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Error(err)
			return nil
		}
		defer ends[i].Close()
	}
	if err := rootsock.Hand(ends[0], conn); err != nil {
		t.Error(err)
		return nil
	}
	c, err := rootsock.Take(ends[1])
	if err != nil {
		t.Error(err)
		return nil
	}
	return c
}

func source(t *testing.T, ca *identity.CA, node api.NodeID) identity.Source {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	var cert *x509.Certificate
	if cert, err = ca.IssueNode(key.Public(), node, net.IPv4(127, 0, 0, 1), time.Now()); err != nil {
		t.Fatal(err)
	}
	return func() (*tls.Certificate, error) { return identity.TLSCertificate(cert, ca.Cert, key), nil }
}

// What cannot be handed over is said, not lost.
func TestNothingToHand(t *testing.T) {
	a, b := net.Pipe()
	go io.WriteString(b, "{\"Key\":\"k\"}\n") //nolint:errcheck // the reader sees
	go io.Copy(io.Discard, b)                 //nolint:errcheck // as above
	if _, _, err := direct.Ask(a, "k"); err == nil || !strings.Contains(err.Error(), "cannot be handed") {
		t.Errorf("a pipe inside this process: %v", err)
	}
}
