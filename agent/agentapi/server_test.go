package agentapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/unixhttp"
)

type source struct{}

func (source) Status() api.AgentStatus  { return api.AgentStatus{State: api.StateMember, Node: 3} }
func (source) Members() api.MemberTable { return api.MemberTable{Self: 3} }

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func serveUnix(t *testing.T, log *slog.Logger) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- New(source{}, log).ServeUnix(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return path
}

// The log says which user asked: the kernel's word, not the caller's.
func TestLocalCallerIsKnown(t *testing.T) {
	var log lockedBuffer
	path := serveUnix(t, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	var st api.AgentStatus
	if err := unixhttp.New(path, "agent").Get(t.Context(), api.PathStatus, &st); err != nil || st.Node != 3 {
		t.Fatalf("status = %+v, %v", st, err)
	}
	want := "uid " + strconv.Itoa(os.Getuid()) + " pid " + strconv.Itoa(os.Getpid())
	if !strings.Contains(log.String(), want) {
		t.Errorf("log = %q; want %q in it", log.String(), want)
	}
	err := unixhttp.New(path, "agent").Post(t.Context(), api.PathStatus, struct{}{}, nil)
	if fault.KindOf(err) != fault.NotFound {
		t.Errorf("POST to a GET path: %v", err)
	}
}

func TestSocketOfADeadAgentIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	l2, err := ListenUnix(path)
	if err != nil {
		t.Fatalf("a socket that nobody serves: %v", err)
	}
	defer l2.Close()
	if _, err := ListenUnix(path); fault.KindOf(err) != fault.Environment {
		t.Errorf("a socket that is served: %v; want it refused", err)
	}
}

// tlsServer is a server for members, with a revocation list.
func tlsServer(t *testing.T, revoked func(string) bool) (*Server, *identity.CA, string) {
	t.Helper()
	ca, err := identity.NewCA("t")
	if err != nil {
		t.Fatal(err)
	}
	own := certOf(t, ca, 3)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := New(source{}, nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	cfg := identity.ServerConfig(func() (*tls.Certificate, error) { return own, nil }, ca.Cert, revoked, false)
	go func() { done <- s.ServeTLS(ctx, l, cfg) }()
	t.Cleanup(func() { cancel(); <-done })
	return s, ca, l.Addr().String()
}

func certOf(t *testing.T, ca *identity.CA, n api.NodeID) *tls.Certificate {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.IssueNode(key.Public(), n, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return identity.TLSCertificate(leaf, ca.Cert, key)
}

// A client that connects and says nothing must not hold the agent's end.
func TestEndsWithSilentClients(t *testing.T) {
	ca, err := identity.NewCA("t")
	if err != nil {
		t.Fatal(err)
	}
	own := certOf(t, ca, 3)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- New(source{}, nil).ServeTLS(ctx, l, identity.ServerConfig(func() (*tls.Certificate, error) { return own, nil }, ca.Cert, nil, false))
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the server does not end")
	}
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the silent connection lives on")
	}
}

// The head presents a certificate of the cluster too, but it is no node: the
// agent API is for members.
func TestOnlyNodesMayCall(t *testing.T) {
	_, ca, addr := tlsServer(t, nil)
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.IssueHead(key.Public(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	head := identity.TLSCertificate(leaf, ca.Cert, key)
	hc := &http.Client{Transport: &http.Transport{TLSClientConfig: identity.ClientToNode(func() (*tls.Certificate, error) { return head, nil }, ca.Cert, 3, nil)}}
	defer hc.CloseIdleConnections()
	err = unixhttp.DoJSON(t.Context(), hc, http.MethodGet, "https://"+addr+api.PathStatus, nil, nil)
	if fault.KindOf(err) != fault.Refused {
		t.Errorf("the head's certificate: %v; want it refused", err)
	}
	peer := certOf(t, ca, 4)
	hc2 := &http.Client{Transport: &http.Transport{TLSClientConfig: identity.ClientToNode(func() (*tls.Certificate, error) { return peer, nil }, ca.Cert, 3, nil)}}
	defer hc2.CloseIdleConnections()
	var st api.AgentStatus
	if err := unixhttp.DoJSON(t.Context(), hc2, http.MethodGet, "https://"+addr+api.PathStatus, nil, &st); err != nil || st.Node != 3 {
		t.Errorf("a member: %+v, %v", st, err)
	}
}
