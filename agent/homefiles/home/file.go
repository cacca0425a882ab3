package home

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// file is what a node's kernel has open: one for each of its open file
// descriptions (what dup and fork share).
type file struct {
	fh   uint64
	fd   int
	in   *inode
	refs atomic.Int32 // 1 for being open, 1 for each request that uses it

	mu sync.Mutex
	// The following is guarded by mu.
	dir   *dirStream // of a directory
	flock int        // carries the flock that moved here with the capsule; -1: fd does
	// What flock was done last, and by which process; no process: none.
	flockType, flockPID uint32
}

// ref takes a reference, unless the file is closed already.
func (f *file) ref() bool {
	for {
		n := f.refs.Load()
		if n <= 0 {
			return false
		}
		if f.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (f *file) unref() {
	if f.refs.Add(-1) == 0 {
		unix.Close(f.fd)
		if f.flock >= 0 {
			unix.Close(f.flock)
		}
	}
}

// newFile registers an open descriptor, which it owns from now on.
func (ss *session) newFile(in *inode, fd int) *file {
	f := &file{fd: fd, in: in, flock: -1}
	f.refs.Store(1)
	ss.mu.Lock()
	defer ss.mu.Unlock()
	f.fh = ss.nextFH
	ss.nextFH++
	ss.files[f.fh] = f
	in.files[f.fh] = f
	return f
}

// file finds an open file and takes a reference.
func (ss *session) file(fh uint64) (*file, error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	f := ss.files[fh]
	if f == nil || !f.ref() {
		return nil, unix.EBADF
	}
	return f, nil
}

// openFiles are all open files, in the order in which they were opened, each with a
// reference.
func (ss *session) openFiles() []*file {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	var all []*file
	for _, fh := range slices.Sorted(maps.Keys(ss.files)) {
		if f := ss.files[fh]; f.ref() {
			all = append(all, f)
		}
	}
	return all
}

// closeFile is RELEASE and RELEASEDIR.
func (ss *session) closeFile(fh uint64) {
	ss.mu.Lock()
	f := ss.files[fh]
	if f != nil {
		delete(ss.files, fh)
		delete(f.in.files, fh)
		if f.in.nlookup == 0 && len(f.in.files) == 0 && f.in.id > 1 {
			ss.drop(f.in)
		}
	}
	ss.mu.Unlock()
	if f != nil {
		f.unref()
	}
}

// unlockFile drops the locks that end with an open file. It does not wait.
func (ss *session) unlockFile(fh uint64) {
	f, err := ss.file(fh)
	if err != nil {
		return
	}
	defer f.unref()
	ss.mu.Lock()
	unsettled := ss.unsettled
	ss.mu.Unlock()
	f.mu.Lock()
	if f.flockPID != 0 {
		_ = unix.Flock(f.fd, unix.LOCK_UN) // cannot fail
		if f.flock >= 0 && !unsettled {
			_ = unix.Flock(f.flock, unix.LOCK_UN) // as above
		}
	}
	f.mu.Unlock()
	ss.srv.locks.released(ss, f)
}
