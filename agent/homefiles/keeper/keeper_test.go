package keeper

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mosimg/agent/homefiles/direct"
	"mosimg/agent/homefiles/home"
	"mosimg/agent/homefiles/rootsock"
	"mosimg/agent/homefiles/wire"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// The test binary is also the keeper that the client starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == Verb {
		if Main(context.Background(), os.Args[2], slog.New(slog.DiscardHandler)) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func newClient(t *testing.T) *Client {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it acts as other users")
	}
	dir := t.TempDir()
	return NewClient(ClientConfig{
		Socket: filepath.Join(dir, "s"), LogFile: filepath.Join(dir, "log"), Self: 1,
		Owner: func(migrate.JobID) (home.Cred, error) { return home.Cred{UID: 1000, GID: 1000}, nil },
	})
}

// session is what a node's agent and mount do for a connection to the keeper. It
// ends when end is called.
func session(t *testing.T, c *Client, node api.NodeID) (conn net.Conn, end func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- c.Serve(ctx, far, node) }()
	end = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(end)
	self, err := direct.New()
	if err != nil {
		t.Fatal(err)
	}
	key, bare, err := direct.Ask(near, self.Key)
	if err != nil {
		t.Fatal(err)
	}
	conn, err = self.Client(t.Context(), bare, key)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn, end
}

// A node that is out, or an agent that dies, takes its session's connection along,
// though the agent passes on none of it.
func TestAgentEndsSession(t *testing.T) {
	c := newClient(t)
	if err := c.Prepare(t.Context(), "j", migrate.Placement{Node: 1, Epoch: 1}, migrate.Placement{Node: 2, Epoch: 2}); err != nil {
		t.Fatal(err)
	}
	conn, end := session(t, c, 2)
	hello := wire.Hello{Capsule: "j", Session: wire.SessionID{1}, Epoch: 2}
	if _, err := conn.Write(wire.AppendFrame(nil, wire.KindHello, 0, hello.Append(nil))); err != nil {
		t.Fatal(err)
	}
	if h, _, err := wire.ReadFrame(conn, wire.MaxGreeting); err != nil || h.Kind != wire.KindWelcome {
		t.Fatalf("%v, %v; want a welcome", h, err)
	}
	end()
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the keeper goes on to serve a node for which no agent stands any more")
	}
	if err := c.Remove(t.Context(), "j"); err != nil {
		t.Error(err)
	}
}

// greet opens a session as a node's mount does and tells how it is answered.
func greet(t *testing.T, c *Client, node api.NodeID, job string, epoch uint64) wire.Kind {
	t.Helper()
	conn, _ := session(t, c, node)
	hello := wire.Hello{Capsule: job, Session: wire.SessionID{byte(epoch), byte(node)}, Epoch: epoch}
	if _, err := conn.Write(wire.AppendFrame(nil, wire.KindHello, 0, hello.Append(nil))); err != nil {
		t.Fatal(err)
	}
	h, _, err := wire.ReadFrame(conn, wire.MaxGreeting)
	if err != nil {
		t.Fatal(err)
	}
	return h.Kind
}

// A node is served a job's files from Prepare on, and after the next Commit no more.
func TestWhoIsServed(t *testing.T) {
	c, ctx := newClient(t), t.Context()
	const job = migrate.JobID("1-2-3")
	if locks, err := c.Locks(ctx, job); err != nil || len(locks) > 0 {
		t.Errorf("without a keeper: %v, %v; want nothing", locks, err)
	}
	at := func(node api.NodeID, epoch uint64) migrate.Placement {
		return migrate.Placement{Node: node, Epoch: epoch}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	want := func(node api.NodeID, epoch uint64, kind wire.Kind) {
		t.Helper()
		if got := greet(t, c, node, string(job), epoch); got != kind {
			t.Errorf("node %d in epoch %d is answered with kind %d; want %d", node, epoch, got, kind)
		}
	}
	must(c.Prepare(ctx, job, at(1, 1), at(2, 2)))
	must(c.Prepare(ctx, job, at(1, 1), at(2, 2))) // an order may come again
	want(2, 2, wire.KindWelcome)
	want(3, 2, wire.KindRefused) // another node
	want(2, 3, wire.KindRefused) // another epoch
	must(c.Sync(ctx, job))
	must(c.Commit(ctx, job, at(2, 2), nil))
	must(c.Settle(ctx, job))
	must(c.Prepare(ctx, job, at(2, 2), at(3, 3)))
	want(3, 3, wire.KindWelcome)
	must(c.Abort(ctx, job, at(3, 3)))
	want(3, 3, wire.KindRefused)
	want(2, 2, wire.KindWelcome) // it goes on
	must(c.Prepare(ctx, job, at(2, 2), at(3, 4)))
	must(c.Commit(ctx, job, at(3, 4), nil))
	want(2, 2, wire.KindRefused)
	must(c.Reclaim(ctx, job, at(2, 5)))
	want(3, 4, wire.KindRefused) // it never ran
	must(c.Remove(ctx, job))
	want(2, 2, wire.KindRefused)
	if err := c.Abort(ctx, "unknown", at(2, 2)); err != nil {
		t.Errorf("abort of a job that has no guests: %v; want nothing", err)
	}
}

// A keeper that has died since Prepare has taken the guest's open files with it.
// A move that is told "done" nevertheless ends with a job that has no files.
func TestDeadKeeperIsNoSuccess(t *testing.T) {
	c, ctx := newClient(t), t.Context()
	next := migrate.Placement{Node: 2, Epoch: 2}
	want := func(what string) {
		t.Helper()
		for name, err := range map[string]error{"sync": c.Sync(ctx, "j"), "commit": c.Commit(ctx, "j", next, nil)} {
			if err == nil || fault.KindOf(err) != fault.NotFound {
				t.Errorf("%s with %s: %v; want that the files are lost", name, what, err)
			}
		}
	}
	want("no keeper")
	if err := c.Prepare(ctx, "other", migrate.Placement{Node: 1, Epoch: 1}, next); err != nil {
		t.Fatal(err)
	}
	want("a keeper that was started later")
	if err := c.Remove(ctx, "other"); err != nil { // it ends without a job
		t.Fatal(err)
	}
}

// What is no request is refused, and the keeper goes on.
func TestBadRequests(t *testing.T) {
	c := newClient(t)
	if err := c.Prepare(t.Context(), "j", migrate.Placement{Node: 1, Epoch: 1}, migrate.Placement{Node: 2, Epoch: 2}); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"\n", "{\n", "GET / HTTP/1.1\r\n", strings.Repeat("x", 2*rootsock.MaxLine) + "\n"} {
		conn, err := net.Dial("unix", c.conf.Socket)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, line) //nolint:errcheck // it may have hung up already
		if a, err := io.ReadAll(conn); err == nil && len(a) > 0 {
			t.Errorf("%.20q is answered with %q; want nothing", line, a)
		}
		conn.Close()
	}
	if _, err := c.ask(t.Context(), request{Op: "dance", Job: "j"}); fault.KindOf(err) != fault.Usage {
		t.Errorf("unknown operation: %v; want a fault of kind Usage", err)
	}
	if _, err := c.ask(t.Context(), request{Op: opPrepare, Job: "k", Epoch: 2, Node: 2, OwnerEpoch: 1, OwnerNode: 1}); fault.KindOf(err) != fault.Usage {
		t.Errorf("no owner: %v; want a fault of kind Usage", err)
	}
	if err := c.Remove(t.Context(), "j"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// A keeper that nobody needs ends, and takes no job on its way out: its files would be
// gone with it. Whoever asks is served by the next.
func TestIdleKeeperEnds(t *testing.T) {
	c := newClient(t)
	l, err := rootsock.Listen(c.conf.Socket)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- serve(context.Background(), l, slog.New(slog.DiscardHandler), 300*time.Millisecond) }()
	prepare := func() error {
		return c.Prepare(t.Context(), "j", migrate.Placement{Node: 1, Epoch: 1}, migrate.Placement{Node: 2, Epoch: 2})
	}
	if err := prepare(); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		t.Fatalf("a keeper with a job ends: %v", err)
	case <-time.After(600 * time.Millisecond):
	}
	if err := c.Remove(t.Context(), "j"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("a keeper without a job does not end")
	}
	s := &server{ending: true, jobs: make(map[string]bool)}
	if ending, err := s.add(request{Cred: &home.Cred{}}); !ending || err != nil {
		t.Errorf("a keeper that ends takes a job: %v, %v", ending, err)
	}
	if err := prepare(); err != nil {
		t.Errorf("after its end: %v", err)
	}
	if err := c.Remove(t.Context(), "j"); err != nil {
		t.Error(err)
	}
}

// Two keepers would each know half of the jobs: the second waits for the end of the first.
func TestOneKeeper(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(path)
	if err != nil {
		t.Fatal(err)
	}
	locked := make(chan error, 1)
	go func() {
		unlock, err := lock(path)
		if err == nil {
			unlock()
		}
		locked <- err
	}()
	select {
	case err := <-locked:
		t.Fatalf("a second keeper begins: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	unlock()
	if err := <-locked; err != nil {
		t.Error(err)
	}
}
