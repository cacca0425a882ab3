package home

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
)

// inodeKey names an inode on this machine: the mount through which it was
// reached and its file handle there. Two bind mounts of one file are two keys,
// because what is mounted below differs.
type inodeKey struct {
	mount  int
	handle string // type and bytes; "" with fd: no file handles there
	ino    uint64 // only without a handle
}

// mount is a mount that sessions have seen, with the descriptor that
// open_by_handle_at needs. It keeps the file system from being unmounted, so
// it goes with the last inode of it.
type mount struct {
	id   int
	fd   int
	dev  uint64
	fold uint64 // xored into inode numbers: 0 for the first device
	refs int    // guarded by Server.mu
}

// inode is what a session's kernel knows by a node id.
type inode struct {
	id  uint64
	key inodeKey
	m   *mount // nil: path is used
	// path is an O_PATH descriptor, for file systems without handles; -1
	// otherwise.
	path int

	// The following is guarded by session.mu.
	nlookup uint64
	files   map[uint64]*file // open files of it, by fh
	told    stamp            // the attributes that the node was last told
}

// stamp is what tells one content of a file from another.
type stamp struct {
	size         int64
	mtime, ctime unix.Timespec
}

func stampOf(st *unix.Stat_t) stamp { return stamp{st.Size, st.Mtim, st.Ctim} }

// attrTTL is how long a node may use attributes and names without asking: the
// bound on how late a change at home is seen there when nobody tells it.
const attrTTL = time.Second

// procFD is the magic link to an open descriptor: opening it opens the same
// inode again, checked as whoever opens it.
func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// identify finds the key of what fd is, and a reference to its mount. m is nil
// when the file system has no handles. Server.mu is held.
func (s *Server) identify(fd int) (inodeKey, *mount, unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return inodeKey{}, nil, st, err
	}
	h, id, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		if err == unix.EOPNOTSUPP || err == unix.EOVERFLOW {
			return inodeKey{mount: int(st.Dev), ino: st.Ino}, nil, st, nil
		}
		return inodeKey{}, nil, st, err
	}
	key := inodeKey{mount: id, handle: string([]byte{byte(h.Type()), byte(h.Type() >> 8), byte(h.Type() >> 16), byte(h.Type() >> 24)}) + string(h.Bytes())}
	if m := s.mounts[id]; m != nil {
		m.refs++
		return key, m, st, nil
	}
	// A mount not seen before: fd is its root, a directory or a file that
	// was bound there. open_by_handle_at wants a descriptor that is not
	// O_PATH, and a device must not be opened.
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFDIR && t != unix.S_IFREG {
		return inodeKey{mount: int(st.Dev), ino: st.Ino}, nil, st, nil
	}
	mfd, err := unix.Open(procFD(fd), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == nil {
		// Some file systems give handles that they do not take back.
		var probe int
		if probe, err = unix.OpenByHandleAt(mfd, h, unix.O_PATH|unix.O_CLOEXEC); err == nil {
			unix.Close(probe)
		} else {
			unix.Close(mfd)
		}
	}
	if err != nil {
		return inodeKey{mount: int(st.Dev), ino: st.Ino}, nil, st, nil
	}
	m := &mount{id: id, fd: mfd, dev: st.Dev, fold: s.foldOf(st.Dev), refs: 1}
	s.mounts[id] = m
	if s.watch != nil {
		s.watch.add(mfd)
	}
	return key, m, st, nil
}

// foldOf is what makes inode numbers of different devices differ in the one
// device that the node sees. Server.mu is held.
func (s *Server) foldOf(dev uint64) uint64 {
	f, ok := s.devices[dev]
	if !ok {
		f = uint64(len(s.devices)) << 48
		s.devices[dev] = f
	}
	return f
}

func (s *Server) unrefMount(m *mount) {
	if m == nil {
		return
	}
	if m.refs--; m.refs == 0 {
		delete(s.mounts, m.id)
		unix.Close(m.fd)
	}
}

func handleOf(key inodeKey) unix.FileHandle {
	h := key.handle
	typ := int32(uint32(h[0]) | uint32(h[1])<<8 | uint32(h[2])<<16 | uint32(h[3])<<24)
	return unix.NewFileHandle(typ, []byte(h[4:]))
}

// place is a descriptor of an inode for the length of one request.
type place struct {
	fd    int
	close bool
	f     *file // if fd is that of an open file: a reference to it
}

func (p place) done() {
	if p.f != nil {
		p.f.unref()
	} else if p.close {
		unix.Close(p.fd)
	}
}

// open gives an O_PATH descriptor of an inode. The worker is root afterwards.
func (ss *session) open(w *worker, in *inode) (place, error) {
	if in.m == nil {
		return place{fd: in.path}, nil
	}
	w.root()
	fd, err := unix.OpenByHandleAt(in.m.fd, handleOf(in.key), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err == nil {
		return place{fd: fd, close: true}, nil
	}
	// A deleted file: not each file system finds it by its handle, but
	// while it is open here we need no handle.
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for _, f := range in.files {
		if f.ref() {
			return place{fd: f.fd, f: f}, nil
		}
	}
	return place{}, err
}

// inode finds a node id.
func (ss *session) inode(id uint64) (*inode, error) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if in := ss.inodes[id]; in != nil {
		return in, nil
	}
	return nil, unix.ESTALE
}

// learn gives the node id of what fd is, counts one lookup of it, and fills in
// the reply. fd stays the caller's.
func (ss *session) learn(w *worker, fd int) (wire.EntryOut, *inode, error) {
	w.root()
	ss.srv.mu.Lock()
	key, m, st, err := ss.srv.identify(fd)
	ss.srv.mu.Unlock()
	if err != nil {
		return wire.EntryOut{}, nil, err
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	in := ss.byKey[key]
	switch {
	case in != nil:
		if m != nil {
			ss.srv.mu.Lock()
			ss.srv.unrefMount(m)
			ss.srv.mu.Unlock()
		}
	default:
		in = &inode{id: ss.nextID, key: key, m: m, path: -1, files: make(map[uint64]*file)}
		if m == nil {
			if in.path, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
				return wire.EntryOut{}, nil, err
			}
		}
		ss.nextID++
		ss.inodes[in.id], ss.byKey[key] = in, in
	}
	in.nlookup++
	in.told = stampOf(&st)
	return wire.EntryOut{
		NodeID: in.id, EntryValid: 1, AttrValid: 1,
		Attr: ss.attr(in, &st),
	}, in, nil
}

// forget takes n lookups back.
func (ss *session) forget(id, n uint64) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	in := ss.inodes[id]
	if in == nil || id == wire.RootID {
		return
	}
	if in.nlookup -= min(n, in.nlookup); in.nlookup == 0 && len(in.files) == 0 {
		ss.drop(in)
	}
}

// drop removes an inode. mu is held.
func (ss *session) drop(in *inode) {
	delete(ss.inodes, in.id)
	delete(ss.byKey, in.key)
	if in.path >= 0 {
		unix.Close(in.path)
	}
	ss.srv.mu.Lock()
	ss.srv.unrefMount(in.m)
	ss.srv.mu.Unlock()
}

// attr is st as FUSE tells it.
func (ss *session) attr(in *inode, st *unix.Stat_t) wire.Attr {
	fold := uint64(0)
	if in.m != nil {
		fold = in.m.fold
	}
	if in.m == nil {
		ss.srv.mu.Lock()
		fold = ss.srv.foldOf(st.Dev)
		ss.srv.mu.Unlock()
	}
	rdev := uint64(st.Rdev)
	major, minor := unix.Major(rdev), unix.Minor(rdev)
	return wire.Attr{
		Ino: st.Ino ^ fold, Size: uint64(st.Size), Blocks: uint64(st.Blocks),
		Atime: uint64(st.Atim.Sec), AtimeNsec: uint32(st.Atim.Nsec),
		Mtime: uint64(st.Mtim.Sec), MtimeNsec: uint32(st.Mtim.Nsec),
		Ctime: uint64(st.Ctim.Sec), CtimeNsec: uint32(st.Ctim.Nsec),
		Mode: st.Mode, Nlink: uint32(st.Nlink), UID: st.Uid, GID: st.Gid,
		Rdev:    minor&0xff | major<<8 | (minor&^0xff)<<12, // new_encode_dev, include/linux/kdev_t.h
		Blksize: uint32(st.Blksize),
	}
}

// tell notes that the node is told these attributes of in.
func (ss *session) tell(in *inode, st *unix.Stat_t) {
	ss.mu.Lock()
	in.told = stampOf(st)
	ss.mu.Unlock()
}

// refresh tells the node to forget what it has cached of in if the file has
// changed since the node was last told: close-to-open for opens, and the same
// for a lock that is granted. It reports whether it did.
func (ss *session) refresh(in *inode, fd int) bool {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return false
	}
	ss.mu.Lock()
	changed := in.told != stampOf(&st)
	in.told = stampOf(&st)
	ss.mu.Unlock()
	if changed {
		ss.notify(wire.NotifyInode(in.id))
	}
	return changed
}

// validName refuses what the kernel resolves itself and never sends: with it
// a node could leave the root.
func validName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return fmt.Errorf("%w: name %q", unix.EINVAL, name)
	}
	return nil
}
