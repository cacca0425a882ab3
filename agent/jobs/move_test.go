package jobs_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule"
	"mosimg/agent/capsule/capsuletest"
	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/jobs"
	"mosimg/agent/migrate"
	"mosimg/agent/pages"
	"mosimg/internal/api"
)

// handled are signals that a job gets, each once: two of a kind might become one, as they do in the kernel.
var handled = []unix.Signal{unix.SIGUSR1, unix.SIGUSR2, unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT}

// countMain is a job: it numbers the lines of its stdin, writes a dot to stderr for
// each, and at the end tells how many signals came.
func countMain([]string) int {
	signals := make(chan os.Signal, 100)
	for _, sig := range handled {
		signal.Notify(signals, sig)
	}
	in, out := bufio.NewScanner(os.Stdin), bufio.NewWriter(os.Stdout)
	fmt.Println("up")
	n := 0
	for ; in.Scan(); n++ {
		fmt.Fprintf(out, "%d %s\n", n, in.Text())
		fmt.Fprint(os.Stderr, ".")
		if n%100 == 0 {
			out.Flush()
		}
	}
	signal.Stop(signals)
	close(signals)
	for sig := range signals {
		fmt.Fprintln(out, sig)
	}
	out.Flush()
	return 7
}

// pair is two real nodes: shims, CRIU and package migrate, on one machine.
type pair struct {
	*testing.T
	w     *capsuletest.World
	nodes map[api.NodeID]*migrate.Node
	f     *fleet // for the home that an agent has now
}

type oneRoot struct{ root control.Root }

func (r oneRoot) Open(context.Context, api.NodeID, migrate.JobID, uint64) (control.Root, error) {
	return r.root, nil
}
func (oneRoot) Sync(context.Context, api.NodeID, migrate.JobID, uint64) error  { return nil }
func (oneRoot) Close(context.Context, api.NodeID, migrate.JobID, uint64) error { return nil }

// Ask and Ended make the pair a migrate.Judge: node 1 is the only home.
func (p *pair) Ask(ctx context.Context, home api.NodeID, job migrate.JobID, c migrate.Placement) (migrate.Verdict, uint64, error) {
	p.f.homeMu.RLock()
	defer p.f.homeMu.RUnlock()
	if p.f.home == nil {
		return "", 0, net.ErrClosed
	}
	return p.f.home.Ask(ctx, home, job, c)
}

func (p *pair) Unlocked(ctx context.Context, home api.NodeID, job migrate.JobID, c migrate.Placement) error {
	p.f.homeMu.RLock()
	defer p.f.homeMu.RUnlock()
	if p.f.home == nil {
		return net.ErrClosed
	}
	return p.f.home.Unlocked(ctx, home, job, c)
}

func (p *pair) Ended(ctx context.Context, home api.NodeID, job migrate.JobID, c migrate.Placement, end migrate.End) error {
	p.f.homeMu.RLock()
	defer p.f.homeMu.RUnlock()
	if p.f.home == nil {
		return net.ErrClosed
	}
	return p.f.home.Ended(ctx, home, job, c, end)
}

// dial connects to another node.
func (p *pair) dial(from api.NodeID, cut func() int) func(context.Context, api.NodeID) (net.Conn, error) {
	return func(_ context.Context, to api.NodeID) (net.Conn, error) {
		ours, theirs := sockets(p)
		go migrate.Server{Node: p.nodes[to], Log: silent}.Serve(context.WithoutCancel(p.Context()), theirs, from)
		if cut == nil {
			return ours, nil
		}
		return &cutConn{Conn: ours, left: cut()}, nil
	}
}

func newPair(t *testing.T, cut func() int) (*pair, *home) {
	w := capsuletest.New(t)
	w.CRIU = capsuletest.CRIU(t)
	p := &pair{T: t, w: w, nodes: map[api.NodeID]*migrate.Node{}, f: newFleet(t)}
	for id, root := range map[api.NodeID]control.Root{1: w.Home(), 2: w.View()} {
		name := fmt.Sprint("n", id)
		n, err := migrate.OpenNode(migrate.NodeConfig{
			Self: id, Dir: w.Run(name), Cgroup: w.Cgroup(name), RootJobs: true,
			CRIU:    func() control.CRIU { return w.CRIU },
			Pages:   func() pages.Protocol { return pages.Protocol41 },
			Machine: func() migrate.Machine { return migrate.Machine{Version: "test"} },
			Roots:   oneRoot{root}, Dial: p.dial(id, nil), Judge: p,
		})
		if err != nil {
			t.Fatal(err)
		}
		p.nodes[id] = n
	}
	h := &home{t: t, f: p.f, dir: openDir(t)}
	h.socket = filepath.Join(h.dir, "agent.sock")
	h.peer = func(id api.NodeID) migrate.Peer {
		if id == 1 {
			return p.nodes[1]
		}
		return migrate.Client{Dial: p.dial(1, nil), Node: id}
	}
	h.conf = func(c *jobs.Config) {
		c.Capsule = func(job migrate.JobID, at migrate.Placement) (*capsule.Capsule, error) {
			if at.Node == 1 {
				return p.nodes[1].Capsule(job, at.Epoch)
			}
			return migrate.Client{Dial: p.dial(1, cut), Node: at.Node}.Capsule(1, job, at.Epoch), nil
		}
	}
	h.start()
	t.Cleanup(func() {
		h.stop()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		for id := range p.nodes {
			if err := cgroup.Remove(ctx, w.Cgroup(fmt.Sprint("n", id))); err != nil {
				t.Error(err)
			}
		}
	})
	return p, h
}

// A real program reads, writes and is signalled while it is moved back and
// forth, its connections break and its home's agent is restarted; it and its
// user notice nothing.
func TestRealJobMoves(t *testing.T) {
	p, h := newPair(t, cuts(7, 300_000))
	spec := p.w.Program("count")
	req := request()
	req.Argv, req.Env, req.Dir = spec.Argv, spec.Env, spec.Dir
	id := h.run(req)
	m := h.attach(id, h.socket) // no signal survives a break of this connection
	var input, want bytes.Buffer
	want.WriteString("up\n")
	for i := range 20_000 {
		fmt.Fprintf(&input, "line %d\n", i)
		fmt.Fprintf(&want, "%d line %d\n", i, i)
	}
	for _, sig := range handled {
		fmt.Fprintln(&want, sig)
	}
	typed := make(chan struct{})
	go func() {
		defer close(typed)
		for rest := input.Bytes(); len(rest) > 0; {
			n := min(len(rest), input.Len()/200)
			m.stdin.Write(rest[:n])
			rest = rest[n:]
			time.Sleep(10 * time.Millisecond)
		}
	}()
	until(t, "the job is up", m.saw("up\n"))
	for i, sig := range handled {
		m.session.Signal(int(sig), false)
		st, err := h.agent().Move(t.Context(), id, []string{"2", "home"}[i%2])
		if err != nil || st.Moves != i+1 {
			t.Fatalf("move %d: %+v, %v", i, st, err)
		}
		t.Logf("move %d: the job stood still for %v", i, st.Downtime)
		if st.State == api.JobRuns && (st.Bytes == 0 || st.Processes < 2) {
			t.Errorf("after move %d the job is said to have %d bytes and %d processes", i, st.Bytes, st.Processes)
		}
		time.Sleep(50 * time.Millisecond)
	}
	h.stop()
	h.start()
	<-typed
	m.stdin.Close()
	res, stdout, stderr := m.wait()
	if res.Exit != 7 || res.Lost != "" {
		t.Errorf("the job ended as %+v", res)
	}
	differ(t, "stdout", stdout, want.Bytes())
	differ(t, "stderr", stderr, []byte(strings.Repeat(".", 20_000)))
	until(t, "the job is forgotten", func() bool {
		list, err := h.agent().List(t.Context())
		return err == nil && len(list.Jobs) == 0
	})
}

// A job whose mosrun stops it stays stopped where it moves to, and a job whose
// program is not there is not started.
func TestRealJobStopsAndRefuses(t *testing.T) {
	p, h := newPair(t, nil)
	spec := p.w.Program("count")
	req := request()
	req.Argv, req.Env, req.Dir = spec.Argv, spec.Env, spec.Dir
	id := h.run(req)
	m := h.attach(id, h.socket)
	if err := m.session.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	st, err := h.agent().Move(t.Context(), id, "2")
	if err != nil || st.State != api.JobStopped || st.Node != 2 {
		t.Errorf("a stopped job after a move: %+v, %v", st, err)
	}
	m.stdin.Write([]byte("x\n"))
	m.session.Cont()
	m.stdin.Close()
	if res, stdout, _ := m.wait(); res.Exit != 7 || string(stdout) != "up\n0 x\n" {
		t.Errorf("the job ended as %+v with %q", res, stdout)
	}
	for errno, argv := range map[unix.Errno][]string{unix.ENOENT: {"no-such-program"}, unix.EACCES: {"/etc/passwd"}} {
		for _, node := range []string{"", "2"} {
			req := request()
			req.Argv, req.Env, req.Dir, req.Node = argv, spec.Env, spec.Dir, node
			_, err := h.agent().Start(t.Context(), req)
			if got := errnoOf(err); got != errno {
				t.Errorf("%v on node %q: %v (errno %d); want errno %d", argv, node, err, got, errno)
			}
		}
	}
}
