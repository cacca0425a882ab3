package shim

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// reaper starts children and collects every process that ends: ours, those
// that CRIU made our children, and orphans. os/exec must not be used beside
// it: the two would steal each other's exit statuses.
type reaper struct {
	mu       sync.Mutex // guards the following, and holds off reaping while a child is being started
	children map[int]chan syscall.WaitStatus
	// unclaimed are the statuses of the processes that ended before anybody
	// asked for them: a restored leader may. Emptied at each restore.
	unclaimed map[int]syscall.WaitStatus
}

func newReaper() *reaper {
	return &reaper{children: make(map[int]chan syscall.WaitStatus), unclaimed: make(map[int]syscall.WaitStatus)}
}

// start runs a program. The channel gives its status once.
func (r *reaper) start(argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	// Under the lock, so that a child that ends at once is known when it is reaped.
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(argv[0], argv, attr)
	if err != nil {
		return 0, nil, &os.PathError{Op: "start", Path: argv[0], Err: err}
	}
	return pid, r.claim(pid), nil
}

// forget drops statuses that nobody asked for; process numbers come again.
func (r *reaper) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.unclaimed)
}

// adopt is start for a child that somebody else has started.
func (r *reaper) adopt(pid int) <-chan syscall.WaitStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	ch := r.claim(pid)
	if ws, ok := r.unclaimed[pid]; ok {
		delete(r.unclaimed, pid)
		r.children[pid] <- ws
		delete(r.children, pid)
	}
	return ch
}

func (r *reaper) claim(pid int) chan syscall.WaitStatus {
	ch := make(chan syscall.WaitStatus, 1)
	r.children[pid] = ch
	return ch
}

// run collects ended processes until ctx ends.
func (r *reaper) run(ctx context.Context) {
	chld := make(chan os.Signal, 1)
	signal.Notify(chld, unix.SIGCHLD)
	defer signal.Stop(chld)
	// The tick covers a SIGCHLD that came before Notify.
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		r.collect()
		select {
		case <-chld:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func (r *reaper) collect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if ch := r.children[pid]; ch != nil {
			delete(r.children, pid)
			ch <- ws
		} else {
			r.unclaimed[pid] = ws
		}
	}
}
