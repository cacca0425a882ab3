package migrate_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"mosimg/agent/capsule"
	"mosimg/agent/capsule/capsuletest"
	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/migrate"
	"mosimg/agent/pages"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// The tests run agents as processes of their own, so that they can be killed
// like real ones. Each listens on a unix socket in one folder; who calls says
// its number first, as TLS would prove it.

// agentConfig is what a test agent is started with.
type agentConfig struct {
	ID      api.NodeID
	Dir     string // its own, in memory
	Net     string // folder of the sockets
	Journal string // of the home
	Cgroup  string
	CRIU    control.CRIU
	Root    control.Root
}

// synced is a file that says that guests' files have been synced.
func (c agentConfig) synced() string { return filepath.Join(c.Dir, "synced") }

// rootless is a file that says that the guests' files have gone.
func (c agentConfig) rootless() string { return filepath.Join(c.Dir, "rootless") }

// command goes to a test agent's stdin, event comes from its stdout.
type command struct {
	Do   string // start, move, drive, settle, jobs, forget, go
	Job  migrate.JobID
	To   api.NodeID
	Spec *control.Spec
}

type event struct {
	Step  migrate.Step `json:",omitempty"` // about to be taken; waits for go
	Done  bool
	Error string
	Kind  fault.Kind `json:",omitempty"`
	Jobs  []migrate.Record
	Open  int
}

// oneRoot is the same tree for all; synced is a file that is made when it was synced.
type oneRoot struct {
	root   control.Root
	synced string
}

func (r oneRoot) Open(context.Context, api.NodeID, migrate.JobID, uint64) (control.Root, error) {
	return r.root, nil
}

func (r oneRoot) Sync(context.Context, api.NodeID, migrate.JobID, uint64) error {
	return os.WriteFile(r.synced, nil, 0o600)
}

func (r oneRoot) Close(context.Context, api.NodeID, migrate.JobID, uint64) error { return nil }

// agentMain is a test agent.
func agentMain(args []string) int {
	var conf agentConfig
	if err := json.Unmarshal([]byte(args[0]), &conf); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("agent", conf.ID)
	in := make(chan command)
	var mu sync.Mutex // keeps events whole
	out := json.NewEncoder(os.Stdout)
	say := func(e event) {
		mu.Lock()
		defer mu.Unlock()
		out.Encode(e)
	}
	dial := func(ctx context.Context, to api.NodeID) (net.Conn, error) {
		if _, err := os.Stat(filepath.Join(conf.Net, fmt.Sprintf("cut-%d-%d", min(to, conf.ID), max(to, conf.ID)))); err == nil {
			return nil, errors.New("network is unreachable")
		}
		c, err := new(net.Dialer).DialContext(ctx, "unix", filepath.Join(conf.Net, strconv.Itoa(int(to))))
		if err != nil {
			return nil, err
		}
		_, err = c.Write(binary.BigEndian.AppendUint32(nil, uint32(conf.ID)))
		return c, err
	}
	homeJournal, err := migrate.OpenJournal[migrate.Record](conf.Journal)
	if err != nil {
		log.Error("journal", "err", err)
		return 1
	}
	var node *migrate.Node
	home, err := migrate.NewHome(migrate.HomeConfig{
		Self: conf.ID, Journal: homeJournal, Files: mortalFiles{conf.keeperless()}, Log: log,
		Peer: func(id api.NodeID) migrate.Peer {
			if id == conf.ID {
				return node
			}
			return migrate.Client{Dial: dial, Node: id}
		},
		Trace: func(_ migrate.JobID, s migrate.Step) {
			say(event{Step: s})
			<-in
		},
	})
	if err != nil {
		log.Error("home", "err", err)
		return 1
	}
	client := migrate.Client{Dial: dial}
	node, err = migrate.OpenNode(migrate.NodeConfig{
		Self: conf.ID, Dir: conf.Dir, Cgroup: conf.Cgroup, Log: log, RootJobs: true,
		CRIU:    func() control.CRIU { return conf.CRIU },
		Pages:   func() pages.Protocol { return pages.Protocol41 },
		Machine: func() migrate.Machine { return migrate.Machine{Version: "test"} },
		Roots:   oneRoot{conf.Root, conf.synced()}, Dial: dial,
		Judge: judge{conf.ID, home, client},
		RootLost: func(of api.NodeID, _ migrate.JobID, _ uint64) error {
			if _, err := os.Stat(conf.rootless()); err == nil && of != conf.ID {
				return errors.New("the files are gone")
			}
			return nil
		},
	})
	if err != nil {
		log.Error("node", "err", err)
		return 1
	}
	os.Remove(filepath.Join(conf.Net, strconv.Itoa(int(conf.ID))))
	l, err := net.Listen("unix", filepath.Join(conf.Net, strconv.Itoa(int(conf.ID))))
	if err != nil {
		log.Error("listen", "err", err)
		return 1
	}
	server := migrate.Server{Node: node, Home: home, Log: log}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				var from [4]byte
				if _, err := io.ReadFull(c, from[:]); err == nil {
					server.Serve(context.Background(), c, api.NodeID(binary.BigEndian.Uint32(from[:])))
				}
			}()
		}
	}()
	ctx := context.Background()
	do := func(c command) event {
		var err error
		e := event{Done: true}
		tctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		switch c.Do {
		case "start":
			err = home.Start(ctx, c.Job, conf.ID, *c.Spec)
		case "move":
			err = home.Move(tctx, c.Job, c.To)
		case "drive":
			err = home.Drive(tctx, c.Job)
		case "forget":
			err = home.Forget(tctx, c.Job)
		case "settle":
			e.Open = node.Settle(tctx)
		}
		e.Jobs = home.Jobs()
		if err != nil {
			e.Error, e.Kind = err.Error(), fault.KindOf(err)
		}
		return e
	}
	say(event{Done: true})
	sc := bufio.NewScanner(os.Stdin)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var c command
		if err := json.Unmarshal(sc.Bytes(), &c); err != nil {
			return 1
		}
		if c.Do == "go" {
			in <- c
			continue
		}
		go func() { say(do(c)) }()
	}
	return 0
}

// judge asks this home directly, and others over the network.
type judge struct {
	self   api.NodeID
	home   *migrate.Home
	remote migrate.Client
}

func (j judge) Ask(ctx context.Context, home api.NodeID, job migrate.JobID, p migrate.Placement) (migrate.Verdict, uint64, error) {
	if home == j.self {
		return j.home.Ask(ctx, home, job, p)
	}
	return j.remote.Ask(ctx, home, job, p)
}

func (j judge) Unlocked(ctx context.Context, home api.NodeID, job migrate.JobID, p migrate.Placement) error {
	if home == j.self {
		return j.home.Unlocked(ctx, home, job, p)
	}
	return j.remote.Unlocked(ctx, home, job, p)
}

func (j judge) Ended(ctx context.Context, home api.NodeID, job migrate.JobID, p migrate.Placement, end migrate.End) error {
	if home == j.self {
		return j.home.Ended(ctx, home, job, p, end)
	}
	return j.remote.Ended(ctx, home, job, p, end)
}

// agent is a running test agent.
type agent struct {
	c      *cluster
	conf   agentConfig
	cmd    *exec.Cmd
	in     io.WriteCloser
	events chan event
}

// cluster is some agents; node 1 is the home.
type cluster struct {
	t      *testing.T
	w      *capsuletest.World
	net    string
	agents map[api.NodeID]*agent
}

func newCluster(t *testing.T, n int) *cluster {
	t.Helper()
	w := capsuletest.New(t)
	w.CRIU = capsuletest.CRIU(t)
	c := &cluster{t: t, w: w, net: w.Run("net"), agents: make(map[api.NodeID]*agent)}
	t.Cleanup(c.close)
	for id := api.NodeID(1); int(id) <= n; id++ {
		root := w.Home()
		if id > 1 {
			root = w.View()
		}
		name := fmt.Sprint("n", id)
		c.agents[id] = &agent{c: c, conf: agentConfig{
			ID: id, Dir: w.Run(name), Net: c.net, Journal: filepath.Join(w.Work, "..", "journal"+name), Cgroup: w.Cgroup(name), CRIU: w.CRIU, Root: root,
		}}
		c.agents[id].start()
	}
	return c
}

// start starts the agent, or starts it again.
func (a *agent) start() {
	t := a.c.t
	t.Helper()
	conf, err := json.Marshal(a.conf)
	if err != nil {
		t.Fatal(err)
	}
	a.cmd = exec.Command("/proc/self/exe", "test-program", "agent", string(conf))
	a.cmd.Stderr = t.Output()
	// Its shims are its children; when it is killed they must not wait for it.
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if a.in, err = a.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	events := make(chan event, 100)
	a.events = events
	go func() {
		defer close(events)
		dec := json.NewDecoder(out)
		for {
			var e event
			if dec.Decode(&e) != nil {
				return
			}
			events <- e
		}
	}()
	a.done(nil)
}

// kill kills the agent as kill -9 does.
func (a *agent) kill() {
	a.cmd.Process.Kill()
	a.cmd.Wait()
}

func (a *agent) send(c command) {
	data, err := json.Marshal(c)
	if err != nil {
		a.c.t.Fatal(err)
	}
	a.in.Write(append(data, '\n')) // a dead agent is seen by its events
}

// done waits for the end of a command, calling at before each step of a move.
// ok is false when the agent died.
func (a *agent) done(at func(migrate.Step)) (e event, ok bool) {
	a.c.t.Helper()
	limit := time.After(60 * time.Second)
	for {
		select {
		case e, ok := <-a.events:
			if !ok {
				return e, false
			}
			if e.Done {
				return e, true
			}
			if at != nil {
				at(e.Step)
			}
			a.send(command{Do: "go"})
		case <-limit:
			a.c.t.Fatalf("agent %d hangs", a.conf.ID)
		}
	}
}

// must carries out a command that may not fail.
func (a *agent) must(c command) event {
	a.c.t.Helper()
	a.send(c)
	e, ok := a.done(nil)
	if !ok || e.Error != "" {
		a.c.t.Fatalf("agent %d: %s: %q, alive %v", a.conf.ID, c.Do, e.Error, ok)
	}
	return e
}

// close ends agents and what they left: a test that needs this to be clean
// checks it before.
func (c *cluster) close() {
	for _, a := range c.agents {
		a.kill()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for id, a := range c.agents {
		for _, name := range c.capsules(id) {
			cap := capsule.Attach(name, filepath.Join(a.conf.Dir, "capsules", name), filepath.Join(a.conf.Cgroup, name))
			if err := cap.Remove(ctx); err != nil {
				c.t.Errorf("clean up %s of agent %d: %v", name, id, err)
			}
		}
		if err := cgroup.Remove(ctx, a.conf.Cgroup); err != nil {
			c.t.Error(err)
		}
	}
}

// capsules are the capsules that a node has.
func (c *cluster) capsules(id api.NodeID) []string {
	entries, _ := os.ReadDir(filepath.Join(c.agents[id].conf.Dir, "capsules"))
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// pids are the processes in a leaf of any of a node's capsules.
func (c *cluster) pids(id api.NodeID, leaf string) []int {
	groups, _ := filepath.Glob(filepath.Join(c.agents[id].conf.Cgroup, "*", leaf))
	var all []int
	for _, g := range groups {
		l, err := cgroup.Open(g)
		if err != nil {
			continue
		}
		pids, _ := l.Procs()
		l.Close()
		all = append(all, pids...)
	}
	return all
}

func killAll(pids []int) {
	for _, p := range pids {
		syscall.Kill(p, syscall.SIGKILL)
	}
}

// cut cuts the link between two nodes for new connections, or mends it.
func (c *cluster) cut(a, b api.NodeID, cut bool) {
	path := filepath.Join(c.net, fmt.Sprintf("cut-%d-%d", min(a, b), max(a, b)))
	if !cut {
		os.Remove(path)
	} else if err := os.WriteFile(path, nil, 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// alive tells whether the agent runs.
func (a *agent) alive() bool {
	return a.cmd.ProcessState == nil && syscall.Kill(a.cmd.Process.Pid, 0) == nil
}
