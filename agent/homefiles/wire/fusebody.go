package wire

// Bodies of FUSE requests and replies. Names and order of fields follow the
// kernel's header, whose words on each field hold here too. Each has a size
// that is a multiple of 8 and every 64-bit field lies at a multiple of 8, so
// that the layout is the same on 32-bit machines; a test checks the sizes.

// Attr is what stat tells.
type Attr struct {
	Ino, Size, Blocks               uint64
	Atime, Mtime, Ctime             uint64
	AtimeNsec, MtimeNsec, CtimeNsec uint32
	Mode, Nlink, UID, GID           uint32
	Rdev, Blksize, Flags            uint32
}

// EntryOut answers whatever makes or finds a name.
type EntryOut struct {
	NodeID, Generation            uint64
	EntryValid, AttrValid         uint64
	EntryValidNsec, AttrValidNsec uint32
	Attr                          Attr
}

// AttrOut answers GETATTR and SETATTR.
type AttrOut struct {
	AttrValid            uint64
	AttrValidNsec, Dummy uint32
	Attr                 Attr
}

// InitIn is the start of INIT's body; older kernels send less.
type InitIn struct{ Major, Minor, MaxReadahead, Flags uint32 }

// InitExtIn follows InitIn when its flags have InitExt.
type InitExtIn struct {
	Flags2 uint32
	Unused [11]uint32
}

// InitOut answers INIT.
type InitOut struct {
	Major, Minor, MaxReadahead, Flags uint32
	MaxBackground, Congestion         uint16
	MaxWrite, TimeGran                uint32
	MaxPages, MapAlignment            uint16
	Flags2                            uint32
	Unused                            [7]uint32
}

// The rest, each named after its request.
type (
	ForgetIn      struct{ Nlookup uint64 }
	BatchForgetIn struct{ Count, Dummy uint32 }
	ForgetOne     struct{ NodeID, Nlookup uint64 }
	GetattrIn     struct {
		Flags, Dummy uint32
		FH           uint64
	}
	SetattrIn struct {
		Valid, Padding                        uint32
		FH, Size, LockOwner                   uint64
		Atime, Mtime, Ctime                   uint64
		AtimeNsec, MtimeNsec, CtimeNsec, Mode uint32
		Unused4, UID, GID, Unused5            uint32
	}
	MknodIn   struct{ Mode, Rdev, Umask, Padding uint32 }
	MkdirIn   struct{ Mode, Umask uint32 }
	RenameIn  struct{ NewDir uint64 }
	Rename2In struct {
		NewDir         uint64
		Flags, Padding uint32
	}
	LinkIn   struct{ OldNodeID uint64 }
	OpenIn   struct{ Flags, OpenFlags uint32 }
	CreateIn struct{ Flags, Mode, Umask, OpenFlags uint32 }
	OpenOut  struct {
		FH                 uint64
		OpenFlags, Padding uint32
	}
	ReleaseIn struct {
		FH                  uint64
		Flags, ReleaseFlags uint32
		LockOwner           uint64
	}
	// FlushIn has in TGID what the kernel leaves zero ("unused"): under
	// PolicyForwardFlush a forwarder fills in the process that closes.
	FlushIn struct {
		FH            uint64
		TGID, Padding uint32
		LockOwner     uint64
	}
	// ReadIn is also the body of READDIR and READDIRPLUS.
	ReadIn struct {
		FH, Offset      uint64
		Size, ReadFlags uint32
		LockOwner       uint64
		Flags, Padding  uint32
	}
	WriteIn struct {
		FH, Offset       uint64
		Size, WriteFlags uint32
		LockOwner        uint64
		Flags, Padding   uint32
	}
	WriteOut  struct{ Size, Padding uint32 }
	StatfsOut struct {
		Blocks, Bfree, Bavail, Files, Ffree uint64
		Bsize, Namelen, Frsize, Padding     uint32
		Spare                               [6]uint32
	}
	FsyncIn struct {
		FH             uint64
		Flags, Padding uint32
	}
	SetxattrIn  struct{ Size, Flags uint32 } // without SETXATTR_EXT
	GetxattrIn  struct{ Size, Padding uint32 }
	GetxattrOut struct{ Size, Padding uint32 }
	FileLock    struct {
		Start, End uint64
		Type, PID  uint32
	}
	LkIn struct {
		FH, Owner      uint64
		Lk             FileLock
		Flags, Padding uint32
	}
	AccessIn    struct{ Mask, Padding uint32 }
	InterruptIn struct{ Unique uint64 }
	FallocateIn struct {
		FH, Offset, Length uint64
		Mode, Padding      uint32
	}
	LseekIn struct {
		FH, Offset      uint64
		Whence, Padding uint32
	}
	LseekOut        struct{ Offset uint64 }
	CopyFileRangeIn struct {
		FHIn, OffIn                          uint64
		NodeIDOut, FHOut, OffOut, Len, Flags uint64
	}
	// Dirent is followed by the name, padded to a multiple of 8.
	Dirent struct {
		Ino, Off      uint64
		Namelen, Type uint32
	}
)
