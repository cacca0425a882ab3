package mounts_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

func init() { helpers["lock"] = lockHelper }

// lockHelper opens files, locks each in its way or not at all, and holds them:
// "KIND FILE ...", with KIND posix, flock, ofd or none.
func lockHelper(args []string) error {
	for ; len(args) > 1; args = args[2:] {
		fd, err := unix.Open(args[1], unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return err
		}
		lk := unix.Flock_t{Type: unix.F_WRLCK, Start: 10, Len: 10}
		switch args[0] {
		case "posix":
			err = unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &lk)
		case "ofd":
			err = unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &lk)
		case "flock":
			err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		}
		if err != nil {
			fmt.Println(args[0], err)
			return nil
		}
	}
	fmt.Println("open")
	io.Copy(io.Discard, os.Stdin)
	return nil
}

var lockKinds = []string{"posix", "flock", "ofd"}

// holds starts a process of alice's that has all kinds of locks, or with none opens
// the same files.
func holds(t testing.TB, dir string, none bool) *program {
	t.Helper()
	var args []string
	for _, kind := range lockKinds {
		do := kind
		if none {
			do = "none"
		}
		args = append(args, do, filepath.Join(dir, kind))
	}
	p := start(t, helper(alice, "lock", args...))
	p.says("open")
	return p
}

// taken tells which of the locks a process at home does not get.
func (w *world) taken() (kinds []string) {
	w.t.Helper()
	for _, kind := range lockKinds {
		p := start(w.t, helper(alice, "lock", kind, filepath.Join(w.tree, kind)))
		switch got := <-p.out; {
		case strings.Contains(got, "unavailable"):
			kinds = append(kinds, kind)
		case got != "open":
			w.t.Errorf("%s lock at home: %q", kind, got)
		}
		p.wait()
	}
	return kinds
}

// becomes waits for the locks that are taken to be these.
func (w *world) becomes(why string, want ...string) {
	w.t.Helper()
	var got []string
	for range 100 {
		if got = w.taken(); slices.Equal(got, want) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	w.t.Errorf("%s: %v are locked; want %v", why, got, want)
}

// move brings the job from its mount in epoch 2 to one in epoch 3, both on this node,
// with a process that holds locks; it gives the old process and its new copy, which is
// frozen.
func (w *world) move() (near, far string, old, copied *program) {
	w.t.Helper()
	near = w.guest()
	old = holds(w.t, near, false)
	must(w.t, w.files.Prepare(ctx(w.t), job, at(thisNode, 2), at(thisNode, 3)))
	far = w.open(3)
	copied = holds(w.t, far, true)
	must(w.t, syscall.Kill(copied.cmd.Process.Pid, syscall.SIGSTOP))
	must(w.t, w.roots.Sync(ctx(w.t), homeNode, job, 2))
	must(w.t, w.files.Sync(ctx(w.t), job))
	pids := map[uint32]uint32{uint32(old.cmd.Process.Pid): uint32(copied.cmd.Process.Pid)}
	for range 2 { // an order may come again
		must(w.t, w.files.Commit(ctx(w.t), job, at(thisNode, 3), pids))
	}
	return near, far, old, copied
}

// The old copy's requests wait from Commit on. When it is settled they fail, its mount is
// lost, and the new copy has the job's locks, until its process lets them go.
func TestSettle(t *testing.T) {
	w := newWorld(t, options{})
	near, far, old, copied := w.move()
	p := shell(t, "/", "(echo old >"+near+"/who) 2>/dev/null || echo fenced")
	p.silent()
	shell(t, far, "echo new >who; echo written").says("written")
	locks, err := w.files.Locks(ctx(t), job)
	must(t, err)
	for _, want := range []string{
		"has a write lock (fcntl) on bytes 10 to 19 of " + filepath.Join(w.tree, "posix"),
		"has a write lock (fcntl) on bytes 10 to 19 of " + filepath.Join(w.tree, "ofd"),
		"has a write lock (flock) on " + filepath.Join(w.tree, "flock"),
	} {
		want = fmt.Sprintf("process %d %s", copied.cmd.Process.Pid, want)
		if !slices.Contains(locks, want) {
			t.Errorf("Locks: %q; want %q", locks, want)
		}
	}
	for range 2 {
		must(t, w.files.Settle(ctx(t), job))
	}
	p.says("fenced")
	isKind(t, "Lost", eventually(func() error { return w.roots.Lost(homeNode, job, 2) }), fault.Unavailable, "newer epoch")
	must(t, old.cmd.Process.Kill())
	old.wait()
	must(t, w.roots.Close(ctx(t), homeNode, job, 2))
	w.content("who", "new\n")
	w.becomes("after the old copy is gone", lockKinds...)
	isKind(t, "Reclaim of what is settled", w.files.Reclaim(ctx(t), job, at(thisNode, 4)), fault.Refused, "settled")
	must(t, syscall.Kill(copied.cmd.Process.Pid, syscall.SIGCONT))
	copied.wait()
	w.becomes("after the new copy has ended")
}

// A copy that never ran is killed before the source is told to go on: the source finds
// its locks, which nobody could have had meanwhile, its files, and what it had asked for.
func TestReclaim(t *testing.T) {
	for _, died := range []string{"process", "mount", "nothing"} {
		t.Run(died+" died", func(t *testing.T) {
			w := newWorld(t, options{})
			near, _, old, copied := w.move()
			p := shell(t, "/", "echo old >"+near+"/who && echo written")
			p.silent()
			switch died {
			case "process":
				must(t, copied.cmd.Process.Kill())
				copied.wait()
				time.Sleep(600 * time.Millisecond) // the home hears of it
			case "mount":
				must(t, syscall.Kill(w.forwarder(3), syscall.SIGKILL))
			}
			w.becomes("between the copies", lockKinds...)
			// A cut meanwhile: whoever is held up is not turned away for good.
			w.killAgent()
			w.startAgent(options{})
			for range 2 {
				must(t, w.files.Reclaim(ctx(t), job, at(thisNode, 4)))
			}
			p.says("written")
			w.content("who", "old\n")
			isKind(t, "a late Reclaim", w.files.Reclaim(ctx(t), job, at(thisNode, 3)), fault.Refused, "before the current")
			lost := eventually(func() error { return w.roots.Lost(homeNode, job, 3) })
			if died != "mount" {
				isKind(t, "Lost of the copy that never ran", lost, fault.Unavailable, "newer epoch")
			}
			must(t, w.roots.Close(ctx(t), homeNode, job, 3))
			w.becomes("after the source has gone on", lockKinds...)
			// It says its old epoch, as it always did.
			w.killAgent()
			w.startAgent(options{})
			shell(t, near, "echo older >who; echo written").says("written")
			old.wait()
			w.becomes("after the source has let go")
			// And it may move once more.
			must(t, w.files.Prepare(ctx(t), job, at(thisNode, 4), at(thisNode, 5)))
			w.open(5)
			must(t, w.files.Commit(ctx(t), job, at(thisNode, 5), nil))
			must(t, w.files.Settle(ctx(t), job))
			isKind(t, "Lost after a move", eventually(func() error { return w.roots.Lost(homeNode, job, 2) }), fault.Unavailable, "newer epoch")
		})
	}
}

// A job that leaves home and never runs on the node is at home again: the node is
// served no more.
func TestReclaimAtHome(t *testing.T) {
	w := newWorld(t, options{})
	far := w.guest()
	p := shell(t, far, "echo ready; read x; (echo node >who) 2>/dev/null || echo fenced")
	p.says("ready")
	for range 2 {
		must(t, w.files.Reclaim(ctx(t), job, at(homeNode, 3)))
	}
	p.tell("go on")
	p.says("fenced")
	must(t, w.roots.Close(ctx(t), homeNode, job, 2))
	must(t, w.files.Prepare(ctx(t), job, at(homeNode, 3), at(thisNode, 4)))
	shell(t, w.open(4), "echo again >who; echo written").says("written")
	must(t, w.files.Abort(ctx(t), job, at(thisNode, 4)))
	isKind(t, "Lost after Abort", eventually(func() error { return w.roots.Lost(homeNode, job, 4) }), fault.Unavailable, "newer epoch")
}

// eventually waits for an error.
func eventually(f func() error) (err error) {
	for range 300 {
		if err = f(); err != nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}
