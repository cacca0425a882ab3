package home

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// A thread's file system identity. setfsuid from 0 to another user takes
// CAP_DAC_OVERRIDE and its like out of the effective set and setfsuid(0)
// brings them back (capabilities(7)), so a thread needs privilege only to turn
// a file handle into a descriptor and does all else as the user.
type worker struct {
	uid    uint32
	gid    uint32
	groups *Cred // whose groups the thread has; nil: none were set
	umask  uint32
}

// who is as whom a request acts.
type who struct {
	uid, gid uint32
	cred     *Cred // whose groups
}

// The capabilities a worker keeps. SETFCAP, SYS_ADMIN, MKNOD and the rest are
// not dropped by setfsuid, so they must not be there at all: a node could
// otherwise give a user's file capabilities.
const workerCaps = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_DAC_READ_SEARCH |
	1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETUID

// newWorker binds the calling goroutine to a thread of its own, for ever: the
// thread ends with the goroutine.
func newWorker() (*worker, error) {
	runtime.LockOSThread()
	// The umask belongs to the process unless a thread unshares it.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return nil, fmt.Errorf("unshare: %w", err)
	}
	unix.Umask(0)
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{{Effective: workerCaps, Permitted: workerCaps}}
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return nil, fmt.Errorf("keep only file capabilities: %w", err)
	}
	return &worker{}, nil
}

// root makes the thread able to open by handle.
func (w *worker) root() {
	if w.uid != 0 {
		_ = unix.Setfsuid(0) // cannot fail with CAP_SETUID, and reports nothing
		w.uid = 0
	}
}

// become makes the thread act as p on files.
func (w *worker) become(p who) error {
	if w.groups != p.cred {
		var list unsafe.Pointer
		if len(p.cred.Groups) > 0 {
			list = unsafe.Pointer(&p.cred.Groups[0])
		}
		// Not unix.Setgroups, which changes all threads.
		if _, _, e := unix.RawSyscall(sysSetgroups, uintptr(len(p.cred.Groups)), uintptr(list), 0); e != 0 {
			return e
		}
		w.groups = p.cred
	}
	if w.gid != p.gid {
		_ = unix.Setfsgid(int(p.gid)) // as above
		w.gid = p.gid
	}
	if w.uid != p.uid {
		_ = unix.Setfsuid(int(p.uid)) // as above
		w.uid = p.uid
	}
	return nil
}

// mask sets the thread's umask for the next file that it makes: the kernel at
// home then applies it or the directory's default ACL, as it would have there.
func (w *worker) mask(m uint32) {
	if w.umask != m {
		unix.Umask(int(m & 0o777))
		w.umask = m
	}
}

// caller is as whom a request of this uid and gid acts.
func (c *capsule) caller(uid, gid uint32) (who, error) {
	if cred := c.users[uid]; cred != nil {
		if gid != cred.GID && !slices.Contains(cred.Groups, gid) {
			return who{}, unix.EPERM
		}
		return who{uid, gid, cred}, nil
	}
	// The node's root, and its kernel on behalf of nobody (-1).
	if uid == 0 || uid == ^uint32(0) {
		o := &c.Users[0]
		return who{o.UID, o.GID, o}, nil
	}
	return who{}, unix.EPERM
}

// pool is threads that do requests. It grows while all are busy: a few slow
// fsyncs must not hold up the lookups of another job.
type pool struct {
	jobs chan func(*worker)
	mu   sync.Mutex
	size int // without those that are lent; guarded by mu
	done chan struct{}
}

const (
	poolMin = 4
	poolMax = 64
)

func newPool() (*pool, error) {
	p := &pool{jobs: make(chan func(*worker)), done: make(chan struct{})}
	for range poolMin {
		if err := p.grow(); err != nil {
			close(p.done)
			return nil, fault.New(fault.Environment, "start", "the home files handler", err, "run it as root")
		}
	}
	return p, nil
}

func (p *pool) grow() error {
	ready := make(chan error)
	go func() {
		w, err := newWorker()
		ready <- err
		if err != nil {
			return
		}
		for {
			select {
			case job := <-p.jobs:
				job(w)
			case <-p.done:
				return
			}
		}
	}()
	err := <-ready
	if err == nil {
		p.count(1)
	}
	return err
}

// lend has job done by a worker that it may keep for long, and reports whether there
// is one. Threads come back and do not end: what a thread has started could be told
// to end with it.
func (p *pool) lend(job func(*worker)) bool {
	lent := func(w *worker) {
		p.count(-1)
		defer p.count(1)
		job(w)
	}
	select {
	case p.jobs <- lent:
		return true
	default:
	}
	if p.grow() != nil {
		return false
	}
	select {
	case p.jobs <- lent:
		return true
	case <-p.done:
		return false
	}
}

// count counts workers that are there for do.
func (p *pool) count(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.size += n
}

// do has job done by some worker; it waits for one while all poolMax are busy.
func (p *pool) do(job func(*worker)) {
	select {
	case p.jobs <- job:
		return
	default:
	}
	p.mu.Lock()
	room := p.size < poolMax
	p.mu.Unlock()
	if room {
		_ = p.grow() // no thread more is no fault while there are others
	}
	select {
	case p.jobs <- job:
	case <-p.done:
	}
}

func (p *pool) close() { close(p.done) }
