// Package capsuletest makes nodes for tests on one machine: capsules with root
// views of their own, in a mount namespace that goes with the test, so that
// nothing is left of a test that crashed.
package capsuletest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule"
	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/capsule/shim"
)

// programVerb makes the test binary one of the programs given to Main.
const programVerb = "test-program"

// inside marks a test process that has its own mount namespace.
const inside = "MOSIMG_TEST_INSIDE"

// Main is a TestMain: the test binary is also the shim, and the programs that
// the tests run as jobs.
func Main(m *testing.M, programs map[string]func(args []string) int) {
	if code, ours := shim.Dispatch(os.Args); ours {
		os.Exit(code)
	}
	if len(os.Args) > 2 && os.Args[1] == programVerb {
		os.Exit(programs[os.Args[2]](os.Args[3:]))
	}
	if os.Geteuid() != 0 || os.Getenv(inside) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Unshareflags: 0, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

// CRIU finds the bundle that $MOSIMG_CRIU names, or skips the test. Hardware
// breakpoints are off, as virtual machines may not have them.
func CRIU(t testing.TB) control.CRIU {
	t.Helper()
	dir := os.Getenv("MOSIMG_CRIU")
	if dir == "" {
		t.Skip("MOSIMG_CRIU does not name a CRIU bundle")
	}
	program := first(t, dir, "bin/criu", "usr/sbin/criu")
	loader := first(t, dir, "lib/ld-linux*.so.*", "usr/lib64/ld-linux*.so.*", "usr/lib/*/ld-linux*.so.*")
	libs := []string{filepath.Join(dir, "lib")}
	if more, _ := filepath.Glob(filepath.Join(dir, "usr/lib/*-linux-gnu")); len(more) > 0 {
		libs = more
	}
	return control.CRIU{
		Bundle: dir,
		Argv:   []string{loader, "--library-path", strings.Join(libs, ":"), program},
		Env:    []string{"CRIU_FAULT=130"},
	}
}

func first(t testing.TB, dir string, patterns ...string) string {
	t.Helper()
	for _, p := range patterns {
		if found, _ := filepath.Glob(filepath.Join(dir, p)); len(found) > 0 {
			return found[0]
		}
	}
	t.Fatalf("MOSIMG_CRIU=%s has none of %v", dir, patterns)
	return ""
}

// World is what the nodes of a test share: as files do at home.
type World struct {
	T      testing.TB
	CRIU   control.CRIU
	Work   string // a folder that jobs may write to, with the same path everywhere
	cgroup string
	tmp    string
	views  int
	made   int
}

// UID is the user of jobs.
const UID = 12345

// MovingUID is the user of jobs that are to be moved: UID, or root where the
// test lacks CAP_SYS_RESOURCE, without which CRIU cannot look at another user's limits.
func MovingUID() uint32 {
	var data [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil || data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return 0
	}
	return UID
}

// New makes a World; its cleanup removes all of it and fails the test if a
// process, control group or mount is left. It skips where it cannot work.
func New(t testing.TB) *World {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("capsules need root")
	}
	mount, err := cgroup.Mount()
	if err != nil {
		t.Skip(err)
	}
	tmp, err := os.MkdirTemp("", "mosimg-capsule-")
	if err != nil {
		t.Fatal(err)
	}
	w := &World{T: t, Work: filepath.Join(tmp, "work"), tmp: tmp, cgroup: filepath.Join(mount, filepath.Base(tmp))}
	t.Cleanup(w.clean)
	must(t, os.Chmod(tmp, 0o755))
	must(t, os.Mkdir(w.Work, 0o755))
	must(t, os.Chown(w.Work, UID, UID))
	must(t, os.Mkdir(filepath.Join(tmp, "run"), 0o700))
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(t, unix.Mount("tmpfs", filepath.Join(tmp, "run"), "tmpfs", 0, "mode=700"))
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (w *World) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var groups []string
	filepath.WalkDir(w.cgroup, func(path string, d fs.DirEntry, err error) error { //nolint:errcheck // none is there after most tests
		if err == nil && d.IsDir() && path != w.cgroup {
			groups = append([]string{path}, groups...) // the inner ones first
		}
		return nil
	})
	for _, g := range groups {
		w.T.Errorf("left behind: control group %s", strings.TrimPrefix(g, w.cgroup))
		if err := cgroup.Remove(ctx, g); err != nil {
			w.T.Error(err)
		}
	}
	if _, err := os.Stat(w.cgroup); err == nil {
		if err := cgroup.Remove(ctx, w.cgroup); err != nil {
			w.T.Error(err)
		}
	}
	for i := range w.views {
		if err := unix.Unmount(filepath.Join(w.tmp, fmt.Sprint("view", i)), unix.MNT_DETACH); err != nil {
			w.T.Error(err)
		}
	}
	if err := unix.Unmount(filepath.Join(w.tmp, "run"), 0); err != nil {
		w.T.Errorf("the capsules' folder is still in use: %v", err)
		unix.Unmount(filepath.Join(w.tmp, "run"), unix.MNT_DETACH) //nolint:errcheck // reported
	}
	if err := os.RemoveAll(w.tmp); err != nil {
		w.T.Error(err)
	}
}

// View makes another root: the same files behind other mounts, as home files are.
func (w *World) View() control.Root {
	w.T.Helper()
	dir := filepath.Join(w.tmp, fmt.Sprint("view", w.views))
	must(w.T, os.Mkdir(dir, 0o755))
	must(w.T, unix.Mount("/", dir, "", unix.MS_BIND|unix.MS_REC, ""))
	w.views++
	return control.Root{Dir: dir, Guest: true}
}

// Run makes a folder in memory, for an agent.
func (w *World) Run(name string) string {
	w.T.Helper()
	dir := filepath.Join(w.tmp, "run", name)
	must(w.T, os.MkdirAll(dir, 0o700))
	return dir
}

// Cgroup names a control group for an agent's capsules.
func (w *World) Cgroup(name string) string { return filepath.Join(w.cgroup, name) }

// Home is the root of a job at home.
func (w *World) Home() control.Root { return control.Root{Dir: "/"} }

// racy is a CRIU that meets a process which ends while it is stopped, and says so
// as the real one does, in its log and its answer (type 1, success 0).
const racy = `n=$(cat "$1" 2>/dev/null || echo 0)
if [ "$n" -lt "$2" ]; then
	echo $((n+1)) >"$1"
	echo '(00.001) Error (compel/src/lib/infect.c:1): Unable to detach from 1002: No such process' >/proc/self/fd/4/dump.log
	echo '(00.002) Error (criu/cr-dump.c:1): Dumping FAILED.' >>/proc/self/fd/4/dump.log
	dd bs=65536 count=1 <&3 >/dev/null 2>&1
	printf '\010\001\020\000' >&3
	exit 1
fi
shift 2
exec "$@"`

// Racy is a CRIU whose first dumps meet such a process, so many of them.
func (w *World) Racy(criu control.CRIU, dumps int) control.CRIU {
	criu.Argv = append([]string{"/bin/sh", "-c", racy, "criu", filepath.Join(w.Work, "raced"), strconv.Itoa(dumps)}, criu.Argv...)
	return criu
}

// Capsule starts an empty capsule. The test removes it; if it fails to, the
// clean-up does.
func (w *World) Capsule(root control.Root) *capsule.Capsule {
	w.T.Helper()
	w.made++
	id := fmt.Sprint("c", w.made)
	dir := filepath.Join(w.tmp, "run", id)
	c, err := capsule.Start(w.T.Context(), capsule.Config{Config: control.Config{
		ID: id, Dir: dir, Cgroup: filepath.Join(w.cgroup, id), Root: root, CRIU: w.CRIU,
	}})
	if err != nil {
		w.T.Fatal(err)
	}
	w.T.Cleanup(func() {
		if w.T.Failed() {
			if log, err := os.ReadFile(filepath.Join(dir, "shim.log")); err == nil {
				w.T.Logf("shim of %s:\n%s", id, log)
			}
		}
		w.Remove(c)
	})
	return c
}

// Remove removes a capsule.
func (w *World) Remove(c *capsule.Capsule) {
	w.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := c.Remove(ctx); err != nil {
		w.T.Errorf("remove capsule %s: %v", c.ID(), err)
	}
}

// Images makes a folder for images, in memory.
func (w *World) Images() *os.File {
	w.T.Helper()
	dir, err := os.MkdirTemp(filepath.Join(w.tmp, "run"), "images-")
	must(w.T, err)
	f, err := os.Open(dir)
	must(w.T, err)
	w.T.Cleanup(func() { f.Close(); os.RemoveAll(dir) })
	return f
}

// Program describes a job that runs one of Main's programs as user MovingUID.
func (w *World) Program(name string, args ...string) control.Spec {
	w.T.Helper()
	exe := filepath.Join(w.Work, "program")
	if _, err := os.Stat(exe); err != nil {
		in, err := os.Open("/proc/self/exe")
		must(w.T, err)
		defer in.Close()
		out, err := os.OpenFile(exe, os.O_WRONLY|os.O_CREATE, 0o755)
		must(w.T, err)
		_, err = io.Copy(out, in)
		must(w.T, errors.Join(err, out.Close()))
	}
	spec := w.Spec(append([]string{exe, programVerb, name}, args...)...)
	spec.UID, spec.GID = MovingUID(), MovingUID()
	return spec
}

// Spec describes a job as user UID.
func (w *World) Spec(argv ...string) control.Spec {
	return control.Spec{Argv: argv, Env: []string{"PATH=/usr/bin:/bin", "HOME=" + w.Work}, Dir: w.Work, UID: UID, GID: UID, Umask: 0o022}
}

// Collect reads an output stream to its end into what it returns, from an
// offset on, acknowledging as it goes.
type Collect struct {
	Data []byte // read it after Wait
	err  error
	done chan struct{}
	out  *capsule.Output
}

// Collect starts reading a stream.
func (w *World) Collect(c *capsule.Capsule, verb control.Verb, from uint64) *Collect {
	w.T.Helper()
	o, err := c.Output(w.T.Context(), verb, from)
	if err != nil {
		w.T.Fatal(err)
	}
	k := &Collect{done: make(chan struct{}), out: o}
	go func() {
		defer close(k.done)
		buf := make([]byte, 4096)
		for {
			n, err := o.Read(buf)
			k.Data = append(k.Data, buf[:n]...)
			if n > 0 {
				_ = o.Acknowledge(from + uint64(len(k.Data)))
			}
			if err != nil {
				k.err = err
				return
			}
		}
	}()
	return k
}

// Wait waits for the end of the stream; io.EOF is its true end.
func (k *Collect) Wait() ([]byte, error) {
	<-k.done
	_ = k.out.Close()
	return k.Data, k.err
}

// Stop stops reading.
func (k *Collect) Stop() []byte {
	_ = k.out.Close()
	<-k.done
	return k.Data
}

// ShimPids are the processes of a capsule's shim, as the test sees them.
func (w *World) ShimPids(c *capsule.Capsule) []int {
	w.T.Helper()
	l, err := cgroup.Open(filepath.Join(w.cgroup, c.ID(), shim.ShimLeaf))
	if err != nil {
		w.T.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	pids, err := l.Procs()
	if err != nil {
		w.T.Fatal(err)
	}
	return pids
}
