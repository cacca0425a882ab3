package leader

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// run runs a program below a leader and returns its output and how the leader
// ended.
func run(t *testing.T, argv ...string) (out string, state *os.ProcessState, pid int, started error) {
	t.Helper()
	prog := filepath.Join(t.TempDir(), "leader")
	if err := os.WriteFile(prog, Image(), 0o755); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var b strings.Builder
	cmd := &exec.Cmd{Path: prog, Args: append([]string{"leader", argv[0]}, argv...), ExtraFiles: []*os.File{w}, Stdout: &b, Env: []string{"PATH=/usr/bin:/bin", "A=b"}}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	pid, started = Started(r)
	if err := cmd.Wait(); err != nil {
		var ee *exec.ExitError
		if !errors.As(err, &ee) {
			t.Fatal(err)
		}
	}
	return b.String(), cmd.ProcessState, pid, started
}

func TestImageIsSmall(t *testing.T) {
	if n := len(Image()); n > 640 {
		t.Errorf("the leader has %d bytes; every job carries it", n)
	}
}

// mosrun's exit status is the program's: the leader must pass it on unchanged.
func TestStatusIsTheProgramsOwn(t *testing.T) {
	for _, tt := range []struct {
		script string
		code   int
		signal syscall.Signal
	}{
		{"exit 0", 0, 0},
		{"exit 7", 7, 0},
		{"exit 255", 255, 0},
		{"kill -TERM $$", -1, syscall.SIGTERM},
		{"kill -KILL $$", -1, syscall.SIGKILL},
		{"kill -SEGV $$", -1, syscall.SIGSEGV},
		{"kill -64 $$", -1, 64},
		// Signals for the whole group and a child of another status are not the leader's.
		{"trap : TERM; kill -TERM 0; exit 3", 3, 0},
		{"(exit 5) & wait; exit 4", 4, 0},
	} {
		_, state, pid, err := run(t, "/bin/sh", "-c", tt.script)
		ws := state.Sys().(syscall.WaitStatus)
		if err != nil || pid <= 0 || ws.ExitStatus() != tt.code || ws.Signaled() && ws.Signal() != tt.signal {
			t.Errorf("leader of %q: started %d, %v; ended with %d, signal %v; want %d, signal %v", tt.script, pid, err, ws.ExitStatus(), ws.Signal(), tt.code, tt.signal)
		}
	}
}

// A job ends when its last process ends, and a daemon must stay in the tree:
// one that falls out of it is lost at the next move.
func TestDaemonStaysBelowTheLeader(t *testing.T) {
	out, state, pid, err := run(t, "/bin/sh", "-c", `echo $PPID; (setsid sh -c 'sleep 0.3; cut -d" " -f4 /proc/self/stat >&2; ps -o ppid= -p $$' & ) ; exit 9`)
	if err != nil {
		t.Fatal(err)
	}
	if state.ExitCode() != 9 {
		t.Errorf("status %d; want the program's 9, not the daemon's", state.ExitCode())
	}
	f := strings.Fields(out)
	if len(f) != 2 || f[0] != f[1] || f[0] != strconv.Itoa(state.Pid()) {
		t.Errorf("parents of program and daemon = %q; want twice the leader %d (program %d)", f, state.Pid(), pid)
	}
}

func TestEnvironmentAndArguments(t *testing.T) {
	out, _, _, err := run(t, "/bin/sh", "-c", `echo "$A $0 $1"; [ -e /proc/self/fd/3 ] && readlink /proc/$$/fd/3`, "zero", "one two")
	if want := "b zero one two\n"; err != nil || out != want {
		t.Errorf("program says %q, %v; want %q and no third descriptor", out, err, want)
	}
}

func TestProgramThatCannotStart(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]struct {
		errno unix.Errno
		code  int
	}{
		"/nonexistent/program": {unix.ENOENT, 127},
		plain:                  {unix.EACCES, 126},
	} {
		_, state, _, err := run(t, path)
		if !errors.Is(err, ErrExec) || !errors.Is(err, want.errno) || state.ExitCode() != want.code {
			t.Errorf("leader of %s: %v, status %d; want %v, status %d", path, err, state.ExitCode(), want.errno, want.code)
		}
	}
}
