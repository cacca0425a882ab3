package home_test

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
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mosimg/agent/homefiles/forward"
	"mosimg/agent/homefiles/home"
	"mosimg/internal/fault"
)

// Helpers are run by the test's own binary in a process of its own, on either
// side: as another user, to be killed, or to be compared.
var helpers = map[string]func(args []string) error{}

// TestMain runs the tests in a mount namespace of their own, so that no mount
// is left behind, however they end.
func TestMain(m *testing.M) {
	if name := os.Getenv("HOMEFILES_HELPER"); name != "" {
		if err := helpers[name](os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Geteuid() == 0 && os.Getenv("HOMEFILES_NS") == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), "HOMEFILES_NS=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case errors.As(err, &exit):
			os.Exit(max(exit.ExitCode(), 1))
		case err != nil:
			fmt.Fprintln(os.Stderr, "no mount namespace, so no test:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// Users of the tests: 1000 is in group 1000 and, by supplement, in 2000.
var (
	alice = home.Cred{UID: 1000, GID: 1000, Groups: []uint32{2000, 3000}}
	bob   = home.Cred{UID: 1001, GID: 1001}
	root  = home.Cred{}
)

// pair is a home and a node on this machine, joined by TCP that can be cut.
type pair struct {
	t    testing.TB
	srv  *home.Server
	dir  string // the tree, as home sees it
	mnt  string // and as the node sees it
	fwd  *forwarder
	addr string

	mu    sync.Mutex
	conns []net.Conn
	cut   bool
	dials int
}

const jobName = "job-1"

type options struct {
	users []home.Cred
	cfg   home.Config
	lease time.Duration
}

// newPair serves a fresh directory and mounts it. Everything ends with the test.
func newPair(t testing.TB, o options) *pair {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts FUSE and acts as other users")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
	if os.Getenv("MOSIMG_HOMEFILES") == "" {
		t.Skip("a minute of FUSE mounts: MOSIMG_HOMEFILES=1 runs them, as make test does")
	}
	base, err := os.MkdirTemp("", "homefiles")
	if err != nil {
		t.Fatal(err)
	}
	os.Chmod(base, 0o755)
	p := &pair{t: t, dir: filepath.Join(base, "home"), mnt: filepath.Join(base, "node")}
	t.Cleanup(func() { os.RemoveAll(base) })
	os.Mkdir(p.mnt, 0o755)
	os.Mkdir(p.dir, 0o755)
	os.Chmod(p.dir, 0o777|os.ModeSticky)
	if o.users == nil {
		o.users = []home.Cred{root, alice, bob}
	}
	if tracing() {
		o.cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	p.srv, err = home.New(o.cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.srv.Close)
	if err := p.srv.Add(home.Capsule{ID: jobName, Root: p.dir, Node: 2, Epoch: 1, Users: o.users}); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	p.addr = ln.Addr().String()
	go p.accept(ln)
	p.fwd = p.mount(p.mnt, 1, o)
	return p
}

// accept is the network: it hands connections to the home, or resets them.
func (p *pair) accept(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		if p.cut {
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		} else {
			p.dials++
			p.conns = append(p.conns, c)
			go p.srv.Serve(context.Background(), c, 2)
		}
		p.mu.Unlock()
	}
}

// forwarder is a forwarder in a process of its own, as in real life. It must
// be: a process that waits in the mount that it serves itself cannot be
// killed.
type forwarder struct {
	pid    int
	result chan string // what Run returned, once
	done   chan struct{}
	stop   func()
}

type forwardArgs struct {
	Addr, Mountpoint string
	Epoch            uint64
	Lease            time.Duration
	Trace            bool
}

func init() { helpers["forward"] = forwardHelper }

// forwardHelper runs a forwarder until its stdin ends.
func forwardHelper(args []string) error {
	var a forwardArgs
	if err := json.Unmarshal([]byte(args[0]), &a); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	cfg := forward.Config{
		Capsule: jobName, Epoch: a.Epoch, Mountpoint: a.Mountpoint, Lease: a.Lease,
		Ready: func() { fmt.Println("ready") },
		Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", a.Addr)
		},
	}
	if a.Trace {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	err := forward.Run(ctx, cfg)
	fmt.Println("ended", fault.KindOf(err), err)
	return nil
}

// mount mounts the pair's tree on a directory and waits until it answers.
func (p *pair) mount(mnt string, epoch uint64, o options) *forwarder {
	p.t.Helper()
	args, err := json.Marshal(forwardArgs{Addr: p.addr, Mountpoint: mnt, Epoch: epoch, Lease: o.lease, Trace: tracing()})
	if err != nil {
		p.t.Fatal(err)
	}
	cmd := helper(context.Background(), root, "forward", string(args))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	f := &forwarder{pid: cmd.Process.Pid, result: make(chan string, 1), done: make(chan struct{}), stop: func() { stdin.Close() }}
	ready := make(chan struct{})
	go func() {
		defer close(f.done)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if line := lines.Text(); line == "ready" {
				close(ready)
			} else if r, ok := strings.CutPrefix(line, "ended "); ok {
				f.result <- r
			}
		}
		cmd.Wait()
	}()
	p.t.Cleanup(func() {
		stdin.Close()
		select {
		case <-f.done:
		case <-time.After(10 * time.Second):
			p.t.Error("forward.Run does not end")
			cmd.Process.Kill()
			<-f.done
		}
		syscall.Unmount(mnt, syscall.MNT_DETACH)
	})
	select {
	case <-ready:
	case r := <-f.result:
		p.t.Fatal("forwarder ended: ", r)
	case <-time.After(20 * time.Second):
		p.t.Fatal("the mount does not answer")
	}
	return f
}

func tracing() bool { return testing.Verbose() && os.Getenv("HOMEFILES_LOG") != "" }

// setCut cuts the link with a RST, or lets it come back.
func (p *pair) setCut(cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = cut
	if cut {
		for _, c := range p.conns {
			if tcp, ok := c.(*net.TCPConn); ok {
				tcp.SetLinger(0)
			}
			c.Close()
		}
		p.conns = nil
	}
}

// connected waits until the node has connected n times.
func (p *pair) connected(n int) {
	p.t.Helper()
	for range 1000 {
		p.mu.Lock()
		ok := p.dials >= n
		p.mu.Unlock()
		if ok {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	p.t.Fatalf("the node does not connect for the %d. time", n)
}

// deadline bounds everything that a test waits for.
func deadline(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// helper makes the command that runs a helper as a user.
func helper(ctx context.Context, as home.Cred, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "HOMEFILES_HELPER="+name)
	asUser(cmd, as)
	return cmd
}

func asUser(cmd *exec.Cmd, as home.Cred) {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: as.UID, Gid: as.GID, Groups: as.Groups},
		Pdeathsig:  syscall.SIGKILL,
	}
}

// in makes a script that runs in a directory. Not by Cmd.Dir: the child would
// wait in the mount before its exec, and Go's fork keeps this whole process
// waiting for it, which is the home that it waits for.
func in(dir, script string) string { return "cd '" + dir + "'\n" + script }

// sh runs a shell script as a user and gives its output.
func sh(t testing.TB, as home.Cred, dir, script string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(deadline(t, time.Minute), "sh", append([]string{"-euc", in(dir, script), "sh"}, args...)...)
	cmd.WaitDelay = time.Second
	asUser(cmd, as)
	cmd.Env = append(os.Environ(), "HOME=/nonexistent", "LC_ALL=C", "GIT_CONFIG_NOSYSTEM=1")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustSh(t testing.TB, as home.Cred, dir, script string, args ...string) string {
	t.Helper()
	out, err := sh(t, as, dir, script, args...)
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}
