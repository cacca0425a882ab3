package home

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
)

// lockOwner is who holds fcntl locks on an inode: an owner of a node's kernel
// (all threads of a process, or one open file description).
type lockOwner struct {
	ss    *session
	key   inodeKey
	owner uint64
}

// held is what one lockOwner holds, on a descriptor of its own: two owners
// conflict at home as they would on one machine, and closing it drops all.
type held struct {
	key    inodeKey
	fd     int
	write  bool // fd is open for writing, which a write lock needs
	ranges rangeSet
	pid    uint32          // process that locked, in the node's numbers
	files  map[uint64]bool // the open files (fh) it locked through
	// copied says that fd shares its locks with that of an earlier placement,
	// which is held up.
	copied bool
}

// close ends what is held. Locks that an earlier placement has too are its own
// still, unless the job has let go of them, as only one that runs can: then it
// will not be taken back.
func (h *held) close(letGo bool) {
	if h.copied && letGo {
		_ = h.fcntl(lockRange{0, endOfFile, unlock}) // unlocking does not fail
	}
	unix.Close(h.fd)
}

// moved is a held that came with a capsule to a new node, whose kernel does
// not know of it and has another number for its owner. It becomes the
// property of the first owner that its process uses on the inode. The old node's
// session has one of its own, of the same open file description and so of the same
// locks, until it is settled.
type moved struct {
	ss *session
	h  *held
}

// lockTable is all fcntl locks of a server, and who waits for one.
type lockTable struct {
	mu sync.Mutex
	// The following is guarded by mu. No held is in both owners and moved.
	owners  map[lockOwner]*held
	moved   []moved
	waiting map[inodeKey]map[*waiter]bool
}

func (t *lockTable) init() {
	t.owners = make(map[lockOwner]*held)
	t.waiting = make(map[inodeKey]map[*waiter]bool)
}

// waiter is a lock request that waits.
type waiter struct {
	once   sync.Once
	cancel func()
	done   chan struct{} // closed by cancel
	freed  chan struct{} // has an element when something was unlocked here
}

func newWaiter() *waiter {
	w := &waiter{done: make(chan struct{}), freed: make(chan struct{}, 1)}
	w.cancel = func() { w.once.Do(func() { close(w.done) }) }
	return w
}

func (w *waiter) cancelled() bool {
	select {
	case <-w.done:
		return true
	default:
		return false
	}
}

// interrupt is INTERRUPT: only waiting for a lock can be given up. All else
// is soon done, and half a write is worse than a late signal.
func (ss *session) interrupt(unique uint64) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if w := ss.waits[unique]; w != nil {
		w.cancel()
	}
}

func (ss *session) opLock(r *request, in *wire.LkIn) (answer, error) {
	wait := ss.takeWaiter(r)
	f, err := ss.file(in.FH)
	if err != nil {
		ss.endWait(r.Unique)
		return answer{}, err
	}
	l := &lockRequest{ss: ss, f: f, in: *in, op: r.Opcode}
	if r.Opcode == wire.OpGetlk {
		defer f.unref()
		return l.get()
	}
	a, err := l.try(wait)
	if !errors.Is(err, unix.EAGAIN) || r.Opcode != wire.OpSetlkw {
		f.unref()
		ss.endWait(r.Unique)
		return a, err
	}
	// It may take days: neither a thread of the pool nor Sync waits for it.
	go func() {
		defer f.unref()
		a, err := l.wait(wait)
		ss.endWait(r.Unique)
		ss.reply(r.Unique, a, err)
	}()
	return answer{none: true}, nil
}

func (ss *session) takeWaiter(r *request) *waiter {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	return ss.waits[r.Unique]
}

func (ss *session) endWait(unique uint64) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	delete(ss.waits, unique)
}

// lockRequest is one GETLK, SETLK or SETLKW.
type lockRequest struct {
	ss *session
	f  *file
	in wire.LkIn
	op wire.Opcode
}

// Waiting for a lock polls, because a blocking fcntl cannot be given up in
// Go without killing its thread. What is unlocked through this server is seen
// at once; what a process at home unlocks, after pollMin to pollMax.
const (
	pollMin = 2 * time.Millisecond
	pollMax = 50 * time.Millisecond
)

func (l *lockRequest) wait(w *waiter) (answer, error) {
	t := &l.ss.srv.locks
	t.mu.Lock()
	if t.waiting[l.f.in.key] == nil {
		t.waiting[l.f.in.key] = make(map[*waiter]bool)
	}
	t.waiting[l.f.in.key][w] = true
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if delete(t.waiting[l.f.in.key], w); len(t.waiting[l.f.in.key]) == 0 {
			delete(t.waiting, l.f.in.key)
		}
	}()
	pause := pollMin
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		if a, err := l.try(w); !errors.Is(err, unix.EAGAIN) {
			return a, err
		}
		timer.Reset(pause)
		select {
		case <-w.done:
			return answer{}, unix.EINTR
		case <-w.freed:
		case <-timer.C:
			pause = min(pause*2, pollMax)
		}
	}
}

// wake lets those who wait on the inode try again. mu is held.
func (t *lockTable) wake(key inodeKey) {
	for w := range t.waiting[key] {
		select {
		case w.freed <- struct{}{}:
		default:
		}
	}
}

// try sets or clears the lock if that is possible now, else EAGAIN.
func (l *lockRequest) try(w *waiter) (answer, error) {
	if l.in.Flags&wire.LkFlock != 0 {
		return l.tryFlock(w)
	}
	t := &l.ss.srv.locks
	t.mu.Lock()
	defer t.mu.Unlock()
	if w != nil && w.cancelled() {
		// Checked under mu: a process that was killed has its INTERRUPT
		// before its FLUSH, after which it must get no lock any more.
		return answer{}, unix.EINTR
	}
	if l.in.Lk.Type > unlock || l.in.Lk.End < l.in.Lk.Start || l.in.Lk.End > endOfFile {
		return answer{}, unix.EINVAL
	}
	own := lockOwner{l.ss, l.f.in.key, l.in.Owner}
	h := t.find(own, l.in.Lk.PID)
	if h == nil {
		if l.in.Lk.Type == unlock {
			return answer{}, nil
		}
		fd, write, err := openForLock(l.f.fd, l.in.Lk.Type)
		if err != nil {
			return answer{}, err
		}
		h = &held{key: own.key, fd: fd, write: write, files: make(map[uint64]bool)}
		t.owners[own] = h
	}
	if l.in.Lk.Type == writeLock && !h.write {
		if err := h.upgrade(l.f.fd); err != nil {
			return answer{}, err
		}
	}
	r := lockRange{l.in.Lk.Start, l.in.Lk.End, l.in.Lk.Type}
	if err := h.fcntl(r); err != nil {
		if len(h.ranges) == 0 {
			t.drop(own)
		}
		return answer{}, err
	}
	h.ranges = h.ranges.set(r)
	if r.typ == unlock {
		t.wake(own.key)
		if len(h.ranges) == 0 {
			t.drop(own)
		}
		return answer{}, nil
	}
	h.pid = l.in.Lk.PID
	h.files[l.f.fh] = true
	return l.granted(), nil
}

// granted answers a lock that is held now: as with NFS, whoever gets a lock
// sees what was written before it was given up.
func (l *lockRequest) granted() answer {
	if l.ss.refresh(l.f.in, l.f.fd) {
		return answer{flags: wire.FlagAfterNotify}
	}
	return answer{}
}

func openForLock(of int, typ uint32) (fd int, write bool, err error) {
	// Only as a write lock needs it: a program that is open for writing
	// cannot be executed, and one that is executed cannot be so opened.
	how := unix.O_RDONLY
	if fl, e := unix.FcntlInt(uintptr(of), unix.F_GETFL, 0); typ == writeLock || e == nil && fl&unix.O_ACCMODE != unix.O_RDONLY {
		how = unix.O_RDWR
	}
	fd, err = unix.Open(procFD(of), how|unix.O_CLOEXEC, 0)
	return fd, how == unix.O_RDWR, err
}

// fcntl sets r on the held descriptor without waiting.
func (h *held) fcntl(r lockRange) error {
	lk := unix.Flock_t{Type: int16(r.typ), Start: int64(r.start)}
	if r.end != endOfFile {
		lk.Len = int64(r.end - r.start + 1)
	}
	err := unix.FcntlFlock(uintptr(h.fd), unix.F_OFD_SETLK, &lk)
	if err == unix.EACCES {
		err = unix.EAGAIN
	}
	return err
}

// upgrade gives h a descriptor that can hold write locks. The read locks on
// the old one are set on the new one while both hold them, so nobody gets in
// between.
func (h *held) upgrade(of int) error {
	fd, _, err := openForLock(of, writeLock)
	if err != nil {
		return err
	}
	old := *h
	h.fd = fd
	for _, r := range h.ranges {
		if err := h.fcntl(r); err != nil {
			h.fd = old.fd
			unix.Close(fd)
			return err
		}
	}
	old.close(true)
	h.write, h.copied = true, false
	return nil
}

// find gives what an owner holds; pid is its process, 0 if that is not known.
// What came with its process from another node becomes its own. mu is held.
func (t *lockTable) find(own lockOwner, pid uint32) *held {
	h := t.owners[own]
	if h != nil || pid == 0 {
		return h
	}
	for i, m := range t.moved {
		if m.ss == own.ss && m.h.key == own.key && m.h.pid == pid {
			t.moved = append(t.moved[:i:i], t.moved[i+1:]...)
			m.h.files = make(map[uint64]bool)
			t.owners[own] = m.h
			return m.h
		}
	}
	return nil
}

// drop lets go of what an owner holds. mu is held.
func (t *lockTable) drop(own lockOwner) { t.end(own, true) }

// end ends what an owner holds; letGo as in held.close. mu is held.
func (t *lockTable) end(own lockOwner, letGo bool) {
	h := t.owners[own]
	if h == nil {
		return
	}
	delete(t.owners, own)
	h.close(letGo)
	t.wake(own.key)
}

func (l *lockRequest) get() (answer, error) {
	t := &l.ss.srv.locks
	t.mu.Lock()
	defer t.mu.Unlock()
	if l.in.Lk.Type >= unlock || l.in.Lk.End < l.in.Lk.Start || l.in.Lk.End > endOfFile {
		return answer{}, unix.EINVAL
	}
	fd := l.f.fd // holds no lock itself, so it conflicts with all others
	if h := t.find(lockOwner{l.ss, l.f.in.key, l.in.Owner}, l.in.Lk.PID); h != nil {
		fd = h.fd
	}
	lk := unix.Flock_t{Type: int16(l.in.Lk.Type), Start: int64(l.in.Lk.Start)}
	if l.in.Lk.End != endOfFile {
		lk.Len = int64(l.in.Lk.End - l.in.Lk.Start + 1)
	}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lk); err != nil {
		return answer{}, err
	}
	out := wire.FileLock{Type: uint32(lk.Type), Start: uint64(lk.Start), End: endOfFile}
	if lk.Len != 0 {
		out.End = out.Start + uint64(lk.Len) - 1
	}
	if out.Type != unlock {
		out.PID = t.holder(l.ss, l.f.in.key, out)
	}
	return answer{body: wire.Bytes(&out)}, nil
}

// holder is the process on the same node that holds a lock, or 0: numbers of
// processes elsewhere would name somebody else there. mu is held.
func (t *lockTable) holder(ss *session, key inodeKey, lk wire.FileLock) uint32 {
	for own, h := range t.owners {
		if own.ss != ss || own.key != key {
			continue
		}
		for _, r := range h.ranges {
			if r.start <= lk.End && lk.Start <= r.end && r.typ == lk.Type {
				return h.pid
			}
		}
	}
	return 0
}

// tryFlock is flock(2), which belongs to the open file description and so to
// our descriptor of it.
func (l *lockRequest) tryFlock(w *waiter) (answer, error) {
	how := map[uint32]int{readLock: unix.LOCK_SH, writeLock: unix.LOCK_EX, unlock: unix.LOCK_UN}
	op, ok := how[l.in.Lk.Type]
	if !ok {
		return answer{}, unix.EINVAL
	}
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	if w != nil && w.cancelled() {
		return answer{}, unix.EINTR
	}
	fd := l.f.fd
	if l.f.flock >= 0 {
		fd = l.f.flock
	}
	if err := unix.Flock(fd, op|unix.LOCK_NB); err != nil {
		return answer{}, err
	}
	l.f.flockPID, l.f.flockType = l.in.Lk.PID, l.in.Lk.Type
	if op == unix.LOCK_UN {
		t := &l.ss.srv.locks
		t.mu.Lock()
		t.wake(l.f.in.key)
		t.mu.Unlock()
		return answer{}, nil
	}
	return l.granted(), nil
}

// opFlush is a process's close of a descriptor: it drops all that it holds on
// the inode (fcntl(2), and the reason why people hate it).
func (ss *session) opFlush(_ *request, in *wire.FlushIn) (answer, error) {
	f, err := ss.file(in.FH)
	if err != nil {
		return answer{}, err
	}
	defer f.unref()
	t := &ss.srv.locks
	t.mu.Lock()
	defer t.mu.Unlock()
	own := lockOwner{ss, f.in.key, in.LockOwner}
	t.find(own, in.TGID)
	t.drop(own)
	return answer{}, nil
}

// released ends what was locked through an open file by an owner that is no
// process: OFD locks, for which no FLUSH comes.
func (t *lockTable) released(ss *session, f *file) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for own, h := range t.owners {
		if own.ss == ss && own.key == f.in.key && h.files[f.fh] {
			t.drop(own)
		}
	}
	t.wake(f.in.key) // its flock, if it had one, ends with the descriptor
}

// dropSession ends all locks of a session.
func (t *lockTable) dropSession(ss *session) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for own := range t.owners {
		if own.ss == ss {
			t.end(own, false)
		}
	}
	t.dropMovedLocked(func(m moved) bool { return m.ss == ss })
}

// dropMoved ends what came with a process that has ended before it used it.
func (t *lockTable) dropMoved(ss *session, pid uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dropMovedLocked(func(m moved) bool { return m.ss == ss && m.h.pid == pid })
}

func (t *lockTable) dropMovedLocked(which func(moved) bool) {
	var kept []moved
	for _, m := range t.moved {
		if !which(m) {
			kept = append(kept, m)
			continue
		}
		m.h.close(false) // it may be of a copy that never ran
		t.wake(m.h.key)
	}
	t.moved = kept
}

// copyLocks gives what the old session holds to the new one too, without letting
// go of anything: descriptors of the same open file descriptions, which the locks
// belong to. They are gone when neither has them any more. The files that the
// restore has opened in the new session get the flocks: for each, one of the same
// inode and access mode, in the order in which both were opened.
func (s *Server) copyLocks(old, now *session, pids map[uint32]uint32) {
	t := &s.locks
	t.mu.Lock()
	var named []uint32
	hand := func(h *held) {
		pid, ok := pids[h.pid]
		if !ok {
			return // dropped with its session
		}
		fd, err := unix.FcntlInt(uintptr(h.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			s.log.Error("home files: a lock does not move with its job", "capsule", old.cap.ID, "file", nameOf(h.fd), "cause", err)
			return
		}
		t.moved = append(t.moved, moved{now, &held{key: h.key, fd: fd, write: h.write, ranges: slices.Clone(h.ranges), pid: pid, copied: true}})
		named = append(named, pid)
	}
	for own, h := range t.owners {
		if own.ss == old {
			hand(h)
		}
	}
	for _, m := range t.moved { // moved once more before their processes have used them
		if m.ss == old {
			hand(m.h)
		}
	}
	t.mu.Unlock()
	if len(named) > 0 {
		body := binary.LittleEndian.AppendUint32(nil, wire.PolicyForwardFlush)
		for _, pid := range named {
			body = binary.LittleEndian.AppendUint32(body, pid)
		}
		_ = now.link.Send(wire.KindPolicy, 0, body, nil) // a closed link has nobody to tell
	}
	copyFlocks(old, now, pids)
}

func copyFlocks(old, now *session, pids map[uint32]uint32) {
	access := func(f *file) int {
		fl, _ := unix.FcntlInt(uintptr(f.fd), unix.F_GETFL, 0) // 0 on failure: any will do
		return fl & unix.O_ACCMODE
	}
	free := now.openFiles()
	for _, f := range free {
		defer f.unref()
	}
	for _, f := range old.openFiles() {
		defer f.unref()
		f.mu.Lock()
		fd := f.fd
		if f.flock >= 0 {
			fd = f.flock
		}
		typ, pid := f.flockType, f.flockPID
		f.mu.Unlock()
		if pid == 0 || typ == unlock {
			continue
		}
		i := slices.IndexFunc(free, func(g *file) bool { return g.in.key == f.in.key && access(g) == access(f) })
		if i < 0 {
			continue
		}
		keep, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			old.srv.log.Error("home files: a lock does not move with its job", "capsule", old.cap.ID, "file", nameOf(fd), "cause", err)
			continue
		}
		if moved, ok := pids[pid]; ok { // who locked may have ended, and left the file to its children
			pid = moved
		}
		g := free[i]
		g.mu.Lock()
		g.flock, g.flockType, g.flockPID = keep, typ, pid
		g.mu.Unlock()
		free = slices.Delete(free, i, i+1)
	}
}
