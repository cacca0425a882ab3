package nodecli

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/monitor"
)

// Where there is no terminal mosmon prints once; a script gets numbers.
func TestMosmonOnce(t *testing.T) {
	socket := agentSocket(t)
	for _, args := range [][]string{{"mosmon", "--once"}, {"mosmon"}, {"mosmon", "-n"}} {
		status, out, errs := run(t, append(args, "--socket", socket)...)
		if status != 0 || errs != "" || strings.Count(out, "\n") != 5 || !strings.Contains(out, "node2") || strings.Contains(out, "\x1b") {
			t.Errorf("%q: %d, %q\n%s", args, status, errs, out)
		}
	}
	for _, tc := range []struct{ flag, want string }{
		{"-l", "load of a CPU"}, {"-m", "memory: # used"}, {"-s", "speed of a CPU"}, {"-u", "utilisation of the CPUs"}, {"-g", "guests: jobs"},
		{"-v", "load of a CPU"}, {"-t", "total 2 nodes"},
	} {
		status, out, errs := run(t, "mosmon", "--once", tc.flag, "--socket", socket)
		if status != 0 || errs != "" || !strings.Contains(out, tc.want) || strings.Contains(out, "\x1b") {
			t.Errorf("--once %s: %d, %q\n%s", tc.flag, status, errs, out)
		}
	}
	if _, out, _ := run(t, "mosmon", "-d", "+2", "--socket", socket); strings.Contains(out, "node3") || strings.Contains(out, "head") || !strings.Contains(out, "node2") {
		t.Errorf("-d +2:\n%s", out)
	}
	status, out, _ := run(t, "mosmon", "--once", "--json", "--socket", socket) // the lab and scripts ask so
	var got api.MemberTable
	if err := json.Unmarshal([]byte(out), &got); status != 0 || err != nil {
		t.Fatalf("--json: %d, %v", status, err)
	}
	if d := cmp.Diff(members, got); d != "" {
		t.Errorf("--json (-want +got):\n%s", d)
	}
}

// live is mosmon as a process with a terminal of its own.
type live struct {
	t         *testing.T
	near, far *os.File
	before    unix.Termios
	cmd       *exec.Cmd
	seen      []byte
}

func newLive(t *testing.T, socket string, env []string, args ...string) *live {
	t.Helper()
	l := &live{t: t}
	l.near, l.far = openPTY(t)
	l.before = termiosOf(t, l.near)
	l.resize(80, 24)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l.cmd = exec.Command(self)
	l.cmd.Args = append([]string{"mosmon", "--socket", socket}, args...)
	l.cmd.Env = append(append(os.Environ(), "TERM=xterm", "NO_COLOR="), env...)
	l.cmd.Stdin, l.cmd.Stdout, l.cmd.Stderr = l.near, l.near, l.near
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.cmd.Process.Kill()
		_ = l.cmd.Wait()
	})
	return l
}

func (l *live) resize(width, height uint16) {
	l.t.Helper()
	if err := unix.IoctlSetWinsize(int(l.near.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: width, Row: height}); err != nil {
		l.t.Fatal(err)
	}
}

func (l *live) enter(keys string) {
	l.t.Helper()
	if _, err := l.far.WriteString(keys); err != nil {
		l.t.Fatal(err)
	}
}

func (l *live) signal(s syscall.Signal) {
	l.t.Helper()
	if err := l.cmd.Process.Signal(s); err != nil {
		l.t.Fatal(err)
	}
}

// expect reads until text appears, and forgets what came up to it.
func (l *live) expect(text string) (before string) {
	l.t.Helper()
	buf := make([]byte, 4096)
	for {
		if i := bytes.Index(l.seen, []byte(text)); i >= 0 {
			before = string(l.seen[:i])
			l.seen = l.seen[i+len(text):]
			return before
		}
		l.far.SetReadDeadline(time.Now().Add(15 * time.Second))
		n, err := l.far.Read(buf)
		if err != nil {
			l.t.Fatalf("%v; the terminal shows %q; want %q", err, l.seen, text)
		}
		l.seen = append(l.seen, buf[:n]...)
	}
}

// The sequences that begin and end the second screen.
const (
	secondScreen = "\x1b[?1049h"
	firstScreen  = "\x1b[?25h\x1b[?1049l"
)

// isRestored fails the test unless the terminal is as mosmon has found it.
func (l *live) isRestored() {
	l.t.Helper()
	l.expect(firstScreen)
	if after := termiosOf(l.t, l.near); after != l.before {
		l.t.Errorf("the terminal is left in mode %+v; it was %+v", after, l.before)
	}
}

func TestMosmonKeys(t *testing.T) {
	l := newLive(t, agentSocket(t), nil)
	l.expect(secondScreen)
	l.expect("load of a CPU")
	l.expect("node2")
	for _, k := range []struct{ keys, want string }{
		{"m", "memory: # used"}, {"s", "speed of a CPU"}, {"u", "utilisation of"}, {"g", "guests: jobs"}, {"n", "GUESTS"}, {"t", "total 2 nodes"},
		{"L", "load of a CPU"}, {"h", "MOSIX's keys"}, {"x", "load of a CPU"},
		{"\x13", "load of a CPU"}, // ctrl-S does not stop it
	} {
		l.enter(k.keys)
		l.expect(k.want)
	}
	l.enter("q")
	l.isRestored()
	if err := l.cmd.Wait(); err != nil {
		t.Errorf("q: %v", err)
	}
}

// Whatever ends mosmon, the user's shell has a usable terminal afterwards.
func TestMosmonRestoresTheTerminal(t *testing.T) {
	socket := agentSocket(t)
	for name, end := range map[string]func(*live){
		"ctrl-C":  func(l *live) { l.enter("\x03") },
		"ctrl-\\": func(l *live) { l.enter("\x1c") },
		"TERM":    func(l *live) { l.signal(syscall.SIGTERM) },
		"HUP":     func(l *live) { l.signal(syscall.SIGHUP) },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLive(t, socket, nil)
			l.expect("node2")
			end(l)
			l.isRestored()
			if err := l.cmd.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Even a fault of ours leaves a usable terminal, and says what it was.
func TestMosmonCrash(t *testing.T) {
	near, far := openPTY(t)
	before := termiosOf(t, near)
	var fault any
	func() {
		defer func() { fault = recover() }()
		_ = watch(t.Context(), newScreen(near, near, false), monitor.View{}, func(context.Context) (api.MemberTable, error) { panic("a fault of ours") })
	}()
	if text, _ := fault.(string); !strings.HasPrefix(text, "a fault of ours\n") || !strings.Contains(text, "mosmon_watch.go") {
		t.Errorf("the fault is told as %q", text)
	}
	if after := termiosOf(t, near); after != before {
		t.Errorf("the terminal is left in mode %+v; it was %+v", after, before)
	}
	l := &live{t: t, near: near, far: far, before: before}
	l.isRestored()
}

// A stopped mosmon leaves the terminal to the shell, and takes it again.
func TestMosmonStops(t *testing.T) {
	l := newLive(t, agentSocket(t), nil)
	l.expect("node2")
	l.signal(syscall.SIGTSTP)
	var ws unix.WaitStatus
	if _, err := unix.Wait4(l.cmd.Process.Pid, &ws, unix.WUNTRACED, nil); err != nil || !ws.Stopped() {
		t.Fatalf("wait: %v, status %#x; want stopped", err, ws)
	}
	l.isRestored()
	l.signal(syscall.SIGCONT)
	l.expect(secondScreen)
	l.expect("node2")
	l.enter("q")
	l.isRestored()
}

func TestMosmonResizes(t *testing.T) {
	l := newLive(t, agentSocket(t), nil)
	l.expect("l)oad m)emory")
	l.resize(40, 12)
	l.expect("l m s u g n") // what h tells in so narrow a frame
	l.resize(10, 3)
	l.expect("too small")
	l.resize(80, 24)
	l.expect("l)oad m)emory")
}

// An agent that is restarted is no reason to start mosmon again.
func TestMosmonOutlivesTheAgent(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l := newLive(t, socket, nil)
	l.expect("trying again")
	stop := serveAgent(t, socket)
	l.expect("node2")
	stop()
	l.expect("no news for")
	l.expect("node2") // as last heard
	serveAgent(t, socket)
	for !strings.Contains(l.expect("node2"), "load of a CPU") {
	}
	l.enter("q")
	l.isRestored()
}

func TestMosmonColours(t *testing.T) {
	socket := agentSocket(t)
	l := newLive(t, socket, nil)
	if frame := l.expect("node2"); !strings.Contains(frame, "\x1b[0;33m") {
		t.Errorf("no colours: %q", frame)
	}
	l = newLive(t, socket, []string{"NO_COLOR=1"})
	if frame := l.expect("node2"); strings.Contains(frame, "m") && strings.Contains(frame, "\x1b[0;") {
		t.Errorf("colours although NO_COLOR is set: %q", frame)
	}
}

// A terminal that cannot be drawn on is told what to use, and is not touched.
func TestMosmonDumbTerminal(t *testing.T) {
	socket := agentSocket(t)
	for _, term := range []string{"dumb", ""} {
		l := newLive(t, socket, []string{"TERM=" + term})
		if before := l.expect("mosmon --once"); strings.Contains(before, "\x1b") {
			t.Errorf("TERM=%q: %q", term, before)
		}
		l = newLive(t, socket, []string{"TERM=" + term}, "--once")
		if before := l.expect("node2"); strings.Contains(before, "\x1b") {
			t.Errorf("TERM=%q --once: %q", term, before)
		}
	}
}
