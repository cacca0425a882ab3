package capsule_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule"
	"mosimg/agent/capsule/capsuletest"
	"mosimg/agent/capsule/control"
)

func TestMain(m *testing.M) {
	capsuletest.Main(m, map[string]func([]string) int{"counter": counter, "daemonise": daemonise, "daemon": daemon, "contents": contents, "pinned": pinned, "locker": locker})
}

// run runs a job to its end.
func run(t *testing.T, c *capsule.Capsule, w *capsuletest.World, spec control.Spec) (stdout, stderr string, st control.Status) {
	t.Helper()
	if _, err := c.Run(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	o, e := w.Collect(c, control.Stdout, 0), w.Collect(c, control.Stderr, 0)
	st, err := c.Wait(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out, oerr := o.Wait()
	errs, eerr := e.Wait()
	if !errors.Is(oerr, io.EOF) || !errors.Is(eerr, io.EOF) {
		t.Errorf("streams ended with %v and %v; want io.EOF", oerr, eerr)
	}
	return string(out), string(errs), st
}

// What a job is and sees: its caller's identity and limits, a /dev and /proc
// of its own, and no trace of the host's processes and of the shim's files.
func TestJobIsItsCaller(t *testing.T) {
	w := capsuletest.New(t)
	c := w.Capsule(w.Home())
	spec := w.Spec("sh", "-c", `id -u; id -g; id -G; umask; pwd; ulimit -n; ulimit -Hn; nice; echo "$A"
ls /dev | tr '\n' ' '; echo; ls /proc | grep -c '^[0-9]'; ls /dev/.mosimg/private 2>/dev/null || echo private; ls -A /run/lock | wc -l
grep CapBnd /proc/self/status; grep Seccomp: /proc/self/status; ls /proc/$$/fd; exit 3`) // in no pipeline: the shell would hold its end
	spec.Env = append(spec.Env, "A=b c")
	spec.Groups = []uint32{uint32(spec.GID), 4, 24}
	spec.Umask, spec.Nice = 0o077, 5
	spec.Limits = []control.Limit{{Resource: unix.RLIMIT_NOFILE, Cur: 200, Max: 300}}
	out, errs, st := run(t, c, w, spec)
	// The host that the test runs on may have fewer; 21 is SYS_ADMIN.
	var caps uint64
	if _, hex, ok := strings.Cut(out, "CapBnd:"); ok {
		hex, rest, _ := strings.Cut(hex, "\n")
		out = out[:strings.Index(out, "CapBnd:")] + rest
		fmt.Sscanf(hex, "%x", &caps)
	}
	if caps == 0 || caps&(1<<unix.CAP_SYS_ADMIN|1<<unix.CAP_MKNOD|1<<unix.CAP_SYS_PTRACE|1<<unix.CAP_DAC_READ_SEARCH) != 0 {
		t.Errorf("bounding set %#x", caps)
	}
	want := fmt.Sprintf("%d\n%d\n%[1]d 4 24\n0077\n%[3]s\n200\n300\n5\nb c\n", spec.UID, spec.GID, w.Work) +
		"fd full null ptmx pts random shm stderr stdin stdout tty urandom zero \n" +
		"5\nprivate\n0\nSeccomp:\t2\n0\n1\n2"
	if strings.TrimSpace(out) != strings.TrimSpace(want) || errs != "" || st.State != control.Ended || st.Exit != 3 {
		t.Errorf("the job says\n%s%s\nand ends as %+v; want\n%s", out, errs, st, want)
	}
}

// mosrun tells 127 from 126 as a shell does.
func TestProgramThatCannotRun(t *testing.T) {
	w := capsuletest.New(t)
	plain := filepath.Join(w.Work, "plain")
	if err := os.WriteFile(plain, []byte("#!/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	closed := filepath.Join(w.Work, "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		argv0, dir string
		want       error
	}{
		{"no-such-program", "/", unix.ENOENT},
		{"/no/such/program", "/", unix.ENOENT},
		{plain, "/", unix.EACCES},
		{"/etc", "/", unix.EISDIR},
		{"true", closed, unix.EACCES},
		{"true", "/nonexistent", unix.ENOENT},
	} {
		c := w.Capsule(w.Home())
		spec := w.Spec(tt.argv0)
		spec.Dir = tt.dir
		st, err := c.Run(t.Context(), spec)
		if !errors.Is(err, tt.want) || st.State != control.Failed {
			t.Errorf("%s in %s: %v, %s; want %v", tt.argv0, tt.dir, err, st.State, tt.want)
		}
		w.Remove(c)
	}
}

// A limit is the program's: what starts it has to live with no less than it needs.
func TestSmallLimits(t *testing.T) {
	w := capsuletest.New(t)
	for _, l := range []control.Limit{
		{Resource: unix.RLIMIT_AS, Cur: 20 << 20, Max: 40 << 20},
		{Resource: unix.RLIMIT_DATA, Cur: 1 << 20, Max: 1 << 20},
		{Resource: unix.RLIMIT_NOFILE, Cur: 4, Max: 4},
		{Resource: unix.RLIMIT_FSIZE, Cur: 0, Max: 0},
		{Resource: unix.RLIMIT_STACK, Cur: 256 << 10, Max: 256 << 10},
	} {
		spec := w.Spec("sh", "-c", "cat /proc/$$/limits")
		spec.Limits = []control.Limit{l}
		c := w.Capsule(w.Home())
		out, errs, st := run(t, c, w, spec)
		field := func(n uint64) string { return strconv.FormatUint(n, 10) }
		found := false
		for line := range strings.Lines(out) {
			found = found || strings.Contains(line, " "+field(l.Cur)+" ") && strings.Contains(line, " "+field(l.Max)+" ")
		}
		if !found || st.Exit != 0 || st.Signal != 0 {
			t.Errorf("with %+v: %q, %q, %+v", l, out, errs, st)
		}
		w.Remove(c)
	}
}

func TestSignalsAndStatus(t *testing.T) {
	w := capsuletest.New(t)
	// tail says it, not the shell: a shell that is between two commands keeps a
	// signal to itself.
	if err := os.WriteFile(filepath.Join(w.Work, "up"), []byte("up\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, script string
		sig          unix.Signal
		group        bool
		out          string
		exit, signal int
	}{
		{"to the program", "trap 'echo got' TERM; echo up; while :; do sleep 0.02; done", unix.SIGTERM, false, "up\ngot\n", 0, 9},
		{"death", "exec tail -f up", unix.SIGINT, false, "up\n", 0, 2},
		{"group", "tail -f up; echo never", unix.SIGINT, true, "up\n", 0, 2},
		{"daemon goes on", "setsid sh -c 'sleep 0.3; echo daemon' & exec tail -f up", unix.SIGHUP, false, "up\ndaemon\n", 0, 1},
	} {
		c := w.Capsule(w.View())
		if _, err := c.Run(t.Context(), w.Spec("sh", "-c", tt.script)); err != nil {
			t.Fatal(err)
		}
		o, err := c.Output(t.Context(), control.Stdout, 0)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 0, 100)
		until := func(want string) {
			for !strings.HasPrefix(string(got), want) {
				n, err := o.Read(got[len(got):cap(got)])
				got = got[:len(got)+n]
				if err != nil {
					t.Fatalf("%s: output %q, then %v", tt.name, got, err)
				}
			}
		}
		until("up\n")
		if err := c.Signal(t.Context(), tt.sig, tt.group); err != nil {
			t.Fatal(err)
		}
		until(tt.out)
		if tt.signal == 9 {
			if err := c.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		st, err := c.Wait(t.Context())
		if err != nil || st.Exit != tt.exit || st.Signal != tt.signal {
			t.Errorf("%s: %+v, %v; want exit %d signal %d", tt.name, st, err, tt.exit, tt.signal)
		}
		o.Close()
		w.Remove(c)
	}
}

func TestStdin(t *testing.T) {
	w := capsuletest.New(t)
	c := w.Capsule(w.Home())
	if _, err := c.Run(t.Context(), w.Spec("sha256sum")); err != nil {
		t.Fatal(err)
	}
	o := w.Collect(c, control.Stdout, 0)
	data := bytes.Repeat([]byte("0123456789abcde\n"), 100_000)
	// The connection breaks now and then; the offset says where to go on.
	for sent := uint64(0); sent < uint64(len(data)); {
		in, err := c.Input(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sent = in.Offset
		part := data[sent:min(len(data), int(sent)+300_000)]
		go in.Write(part)
		for sent < in.Offset+uint64(len(part)) {
			if sent, err = in.Acknowledged(); err != nil {
				t.Fatal(err)
			}
		}
		if sent == uint64(len(data)) {
			if err := in.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := in.Acknowledged(); !errors.Is(err, io.EOF) {
				t.Errorf("after the end: %v", err)
			}
		}
		in.Close()
	}
	// What one agent has ended the next must not begin again.
	in, err := c.Input(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if !in.Over || in.Offset != uint64(len(data)) {
		t.Errorf("stdin opened after its end: at %d, over %t; want %d and over", in.Offset, in.Over, len(data))
	}
	out, err := o.Wait()
	if !errors.Is(err, io.EOF) {
		t.Errorf("stdout ended with %v", err)
	}
	cmd := exec.Command("sha256sum")
	cmd.Stdin = bytes.NewReader(data)
	if native, err := cmd.Output(); err != nil || !bytes.Equal(native, out) {
		t.Errorf("job: %q; outside: %q, %v", out, native, err)
	}
}

// A shim that is killed takes all of its capsule with it.
func TestShimDies(t *testing.T) {
	w := capsuletest.New(t)
	c := w.Capsule(w.Home())
	if _, err := c.Run(t.Context(), w.Spec("sh", "-c", "setsid sleep 1000 & sleep 1000")); err != nil {
		t.Fatal(err)
	}
	pids := w.ShimPids(c)
	if len(pids) != 1 {
		t.Fatalf("shims: %v", pids)
	}
	if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Wait(t.Context()); !errors.Is(err, capsule.ErrNoShim) {
		t.Errorf("Wait = %v; want %v", err, capsule.ErrNoShim)
	}
}

// A capsule that cannot be started is an error, and leaves nothing.
func TestStartFails(t *testing.T) {
	w := capsuletest.New(t)
	conf := capsule.Config{Exe: "/bin/true", Config: control.Config{ // no shim
		ID: "fails", Dir: filepath.Join(w.Run("run"), "fails"), Cgroup: w.Cgroup("fails"), Root: w.Home(), CRIU: w.CRIU,
	}}
	if _, err := capsule.Start(t.Context(), conf); err == nil || !strings.Contains(err.Error(), "shim ended before it was ready; it said") {
		t.Errorf("Start: %v; want that the shim ended, and what it said", err)
	}
	for _, path := range []string{conf.Dir, conf.Cgroup} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}
