package home_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/home"
	"mosimg/internal/fault"
)

func init() {
	helpers["lock"] = lockHelper
	helpers["dirty"] = dirtyHelper
}

// lockHelper locks a file as asked, says so, and holds the lock until its
// stdin ends: "lock FILE KIND [wait]" with KIND posix, flock or ofd.
func lockHelper(args []string) error {
	fd, err := unix.Open(args[0], unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o666)
	if err != nil {
		return err
	}
	lk := unix.Flock_t{Type: unix.F_WRLCK}
	wait := len(args) > 2
	switch {
	case args[1] == "flock" && wait:
		err = unix.Flock(fd, unix.LOCK_EX)
	case args[1] == "flock":
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
	case args[1] == "ofd":
		err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk)
	case wait:
		err = unix.FcntlFlock(uintptr(fd), unix.F_SETLKW, &lk)
	default:
		err = unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &lk)
	}
	fmt.Println("locked:", err)
	if err != nil {
		return nil
	}
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// holder is a running lockHelper.
type holder struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	lines chan string
}

func hold(t *testing.T, path, kind string, more ...string) *holder {
	t.Helper()
	h := &holder{cmd: helper(deadline(t, time.Minute), alice, "lock", append([]string{path, kind}, more...)...), lines: make(chan string, 1)}
	h.in, _ = h.cmd.StdinPipe()
	out, _ := h.cmd.StdoutPipe()
	if err := h.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			h.lines <- s.Text()
		}
		close(h.lines)
	}()
	t.Cleanup(h.end)
	return h
}

// says waits for what the holder says.
func (h *holder) says(t *testing.T) string {
	t.Helper()
	select {
	case l := <-h.lines:
		return strings.TrimPrefix(l, "locked: ")
	case <-time.After(20 * time.Second):
		t.Fatal("a locker says nothing")
		return ""
	}
}

// silent fails the test if the holder says something soon.
func (h *holder) silent(t *testing.T) {
	t.Helper()
	select {
	case l := <-h.lines:
		t.Errorf("a lock that is held by another was given: %q", l)
	case <-time.After(300 * time.Millisecond):
	}
}

func (h *holder) end() {
	h.in.Close()
	h.cmd.Wait()
}

const granted = "<nil>"

// tryLock is what a process that wants the lock at once gets.
func tryLock(t *testing.T, path, kind string) string {
	t.Helper()
	h := hold(t, path, kind)
	defer h.end()
	return h.says(t)
}

// Locks are one thing for processes of the job and of home, in both directions.
func TestLocksAreSharedWithHome(t *testing.T) {
	p := newPair(t, options{})
	for _, kind := range []string{"posix", "flock", "ofd"} {
		t.Run(kind, func(t *testing.T) {
			far, near := filepath.Join(p.mnt, kind), filepath.Join(p.dir, kind)
			job := hold(t, far, kind)
			if got := job.says(t); got != granted {
				t.Fatalf("job's lock: %s", got)
			}
			if got := tryLock(t, near, kind); !strings.Contains(got, "unavailable") {
				t.Errorf("home gets the job's lock: %s", got)
			}
			if got := tryLock(t, far, kind); !strings.Contains(got, "unavailable") {
				t.Errorf("another of the job gets its lock: %s", got)
			}
			job.end()
			if got := tryLock(t, near, kind); got != granted {
				t.Errorf("after the job has ended: %s", got)
			}
			local := hold(t, near, kind)
			local.says(t)
			if got := tryLock(t, far, kind); !strings.Contains(got, "unavailable") {
				t.Errorf("job gets home's lock: %s", got)
			}
			if kind == "ofd" {
				return
			}
			waiting := hold(t, far, kind, "wait")
			waiting.silent(t)
			local.end()
			if got := waiting.says(t); got != granted {
				t.Errorf("waiting for home's lock: %s", got)
			}
			// Who waits can be killed, and does not get the lock later.
			second := hold(t, far, kind, "wait")
			second.silent(t)
			second.cmd.Process.Kill()
			second.end()
			waiting.end()
			if got := tryLock(t, near, kind); got != granted {
				t.Errorf("a killed waiter has the lock: %s", got)
			}
		})
	}
}

// load writes, reads and unpacks through the mount until told to stop, and
// fails on the first error.
const load = `
i=0
while [ ! -e stop ]; do
	i=$((i+1)); mkdir d$i; for f in 1 2 3; do echo $i-$f >d$i/$f; done; mv d$i e$i; cat e$i/* >>all
done
echo $i`

// A link that is away for seconds is, to a job, a disk that was slow: no
// error, every byte, each operation once, and its locks are still held.
func TestCutUnderLoadIsInvisible(t *testing.T) {
	p := newPair(t, options{})
	os.WriteFile(filepath.Join(p.dir, "all"), nil, 0o666)
	os.Chmod(filepath.Join(p.dir, "all"), 0o666)
	lock, flock := hold(t, filepath.Join(p.mnt, "lock"), "posix"), hold(t, filepath.Join(p.mnt, "flock"), "flock")
	lock.says(t)
	flock.says(t)

	big := make([]byte, 16<<20)
	for i := range big {
		big[i] = byte(uint64(i) * 2654435761 >> 13)
	}
	ctx := deadline(t, time.Minute)
	dd := exec.CommandContext(ctx, "dd", "of="+filepath.Join(p.mnt, "big"), "bs=300k", "iflag=fullblock", "status=none")
	dd.Stdin = &slowReader{r: bytes.NewReader(big)}
	type result struct {
		out []byte
		err error
	}
	results := make(chan result, 2)
	go func() { out, err := dd.CombinedOutput(); results <- result{out, err} }()
	loop := exec.CommandContext(ctx, "sh", "-euc", in(p.mnt, load))
	asUser(loop, alice)
	go func() { out, err := loop.CombinedOutput(); results <- result{out, err} }()

	for i := range 3 {
		p.connected(i + 1)
		time.Sleep(300 * time.Millisecond) // amid the load, wherever that is
		p.setCut(true)
		if got := tryLock(t, filepath.Join(p.dir, "lock"), "posix"); got == granted {
			t.Error("the job's lock was lost in a cut")
		}
		time.Sleep(1500 * time.Millisecond)
		p.setCut(false)
	}
	os.WriteFile(filepath.Join(p.dir, "stop"), nil, 0o644)
	for range 2 {
		if r := <-results; r.err != nil {
			t.Fatalf("load in a cut: %v: %s", r.err, r.out)
		}
	}
	got, err := os.ReadFile(filepath.Join(p.dir, "big"))
	if err != nil || sha256.Sum256(got) != sha256.Sum256(big) {
		t.Errorf("file written across cuts differs: %d bytes of %d, %v", len(got), len(big), err)
	}
	all, _ := os.ReadFile(filepath.Join(p.dir, "all"))
	n := 0
	for line := range strings.Lines(string(all)) {
		want := fmt.Sprintf("%d-%d\n", n/3+1, n%3+1)
		if line != want {
			t.Fatalf("line %d is %q; want %q: an append was lost or doubled", n+1, line, want)
		}
		n++
	}
	if n == 0 {
		t.Error("the load did nothing")
	}
	for _, f := range []string{"lock", "flock"} {
		kind := strings.Replace(f, "lock", "posix", 1)
		if f == "flock" {
			kind = "flock"
		}
		if got := tryLock(t, filepath.Join(p.dir, f), kind); got == granted {
			t.Errorf("%s was lost in a cut", f)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.dials < 4 {
		t.Errorf("%d connections; want 4", p.dials)
	}
}

// slowReader spreads the writing over the cuts.
type slowReader struct{ r io.Reader }

func (s *slowReader) Read(b []byte) (int, error) {
	time.Sleep(8 * time.Millisecond)
	return s.r.Read(b[:min(len(b), 128<<10)])
}

// dirtyHelper dirties pages of a shared mapping, says so and waits.
func dirtyHelper(args []string) error {
	fd, err := unix.Open(args[0], unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	unix.Ftruncate(fd, 1<<20)
	m, err := unix.Mmap(fd, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	for i := range m {
		m[i] = 'd'
	}
	fmt.Println("dirty")
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// state is a process's state letter, or "" when it is gone.
func state(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return ""
	}
	return strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))[0]
}

// Whatever a process of the job does when the link goes, kill -9 ends it.
func TestKillInACutLeavesNoProcess(t *testing.T) {
	p := newPair(t, options{})
	os.WriteFile(filepath.Join(p.dir, "f"), bytes.Repeat([]byte("x"), 1<<20), 0o666)
	lock := hold(t, filepath.Join(p.dir, "lock"), "posix")
	lock.says(t)
	dirty := helper(deadline(t, time.Minute), alice, "dirty", filepath.Join(p.mnt, "dirty"))
	dirtyIn, _ := dirty.StdinPipe()
	defer dirtyIn.Close()
	out, _ := dirty.StdoutPipe()
	if err := dirty.Start(); err != nil {
		t.Fatal(err)
	}
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "dirty\n" {
		t.Fatalf("dirty says %q", line)
	}
	waiter := hold(t, filepath.Join(p.mnt, "lock"), "posix", "wait")
	waiter.silent(t)

	p.setCut(true)
	cmds := map[string]*exec.Cmd{"mapping with dirty pages": dirty, "waiting for a lock": waiter.cmd}
	for name, script := range map[string]string{
		"reading":  "exec cat f",
		"looking":  "exec ls -l none",
		"writing":  "echo x >new",
		"opening":  "exec 3<f",
		"removing": "exec rm -f f",
	} {
		// All of them, without a child that lives on: who waits for a
		// directory's lock in the kernel waits for its holder.
		cmd := exec.CommandContext(context.Background(), "sh", "-c", "cd "+p.mnt+" && "+script)
		asUser(cmd, alice)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		cmds[name] = cmd
	}
	time.Sleep(500 * time.Millisecond) // until each is in its request
	began := time.Now()
	for name, cmd := range cmds {
		if s := state(cmd.Process.Pid); s == "" || s == "Z" {
			t.Errorf("%s did not wait for the link", name)
		}
		cmd.Process.Kill()
	}
	for name, cmd := range cmds {
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Errorf("%s: still there %v after kill -9, in state %s", name, time.Since(began), state(cmd.Process.Pid))
		}
	}
	t.Logf("all gone after %v", time.Since(began))
	p.setCut(false)
	// The mount goes on as if nothing was, and nobody dead has the lock.
	if out := mustSh(t, alice, p.mnt, "wc -c <f || true; echo new >new2; cat new2"); !strings.HasSuffix(out, "new\n") {
		t.Errorf("after the cut: %q", out)
	}
	waiter.end()
	lock.end()
	if got := tryLock(t, filepath.Join(p.dir, "lock"), "posix"); got != granted {
		t.Errorf("lock after its waiter was killed in a cut: %s", got)
	}
	b, err := os.ReadFile(filepath.Join(p.dir, "dirty"))
	if err != nil || bytes.Count(b, []byte("d")) != 1<<20 {
		t.Errorf("pages dirtied before the kill: %d of %d at home, %v", bytes.Count(b, []byte("d")), 1<<20, err)
	}
}

// Whether a file is a terminal needs no home to answer: Python asks it of each file,
// and must neither pay a round trip for it nor wait for a link.
func TestNoFileIsATerminal(t *testing.T) {
	p := newPair(t, options{})
	cmd := exec.CommandContext(deadline(t, 10*time.Second), "sh", "-c", in(p.mnt, "echo x >f; exec 3<f; echo ready; read go; test -t 3; echo $?"))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	if line, err := lines.ReadString('\n'); line != "ready\n" {
		t.Fatalf("the program says %q: %v", line, err)
	}
	p.setCut(true)
	io.WriteString(stdin, "go\n")
	if line, err := lines.ReadString('\n'); line != "1\n" {
		t.Errorf("in a cut, test -t says %q: %v; want 1", line, err)
	}
	p.setCut(false)
	cmd.Wait()
}

func TestLeaseEndsTheMount(t *testing.T) {
	p := newPair(t, options{lease: 2 * time.Second})
	p.setCut(true)
	cmd := exec.CommandContext(deadline(t, 30*time.Second), "sh", "-c", "ls "+p.mnt)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "connect") {
		t.Errorf("after the lease: %v: %s", err, out)
	}
	if r := <-p.fwd.result; !strings.HasPrefix(r, fmt.Sprint(int(fault.Unavailable))) {
		t.Errorf("Run = %s; want a fault of kind Unavailable", r)
	}
}

// moved is a pair whose capsule has a second mount, in the next epoch.
func moved(t *testing.T) (p *pair, mnt2 string) {
	p = newPair(t, options{})
	mnt2 = p.mnt + "2"
	os.Mkdir(mnt2, 0o755)
	if err := p.srv.Prepare(jobName, 2, 2); err != nil {
		t.Fatal(err)
	}
	p.mount(mnt2, 2, options{})
	return p, mnt2
}

func TestCommitFencesTheOldEpoch(t *testing.T) {
	p, mnt2 := moved(t)
	mustSh(t, alice, p.mnt, "echo one >f; cat f")
	mustSh(t, alice, mnt2, "cat f") // both are served until the commit
	if err := p.srv.Sync(context.Background(), jobName); err != nil {
		t.Fatal(err)
	}
	if err := p.srv.Commit(jobName, 2, nil); err != nil {
		t.Fatal(err)
	}
	p.srv.Settle(jobName)
	if r := <-p.fwd.result; !strings.HasPrefix(r, fmt.Sprint(int(fault.Refused))) {
		t.Errorf("old forwarder: %s; want it fenced", r)
	}
	if out, err := sh(t, alice, "/", "echo two >"+p.mnt+"/f"); err == nil && !strings.Contains(out, "connected") {
		if b, _ := os.ReadFile(filepath.Join(p.dir, "f")); string(b) != "one\n" {
			t.Errorf("the old epoch wrote: %s", b)
		}
	}
	mustSh(t, alice, mnt2, "echo three >f")
	if b, _ := os.ReadFile(filepath.Join(p.dir, "f")); string(b) != "three\n" {
		t.Errorf("after the commit: %q", b)
	}
	for _, tc := range []struct {
		name string
		err  error
	}{
		{"prepare of an old epoch", p.srv.Prepare(jobName, 2, 2)},
		{"prepare of none", p.srv.Prepare("none", 3, 2)},
		{"commit of what was not prepared", p.srv.Commit(jobName, 3, nil)},
		{"add again", p.srv.Add(home.Capsule{ID: jobName, Epoch: 1, Users: []home.Cred{alice}})},
		{"add without users", p.srv.Add(home.Capsule{ID: "x", Epoch: 1})},
	} {
		if tc.err == nil {
			t.Errorf("%s was not refused", tc.name)
		}
	}
	if err := p.srv.Commit(jobName, 2, nil); err != nil {
		t.Errorf("the same commit again: %v", err)
	}
}

// Between Commit and Settle the old node's requests wait: nothing that they ask
// happens. If the new node turns out never to have run the job they are done
// after all, with the files that were open; and that node is served no more.
func TestReclaimGoesOnWhereItWas(t *testing.T) {
	p, mnt2 := moved(t)
	mustSh(t, alice, p.mnt, "echo one >f")
	mustSh(t, alice, mnt2, "cat f")
	if err := p.srv.Commit(jobName, 2, nil); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := sh(t, alice, p.mnt, "echo two >>f")
		done <- err
	}()
	select {
	case err := <-done:
		t.Fatalf("a write of the held-up epoch ended: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	if b, _ := os.ReadFile(filepath.Join(p.dir, "f")); string(b) != "one\n" {
		t.Errorf("the held-up epoch wrote: %q", b)
	}
	for range 2 { // the second time changes nothing
		if err := p.srv.Reclaim(jobName, 3); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		t.Errorf("the write after Reclaim: %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(p.dir, "f")); string(b) != "one\ntwo\n" {
		t.Errorf("after Reclaim: %q", b)
	}
	if out, err := sh(t, alice, "/", "echo three >>"+mnt2+"/f"); err == nil {
		t.Errorf("the epoch that never ran may write: %s", out)
	}
	// A cut after that: the forwarder still says its old epoch.
	p.setCut(true)
	p.setCut(false)
	mustSh(t, alice, p.mnt, "echo four >>f")
	// And it may move again.
	if err := p.srv.Prepare(jobName, 4, 2); err != nil {
		t.Fatal(err)
	}
	if err := p.srv.Commit(jobName, 4, nil); err != nil {
		t.Fatal(err)
	}
	p.srv.Settle(jobName)
	if r := <-p.fwd.result; !strings.HasPrefix(r, fmt.Sprint(int(fault.Refused))) {
		t.Errorf("old forwarder: %s; want it fenced", r)
	}
}

// A process's locks move with it: at no time could another have had them.
func TestCommitMovesLocks(t *testing.T) {
	p, mnt2 := moved(t)
	posix, flock := hold(t, filepath.Join(p.mnt, "a"), "posix"), hold(t, filepath.Join(p.mnt, "b"), "flock")
	left := hold(t, filepath.Join(p.mnt, "c"), "posix")
	for _, h := range []*holder{posix, flock, left} {
		if got := h.says(t); got != granted {
			t.Fatal(got)
		}
	}
	// The restored process has the files open, and no lock that its new
	// kernel knows of.
	restored := exec.CommandContext(deadline(t, time.Minute), "sh", "-c", in(mnt2, "exec 3<>a 4<>b; echo open; read x; exec 3<&-; echo closed; read x"))
	stdin, _ := restored.StdinPipe()
	out, _ := restored.StdoutPipe()
	asUser(restored, alice)
	if err := restored.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	lines.Scan()
	pids := map[uint32]uint32{
		uint32(posix.cmd.Process.Pid): uint32(restored.Process.Pid),
		uint32(flock.cmd.Process.Pid): uint32(restored.Process.Pid),
	}
	if err := p.srv.Commit(jobName, 2, pids); err != nil {
		t.Fatal(err)
	}
	p.srv.Settle(jobName)
	for _, f := range []struct{ name, kind string }{{"a", "posix"}, {"b", "flock"}} {
		if got := tryLock(t, filepath.Join(p.dir, f.name), f.kind); got == granted {
			t.Errorf("%s lock was lost in the move", f.kind)
		}
		if got := tryLock(t, filepath.Join(mnt2, f.name), f.kind); got == granted {
			t.Errorf("%s lock does not hold within the job", f.kind)
		}
	}
	if got := tryLock(t, filepath.Join(p.dir, "c"), "posix"); got != granted {
		t.Errorf("lock of a process that did not move: %s", got)
	}
	// Closing the file drops the lock, though the kernel has never seen it.
	io.WriteString(stdin, "\n")
	lines.Scan()
	if got := tryLock(t, filepath.Join(p.dir, "a"), "posix"); got != granted {
		t.Errorf("posix lock after its process closed the file: %s", got)
	}
	stdin.Close()
	restored.Wait()
	if got := tryLock(t, filepath.Join(p.dir, "b"), "flock"); got != granted {
		t.Errorf("flock after its process has ended: %s", got)
	}
}

// A process that ends before it has used its locks leaves none behind.
func TestMovedLocksEndWithTheirProcess(t *testing.T) {
	p, mnt2 := moved(t)
	posix := hold(t, filepath.Join(p.mnt, "a"), "posix")
	posix.says(t)
	restored := exec.CommandContext(deadline(t, time.Minute), "sh", "-c", in(mnt2, "exec 3<>a; echo open; read x; kill -9 $$"))
	stdin, _ := restored.StdinPipe()
	out, _ := restored.StdoutPipe()
	asUser(restored, alice)
	if err := restored.Start(); err != nil {
		t.Fatal(err)
	}
	bufio.NewScanner(out).Scan()
	if err := p.srv.Commit(jobName, 2, map[uint32]uint32{uint32(posix.cmd.Process.Pid): uint32(restored.Process.Pid)}); err != nil {
		t.Fatal(err)
	}
	p.srv.Settle(jobName)
	if got := tryLock(t, filepath.Join(p.dir, "a"), "posix"); got == granted {
		t.Error("lock was lost in the move")
	}
	stdin.Close()
	restored.Wait()
	for range 100 {
		if tryLock(t, filepath.Join(p.dir, "a"), "posix") == granted {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Error("a lock outlives its process by 5 s")
}

func TestForwarderKilledEndsTheMount(t *testing.T) {
	p := newPair(t, options{})
	syscall.Kill(p.fwd.pid, syscall.SIGKILL)
	<-p.fwd.done
	if _, err := os.Stat(p.mnt); err == nil {
		t.Error("a mount without its forwarder answers")
	}
	if err := os.WriteFile(filepath.Join(p.dir, "home"), nil, 0o600); err != nil {
		t.Errorf("home's own tree: %v", err)
	}
}
