// Package home serves a home's file tree to the capsules that run elsewhere.
// It is the other end of package forward: it answers the FUSE requests of a
// node's kernel, one session for each mount.
//
// How it keeps POSIX semantics, and safe:
//   - Inodes are file handles (name_to_handle_at), so that renames, hard links
//     and deleted files behave; descriptors are held for open files only. File
//     systems without handles cost one descriptor for each inode in use.
//   - Each request is done on a thread that has the caller's file system
//     identity and nothing else: the home's kernel checks permissions, quota
//     and set-id bits itself. A node can act only as the users of capsules
//     that it holds, whatever its requests say; its root (CRIU, for one) acts
//     as the capsule's owner.
//   - A capsule is served in one epoch. Prepare admits the next one beside it,
//     for a restore; Commit makes it the only one. The one before is held up with
//     its open files until Settle ends it, or Reclaim takes it back because
//     the next one never ran.
//   - fcntl locks are open file description locks here, one descriptor for
//     each (inode, lock owner), so home processes see them and they see those
//     of home processes. Commit carries them over to the new epoch.
//
// Limits: no POSIX ACL in the node's permission check (the home refuses in
// the end), no ioctl (chattr), no lease and no poll; an inode's number is
// folded with its device's when the tree spans several file systems. A
// process that waits for a lock and is frozen sees EINTR.
//
// The caller journals epochs, authenticates nodes (TLS) and should run a
// Server in a process that outlives the agent's restart: open files and locks
// live in it.
package home

import (
	"log/slog"
	"sync"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// Cred is a user as whom a capsule may act.
type Cred struct {
	UID, GID uint32
	// Groups are the supplementary groups. A request's gid must be GID or
	// one of these.
	Groups []uint32
}

// Capsule is what the home serves to one job.
type Capsule struct {
	ID string
	// Root is the directory that the job sees as /; what is mounted below
	// it is seen too. "" means "/".
	Root string
	// Node may connect for it (now, in Epoch).
	Node api.NodeID
	// Epoch is the capsule's current one, from 1.
	Epoch uint64
	// Users are all as whom it may act; the first is its owner. A request
	// of a uid that is not among them is refused, but for 0, which acts as
	// the owner.
	Users []Cred
}

// Config is how a Server works. The zero value is usable.
type Config struct {
	// Log gets what happens to sessions; nil is silent.
	Log *slog.Logger
	// NoWatch keeps the server from watching file systems by fanotify; what
	// changes at home is then seen after at most a second.
	NoWatch bool
}

// Server serves capsules. It is safe for concurrent use. Make it with New.
type Server struct {
	log   *slog.Logger
	pool  *pool
	watch *watcher // nil without fanotify

	mu sync.Mutex
	// The following is guarded by mu.
	capsules map[string]*capsule
	mounts   map[int]*mount // by mount id; those with refs > 0
	devices  map[uint64]uint64
	closed   bool

	locks lockTable
}

// capsule is a Capsule that is served.
type capsule struct {
	Capsule
	users map[uint32]*Cred
	root  inodeKey
	rootM *mount
	// turn is held by the one Commit, Reclaim or Settle that is under way: who
	// asks again, having waited too long for the first, gets its outcome.
	turn sync.Mutex
	// The following is guarded by Server.mu.
	next *placement // admitted by Prepare
	held *heldOwner // held up by Commit
	// sessions has at most one for each epoch.
	sessions map[uint64]*session
	// reclaimed maps the epoch that a forwarder says to the one in which its
	// session was taken back.
	reclaimed map[uint64]uint64
}

type placement struct {
	epoch uint64
	node  api.NodeID
}

// New makes a Server. It must run as root (at least with CAP_DAC_READ_SEARCH,
// DAC_OVERRIDE, CHOWN, FOWNER, FSETID, SETUID and SETGID).
func New(cfg Config) (*Server, error) {
	s := &Server{
		log:      cfg.Log,
		capsules: make(map[string]*capsule),
		mounts:   make(map[int]*mount),
		devices:  make(map[uint64]uint64),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	p, err := newPool()
	if err != nil {
		return nil, err
	}
	s.pool = p
	s.locks.init()
	if !cfg.NoWatch {
		if s.watch, err = newWatcher(s); err != nil {
			s.log.Info("home files: changes at home are seen by time only", "cause", err)
		}
	}
	return s, nil
}

// Add begins to serve a capsule.
func (s *Server) Add(c Capsule) error {
	const op = "serve home files of capsule"
	switch {
	case c.ID == "":
		return fault.New(fault.Usage, op, c.ID, "no name", "")
	case c.Epoch == 0:
		return fault.New(fault.Usage, op, c.ID, "epoch 0; epochs count from 1", "")
	case len(c.Users) == 0:
		return fault.New(fault.Usage, op, c.ID, "no user as whom it may act", "")
	}
	if c.Root == "" {
		c.Root = "/"
	}
	fd, err := unix.Open(c.Root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fault.New(fault.NotFound, op, c.ID, "open its root "+c.Root+": "+err.Error(), "")
	}
	defer unix.Close(fd)
	cp := &capsule{Capsule: c, users: make(map[uint32]*Cred), sessions: make(map[uint64]*session), reclaimed: make(map[uint64]uint64)}
	for i := range c.Users {
		cp.users[c.Users[i].UID] = &c.Users[i]
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fault.New(fault.Unavailable, op, c.ID, "the server is closed", "")
	}
	if s.capsules[c.ID] != nil {
		return fault.New(fault.Refused, op, c.ID, "it is served already", "")
	}
	key, m, _, err := s.identify(fd)
	if err != nil {
		return fault.New(fault.Environment, op, c.ID, err, "")
	}
	if m == nil {
		return fault.New(fault.Environment, op, c.ID, c.Root+" is on a file system without file handles", "choose a root on an ordinary one; below it others may be mounted")
	}
	cp.root, cp.rootM = key, m // identify's reference to m is the capsule's
	s.capsules[c.ID] = cp
	return nil
}

// Remove ends a capsule: its sessions are fenced, its files closed and its
// locks dropped.
func (s *Server) Remove(id string) {
	s.mu.Lock()
	c := s.capsules[id]
	delete(s.capsules, id)
	var ended []*session
	if c != nil {
		for _, ss := range c.sessions {
			ended = append(ended, ss)
		}
		if c.held != nil && c.held.session != nil {
			ended = append(ended, c.held.session)
		}
		s.unrefMount(c.rootM)
	}
	s.mu.Unlock()
	for _, ss := range ended {
		ss.end()
	}
}

// Close removes all capsules and ends the server's threads.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	var ids []string
	for id := range s.capsules {
		ids = append(ids, id)
	}
	s.mu.Unlock()
	for _, id := range ids {
		s.Remove(id)
	}
	if s.watch != nil {
		s.watch.close()
	}
	s.pool.close()
}
