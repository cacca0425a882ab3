package boot

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// reaper starts children and collects every process that ends, ours and the
// orphans that fall to process 1. os/exec must not be used beside it: the
// two would steal each other's exit statuses.
type reaper struct {
	mu       sync.Mutex // guards the following, and holds off reaping while a child is being started
	children map[int]chan syscall.WaitStatus
}

func newReaper() *reaper { return &reaper{children: make(map[int]chan syscall.WaitStatus)} }

// start runs a program. The channel gives its status once.
func (r *reaper) start(argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	// Under the lock, so that a child that ends at once is known when it is reaped.
	r.mu.Lock()
	defer r.mu.Unlock()
	path := argv[0]
	if path == self {
		path = ownPath()
	}
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, nil, &os.PathError{Op: "start", Path: argv[0], Err: err}
	}
	done := make(chan syscall.WaitStatus, 1)
	r.children[pid] = done
	return pid, done, nil
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
	for {
		r.mu.Lock()
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			r.mu.Unlock()
			continue
		}
		if err != nil || pid <= 0 {
			r.mu.Unlock()
			return
		}
		if done := r.children[pid]; done != nil {
			delete(r.children, pid)
			done <- ws
		}
		r.mu.Unlock()
	}
}

// ownPath is where this program lies in the image, so that ps shows its name;
// by /proc/self/exe it would be called "exe".
func ownPath() string {
	const exe = "/proc/self/exe"
	own, err := os.Stat(exe)
	if err != nil {
		return exe
	}
	for _, p := range []string{"/usr/bin/mosagent", "/bin/mosagent", "/bbin/mosagent", "/usr/sbin/mosagent"} {
		if fi, err := os.Stat(p); err == nil && os.SameFile(fi, own) {
			return p
		}
	}
	return exe
}
