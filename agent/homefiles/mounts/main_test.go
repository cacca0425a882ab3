package mounts_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mosimg/agent/homefiles/home"
	"mosimg/agent/homefiles/keeper"
	"mosimg/agent/homefiles/mounts"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// helpers are run by the test's own binary in a process of its own.
var helpers = map[string]func(args []string) error{}

// TestMain makes this binary also what keepers and mounts are started from, and
// runs the tests in a mount and a process namespace of their own: no mount and
// no process that outlives its agent is left behind, however they end.
func TestMain(m *testing.M) {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	switch {
	case len(os.Args) == 3 && os.Args[1] == keeper.Verb:
		exit(keeper.Main(ctx, os.Args[2], log))
	case len(os.Args) == 3 && os.Args[1] == mounts.Verb:
		exit(mounts.Main(ctx, os.Args[2], log))
	case os.Getenv("HOMEFILES_HELPER") != "":
		exit(helpers[os.Getenv("HOMEFILES_HELPER")](os.Args[1:]))
	case os.Geteuid() != 0:
	case os.Getenv("HOMEFILES_NS") == "":
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), "HOMEFILES_NS=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		var failed *exec.ExitError
		if errors.As(err, &failed) {
			os.Exit(max(failed.ExitCode(), 1))
		}
		exit(err)
	default:
		err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
		if err == nil {
			err = syscall.Mount("proc", "/proc", "proc", 0, "")
		}
		if err != nil {
			exit(fmt.Errorf("no namespace, so no test: %w", err))
		}
	}
	os.Exit(m.Run())
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// The home is node 1; the node whose mounts are tested is 2.
const (
	homeNode = api.NodeID(1)
	thisNode = api.NodeID(2)
	job      = migrate.JobID("job-1")
)

var alice = home.Cred{UID: 1000, GID: 1000}

// world is a home and a node on this machine: a keeper, the agent's half of
// the link in a process of its own, and mounts.
type world struct {
	t     testing.TB
	dir   string // holds it all
	tree  string // a folder of alice's, at home
	files *keeper.Client
	roots *mounts.Roots
	agent *exec.Cmd
}

type options struct {
	lease time.Duration
	// rate of the link in bytes a second; 0 is as fast as it goes.
	rate int
}

func newWorld(t testing.TB, o options) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts FUSE and acts as other users")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
	if os.Getenv("MOSIMG_HOMEFILES") == "" {
		t.Skip("a minute of FUSE mounts; MOSIMG_HOMEFILES=1 runs them")
	}
	base, err := os.MkdirTemp("", "mounts")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: base, tree: filepath.Join(base, "home")}
	for _, err := range []error{os.Chmod(base, 0o755), os.Mkdir(w.tree, 0o755), os.Chown(w.tree, int(alice.UID), int(alice.GID))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	w.files = w.client()
	w.roots, err = mounts.New(mounts.Config{Dir: w.path("files"), Self: thisNode, Socket: w.path("agent.sock"), Lease: o.lease, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	// A capsule has the mount as its root; the processes here go by its path.
	must(t, os.Chmod(w.path("files"), 0o711))
	w.startAgent(o)
	t.Cleanup(func() {
		// All that the test did not close; then nothing may be left to walk into.
		left, _ := filepath.Glob(w.path("files/*"))
		for _, dir := range left {
			name, epoch, _ := strings.Cut(filepath.Base(dir), ".")
			var e uint64
			fmt.Sscan(epoch, &e)
			if err := w.roots.Close(context.Background(), homeNode, migrate.JobID(name), e); err != nil {
				t.Errorf("Close(%s): %v", dir, err)
			}
		}
		if mounted := fuseMounts(t, base); len(mounted) > 0 {
			t.Errorf("mounts are left: %v", mounted)
			return
		}
		_ = w.files.Remove(context.Background(), job) // the keeper may have been killed
		w.killAgent()
		os.RemoveAll(base)
	})
	return w
}

func (w *world) path(name string) string { return filepath.Join(w.dir, name) }

func (w *world) client() *keeper.Client {
	return keeper.NewClient(keeper.ClientConfig{
		Socket: w.path("keeper.sock"), LogFile: w.path("keeper.log"),
		Owner: func(migrate.JobID) (home.Cred, error) { return alice, nil },
	})
}

// startAgent starts the part of an agent that joins mounts with the keeper.
func (w *world) startAgent(o options) {
	w.t.Helper()
	w.agent = helper(home.Cred{}, "agent", w.path("agent.sock"), w.path("keeper.sock"), fmt.Sprint(o.rate))
	w.agent.Stderr = os.Stderr
	out, err := w.agent.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := w.agent.Start(); err != nil {
		w.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		w.t.Fatalf("the agent says %q: %v", line, err)
	}
}

// killAgent ends it as kill -9 does.
func (w *world) killAgent() {
	w.agent.Process.Kill()
	w.agent.Wait()
}

func init() { helpers["agent"] = agentHelper }

func agentHelper(args []string) error {
	l, err := mounts.Listen(args[0])
	if err != nil {
		return err
	}
	var rate int
	fmt.Sscan(args[2], &rate)
	fmt.Println("listening")
	files := keeper.NewClient(keeper.ClientConfig{Socket: args[1], LogFile: os.DevNull})
	return mounts.Introduce(context.Background(), l, func(ctx context.Context, n api.NodeID) (net.Conn, error) {
		if n != homeNode {
			return nil, fmt.Errorf("asked for node %d", n)
		}
		near, far, err := pair(rate)
		if err == nil {
			go files.Serve(context.WithoutCancel(ctx), far, thisNode) //nolint:errcheck // the mount tries again
		}
		return near, err
	}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
}

// pair is the two ends of a connection on which so many bytes a second get to
// the far one; 0 is as many as can.
func pair(rate int) (near, far net.Conn, err error) {
	near, far, err = tcpPair()
	if err != nil || rate == 0 {
		return near, far, err
	}
	in := far
	out, far, err := tcpPair()
	if err != nil {
		return nil, nil, err
	}
	pass := func(dst, src net.Conn, step, rate int) {
		defer dst.Close()
		defer src.Close()
		for buf := make([]byte, step); ; {
			n, err := src.Read(buf)
			if rate > 0 {
				time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
			}
			if _, werr := dst.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	go pass(out, in, 16<<10, rate)
	go pass(in, out, 256<<10, 0)
	return near, far, nil
}

func tcpPair() (a, b net.Conn, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err == nil {
		b, err = l.Accept()
	}
	return a, b, err
}

// admit lets a copy of the job come to this node, in an epoch.
func (w *world) admit(epoch uint64) {
	w.t.Helper()
	must(w.t, w.files.Prepare(ctx(w.t), job, at(homeNode, 1), at(thisNode, epoch)))
}

func at(n api.NodeID, epoch uint64) migrate.Placement {
	return migrate.Placement{Node: n, Epoch: epoch}
}

// open mounts an epoch that was admitted, and gives alice's folder there.
func (w *world) open(epoch uint64) string {
	w.t.Helper()
	root, err := w.roots.Open(ctx(w.t), homeNode, job, epoch)
	must(w.t, err)
	if !root.Guest {
		w.t.Error("Open says that another machine's files are this one's own")
	}
	return filepath.Join(root.Dir, w.tree)
}

// guest is a job on this node in epoch 2, and alice's folder there.
func (w *world) guest() string {
	w.t.Helper()
	w.admit(2)
	far := w.open(2)
	must(w.t, w.files.Commit(ctx(w.t), job, at(thisNode, 2), nil))
	return far
}

// forwarder is the process of a mount.
func (w *world) forwarder(epoch uint64) int {
	w.t.Helper()
	data, err := os.ReadFile(w.path(fmt.Sprintf("files/%s.%d/process.json", job, epoch)))
	must(w.t, err)
	var id struct{ PID int }
	must(w.t, json.Unmarshal(data, &id))
	return id.PID
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// ctx bounds what a test waits for.
func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return c
}

// isKind checks that an error is a fault of a kind and says something.
func isKind(t testing.TB, what string, err error, kind fault.Kind, says string) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind || !strings.Contains(err.Error(), says) {
		t.Errorf("%s: %v (kind %d); want kind %d and the words %q", what, err, fault.KindOf(err), kind, says)
	}
}

func fuseMounts(t testing.TB, below string) (at []string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], below) {
			at = append(at, f[4])
		}
	}
	return at
}

// helper makes the command that runs a helper as a user.
func helper(as home.Cred, name string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "HOMEFILES_HELPER="+name)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: as.UID, Gid: as.GID}, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// program is a process of the job that is told by lines what to do next, and
// says by lines what it has done.
type program struct {
	t    testing.TB
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  chan string
	once sync.Once
}

// start runs a command of alice's.
func start(t testing.TB, cmd *exec.Cmd) *program {
	t.Helper()
	p := &program{t: t, cmd: cmd, out: make(chan string, 100)}
	var err error
	p.in, err = cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	cmd.Stderr = os.Stderr
	must(t, cmd.Start())
	go func() {
		defer close(p.out)
		for s := bufio.NewScanner(out); s.Scan(); {
			p.out <- s.Text()
		}
	}()
	t.Cleanup(func() { p.cmd.Process.Kill(); p.wait() })
	return p
}

// shell runs a script of alice's in a folder. Not by Cmd.Dir: Go's fork holds
// this whole process up until the child has left the mount.
func shell(t testing.TB, dir, script string) *program {
	t.Helper()
	cmd := exec.Command("sh", "-euc", "cd '"+dir+"'\n"+script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: alice.UID, Gid: alice.GID}, Pdeathsig: syscall.SIGKILL}
	return start(t, cmd)
}

func (p *program) tell(line string) { fmt.Fprintln(p.in, line) }

// says waits for a line.
func (p *program) says(want string) {
	p.t.Helper()
	select {
	case got, ok := <-p.out:
		if got != want || !ok {
			p.t.Fatalf("the program says %q; want %q", got, want)
		}
	case <-time.After(20 * time.Second):
		p.t.Fatalf("the program does not say %q", want)
	}
}

// silent fails the test if the program says something soon.
func (p *program) silent() {
	p.t.Helper()
	select {
	case got := <-p.out:
		p.t.Errorf("the program goes on, and says %q", got)
	case <-time.After(300 * time.Millisecond):
	}
}

func (p *program) wait() {
	p.once.Do(func() {
		p.in.Close()
		p.cmd.Wait()
	})
}

// content checks a file at home.
func (w *world) content(name, want string) {
	w.t.Helper()
	data, err := os.ReadFile(filepath.Join(w.tree, name))
	if err != nil || string(data) != want {
		w.t.Errorf("%s at home: %.100q, %v; want %.100q", name, data, err, want)
	}
}
