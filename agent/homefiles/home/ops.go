package home

import (
	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
)

// op does one request. The body and what is cut from it live as long as r.
func (ss *session) op(w *worker, r *request) (answer, error) {
	switch r.Opcode {
	// These use what is open already and need no identity.
	case wire.OpInit:
		return ss.opInit(r)
	case wire.OpRead:
		return args(r, ss.opRead)
	case wire.OpRelease, wire.OpReleasedir:
		return args(r, ss.opRelease)
	case wire.OpFsync, wire.OpFsyncdir:
		return args(r, ss.opFsync)
	case wire.OpLseek:
		return args(r, ss.opLseek)
	case wire.OpSyncfs, wire.OpDestroy:
		return answer{}, nil
	case wire.OpGetlk, wire.OpSetlk, wire.OpSetlkw:
		w.root() // to open a second descriptor of the file
		return withReq(r, ss.opLock)
	}
	in, err := ss.inode(r.NodeID)
	if err != nil {
		return answer{}, err
	}
	me, err := ss.cap.caller(r.UID, r.GID)
	if err != nil {
		return answer{}, err
	}
	c := &call{ss: ss, w: w, r: r, me: me, in: in}
	switch r.Opcode {
	case wire.OpLookup:
		return c.lookup()
	case wire.OpGetattr:
		return args(r, c.getattr)
	case wire.OpSetattr:
		return args(r, c.setattr)
	case wire.OpAccess:
		return args(r, c.access)
	case wire.OpReadlink:
		return c.readlink()
	case wire.OpStatfs:
		return c.statfs()
	case wire.OpMkdir:
		return argsRest(r, c.mkdir)
	case wire.OpMknod:
		return argsRest(r, c.mknod)
	case wire.OpSymlink:
		return c.symlink()
	case wire.OpLink:
		return argsRest(r, c.link)
	case wire.OpUnlink:
		return c.remove(0)
	case wire.OpRmdir:
		return c.remove(unix.AT_REMOVEDIR)
	case wire.OpRename:
		return argsRest(r, func(in *wire.RenameIn, rest []byte) (answer, error) {
			return c.rename(in.NewDir, 0, rest)
		})
	case wire.OpRename2:
		return argsRest(r, func(in *wire.Rename2In, rest []byte) (answer, error) {
			return c.rename(in.NewDir, in.Flags, rest)
		})
	case wire.OpCreate:
		return argsRest(r, c.create)
	case wire.OpTmpfile:
		return argsRest(r, c.tmpfile)
	case wire.OpOpen:
		return args(r, c.open)
	case wire.OpOpendir:
		return c.opendir()
	case wire.OpReaddir:
		return args(r, func(in *wire.ReadIn) (answer, error) { return c.readdir(in, false) })
	case wire.OpReaddirplus:
		return args(r, func(in *wire.ReadIn) (answer, error) { return c.readdir(in, true) })
	case wire.OpWrite:
		return argsRest(r, c.write)
	case wire.OpFallocate:
		return args(r, c.fallocate)
	case wire.OpCopyFileRange:
		return args(r, c.copyFileRange)
	case wire.OpGetxattr:
		return argsRest(r, c.getxattr)
	case wire.OpListxattr:
		return args(r, c.listxattr)
	case wire.OpSetxattr:
		return argsRest(r, c.setxattr)
	case wire.OpRemovexattr:
		return c.removexattr()
	}
	return answer{}, unix.ENOSYS
}

// call is a request on an inode by a caller.
type call struct {
	ss *session
	w  *worker
	r  *request
	me who
	in *inode
}

// place opens the call's inode and makes the thread act as the caller.
func (c *call) place() (place, error) { return c.placeOf(c.in) }

func (c *call) placeOf(in *inode) (place, error) {
	p, err := c.ss.open(c.w, in)
	if err != nil {
		return place{}, err
	}
	if err := c.w.become(c.me); err != nil {
		p.done()
		return place{}, err
	}
	return p, nil
}

// The following cut a request's structure from its body; a short body is
// EINVAL.

func args[T any](r *request, f func(*T) (answer, error)) (answer, error) {
	in, _, ok := wire.As[T](r.body)
	if !ok {
		return answer{}, unix.EINVAL
	}
	return f(in)
}

func withReq[T any](r *request, f func(*request, *T) (answer, error)) (answer, error) {
	in, _, ok := wire.As[T](r.body)
	if !ok {
		return answer{}, unix.EINVAL
	}
	return f(r, in)
}

func argsRest[T any](r *request, f func(*T, []byte) (answer, error)) (answer, error) {
	in, rest, ok := wire.As[T](r.body)
	if !ok {
		return answer{}, unix.EINVAL
	}
	return f(in, rest)
}

// want is what the home asks a node's kernel to do. DONT_MASK: the umask is
// applied here, where default ACLs are known. HANDLE_KILLPRIV_V2: set-id bits
// are dropped by the home's kernel in the same step as the write, and the node
// does not ask for security.capability before each one.
const want = wire.InitAsyncRead | wire.InitPosixLocks | wire.InitAtomicOTrunc | wire.InitBigWrites |
	wire.InitDontMask | wire.InitFlockLocks | wire.InitAutoInvalData | wire.InitDoReaddirplus |
	wire.InitReaddirplusAuto | wire.InitAsyncDIO | wire.InitParallelDirops | wire.InitMaxPages |
	wire.InitCacheSymlinks | wire.InitHandleKillprivV2 | wire.InitExt

// How many background requests (read-ahead, direct I/O) a node's kernel may
// have open, and from where on it holds readers back.
const (
	maxBackground = 64
	congestion    = 48
)

func (ss *session) opInit(r *request) (answer, error) {
	in, rest, ok := wire.As[wire.InitIn](r.body)
	if !ok || in.Major != wire.FuseMajor {
		return answer{}, unix.EPROTO
	}
	offered := uint64(in.Flags)
	if ext, _, ok := wire.As[wire.InitExtIn](rest); ok && offered&wire.InitExt != 0 {
		offered |= uint64(ext.Flags2) << 32
	}
	flags := want & offered
	out := wire.InitOut{
		Major: wire.FuseMajor, Minor: min(in.Minor, wire.FuseMinor),
		MaxReadahead: wire.MaxWrite, Flags: uint32(flags), Flags2: uint32(flags >> 32),
		MaxBackground: maxBackground, Congestion: congestion,
		MaxWrite: wire.MaxWrite, TimeGran: 1, MaxPages: wire.MaxWrite / 4096,
	}
	return answer{body: wire.Bytes(&out)}, nil
}
