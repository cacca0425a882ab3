package wire

import (
	"bytes"
	"fmt"
	"unsafe"
)

// The FUSE protocol as of version 7.38 (Linux 6.2), from the kernel's
// include/uapi/linux/fuse.h. A newer kernel speaks the older minor version of
// the INIT reply; both sides only use what is named here.
const (
	FuseMajor = 7
	FuseMinor = 38
	// RootID is the node id of a mount's root.
	RootID = 1
	// MaxWrite is the most data in one READ or WRITE. Over a link of 1 ms it
	// makes writes 1.75 times as fast as 128 KiB does; 4 MiB is no better.
	MaxWrite = 1 << 20
)

// Opcode is a FUSE request's operation.
type Opcode uint32

// The operations that the handler knows; it answers any other with ENOSYS.
const (
	OpLookup        Opcode = 1
	OpForget        Opcode = 2
	OpGetattr       Opcode = 3
	OpSetattr       Opcode = 4
	OpReadlink      Opcode = 5
	OpSymlink       Opcode = 6
	OpMknod         Opcode = 8
	OpMkdir         Opcode = 9
	OpUnlink        Opcode = 10
	OpRmdir         Opcode = 11
	OpRename        Opcode = 12
	OpLink          Opcode = 13
	OpOpen          Opcode = 14
	OpRead          Opcode = 15
	OpWrite         Opcode = 16
	OpStatfs        Opcode = 17
	OpRelease       Opcode = 18
	OpFsync         Opcode = 20
	OpSetxattr      Opcode = 21
	OpGetxattr      Opcode = 22
	OpListxattr     Opcode = 23
	OpRemovexattr   Opcode = 24
	OpFlush         Opcode = 25
	OpInit          Opcode = 26
	OpOpendir       Opcode = 27
	OpReaddir       Opcode = 28
	OpReleasedir    Opcode = 29
	OpFsyncdir      Opcode = 30
	OpGetlk         Opcode = 31
	OpSetlk         Opcode = 32
	OpSetlkw        Opcode = 33
	OpAccess        Opcode = 34
	OpCreate        Opcode = 35
	OpInterrupt     Opcode = 36
	OpDestroy       Opcode = 38
	OpIoctl         Opcode = 39
	OpPoll          Opcode = 40
	OpBatchForget   Opcode = 42
	OpFallocate     Opcode = 43
	OpReaddirplus   Opcode = 44
	OpRename2       Opcode = 45
	OpLseek         Opcode = 46
	OpCopyFileRange Opcode = 47
	OpSyncfs        Opcode = 50
	OpTmpfile       Opcode = 51
)

// Notification codes.
const (
	NotifyInvalInode int32 = 2
	NotifyInvalEntry int32 = 3
)

// Flags of INIT (the second word shifted up by 32).
const (
	InitAsyncRead        uint64 = 1 << 0
	InitPosixLocks       uint64 = 1 << 1
	InitAtomicOTrunc     uint64 = 1 << 3
	InitBigWrites        uint64 = 1 << 5
	InitDontMask         uint64 = 1 << 6
	InitFlockLocks       uint64 = 1 << 10
	InitAutoInvalData    uint64 = 1 << 12
	InitDoReaddirplus    uint64 = 1 << 13
	InitReaddirplusAuto  uint64 = 1 << 14
	InitAsyncDIO         uint64 = 1 << 15
	InitParallelDirops   uint64 = 1 << 18
	InitMaxPages         uint64 = 1 << 22
	InitCacheSymlinks    uint64 = 1 << 23
	InitHandleKillprivV2 uint64 = 1 << 28
	InitExt              uint64 = 1 << 30
	InitPassthrough      uint64 = 1 << 37
	InitOverIOUring      uint64 = 1 << 41
)

// Flags of single requests and replies.
const (
	FattrMode      uint32 = 1 << 0
	FattrUID       uint32 = 1 << 1
	FattrGID       uint32 = 1 << 2
	FattrSize      uint32 = 1 << 3
	FattrAtime     uint32 = 1 << 4
	FattrMtime     uint32 = 1 << 5
	FattrFH        uint32 = 1 << 6
	FattrAtimeNow  uint32 = 1 << 7
	FattrMtimeNow  uint32 = 1 << 8
	FattrKillSUID  uint32 = 1 << 11
	FopenDirectIO  uint32 = 1 << 0
	FopenKeepCache uint32 = 1 << 1
	// FopenNoflush: no FLUSH at close. The home never sets it, for a FLUSH
	// is what drops a process's locks.
	FopenNoflush uint32 = 1 << 5

	GetattrFH          uint32 = 1 << 0
	LkFlock            uint32 = 1 << 0
	WriteCache         uint32 = 1 << 0
	ReleaseFlockUnlock uint32 = 1 << 1
	FsyncData          uint32 = 1 << 0
)

// InHeader begins each request.
type InHeader struct {
	Len      uint32
	Opcode   Opcode
	Unique   uint64
	NodeID   uint64
	UID      uint32
	GID      uint32
	PID      uint32 // thread that asks, in the forwarder's pid namespace; 0: the kernel itself
	ExtLen   uint16
	Reserved uint16
}

// OutHeader begins each reply. In a notification Unique is 0 and Error the
// code.
type OutHeader struct {
	Len    uint32
	Error  int32
	Unique uint64
}

// Sizes of the headers.
const (
	InHeaderSize  = int(unsafe.Sizeof(InHeader{}))
	OutHeaderSize = int(unsafe.Sizeof(OutHeader{}))
)

// As reads a T from the start of b and returns the rest. T must be a FUSE
// structure of this package, which have no holes and no pointers. The result
// points into b. Slices from Go's allocator, cut at multiples of 8 as FUSE
// cuts its messages, are aligned; anything else is copied.
func As[T any](b []byte) (*T, []byte, bool) {
	var zero T
	size := int(unsafe.Sizeof(zero))
	if len(b) < size {
		return nil, nil, false
	}
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%unsafe.Alignof(zero) != 0 {
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&zero)), size), b)
		return &zero, b[size:], true
	}
	return (*T)(p), b[size:], true
}

// Bytes are the bytes of a FUSE structure. The result points into v.
func Bytes[T any](v *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(v)), unsafe.Sizeof(*v))
}

// ParseRequest splits a request as the kernel wrote it. The header is a copy,
// the body points into b.
func ParseRequest(b []byte) (InHeader, []byte, error) {
	h, body, ok := As[InHeader](b)
	if !ok {
		return InHeader{}, nil, fmt.Errorf("FUSE request of %d bytes is shorter than its header", len(b))
	}
	if int64(h.Len) != int64(len(b)) {
		return InHeader{}, nil, fmt.Errorf("FUSE request of %d bytes says it has %d", len(b), h.Len)
	}
	// Extensions follow the body; we ask for none, so there are none.
	if h.ExtLen != 0 {
		return InHeader{}, nil, fmt.Errorf("FUSE request with extensions of %d bytes that were not asked for", int(h.ExtLen)*8)
	}
	return *h, body, nil
}

// ParseReply splits a reply or notification.
func ParseReply(b []byte) (OutHeader, []byte, error) {
	h, body, ok := As[OutHeader](b)
	if !ok {
		return OutHeader{}, nil, fmt.Errorf("FUSE reply of %d bytes is shorter than its header", len(b))
	}
	if int64(h.Len) != int64(len(b)) {
		return OutHeader{}, nil, fmt.Errorf("FUSE reply of %d bytes says it has %d", len(b), h.Len)
	}
	if h.Unique != 0 && (h.Error > 0 || h.Error <= -512) {
		return OutHeader{}, nil, fmt.Errorf("FUSE reply with error %d, which the kernel refuses", h.Error)
	}
	return *h, body, nil
}

// Name cuts a NUL-terminated name off b.
func Name(b []byte) (string, []byte, bool) {
	name, rest, ok := bytes.Cut(b, []byte{0})
	if !ok {
		return "", nil, false
	}
	return string(name), rest, true
}

// Reply makes a whole reply: header and the parts of the body.
func Reply(unique uint64, errno int32, body ...[]byte) []byte {
	n := OutHeaderSize
	for _, p := range body {
		n += len(p)
	}
	h := OutHeader{Len: uint32(n), Error: -errno, Unique: unique}
	out := append(make([]byte, 0, n), Bytes(&h)...)
	for _, p := range body {
		out = append(out, p...)
	}
	return out
}

// NotifyInode makes the notification that forgets an inode's attributes and
// all its cached pages.
func NotifyInode(node uint64) []byte {
	n := struct {
		node     uint64
		off, len int64
	}{node, 0, 0}
	return notification(NotifyInvalInode, Bytes(&n))
}

// NotifyEntry makes the notification that forgets a name in a directory.
func NotifyEntry(parent uint64, name string) []byte {
	n := struct {
		parent       uint64
		namelen, flg uint32
	}{parent, uint32(len(name)), 0}
	return notification(NotifyInvalEntry, Bytes(&n), []byte(name), []byte{0})
}

func notification(code int32, body ...[]byte) []byte {
	return Reply(0, -code, body...)
}
