package home

import (
	"errors"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/link"
	"mosimg/agent/homefiles/wire"
)

// fmodeExec is __FMODE_EXEC, which the kernel leaves in the flags of an open
// for execve (include/linux/fs.h).
const fmodeExec = 0x20

// openMask is what of a job's open flags holds at home. O_APPEND, O_SYNC and
// O_DSYNC come with each write; O_DIRECT is between the job and its node's
// cache.
const openMask = unix.O_ACCMODE | unix.O_TRUNC

func (c *call) open(in *wire.OpenIn) (answer, error) {
	p, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	fd, err := c.reopen(p, in.Flags)
	if err != nil {
		return answer{}, err
	}
	f := c.ss.newFile(c.in, fd)
	out := wire.OpenOut{FH: f.fh, OpenFlags: wire.FopenKeepCache}
	a := answer{}
	if c.ss.refresh(c.in, fd) {
		out.OpenFlags, a.flags = 0, wire.FlagAfterNotify
	}
	if c.unsized(fd) {
		out.OpenFlags |= wire.FopenDirectIO
	}
	a.body = wire.Bytes(&out)
	return a, nil
}

// unsized tells whether a file may have more in it than its size says: those
// of proc, which has no file handles. A cache would end at its size.
func (c *call) unsized(fd int) bool {
	var st unix.Stat_t
	return c.in.m == nil && unix.Fstat(fd, &st) == nil && st.Size == 0
}

// reopen opens a regular file from its O_PATH descriptor. Nothing else is
// opened at home: fifos, sockets and devices of the tree are the node's own.
func (c *call) reopen(p place, flags uint32) (int, error) {
	var st unix.Stat_t
	if err := unix.Fstat(p.fd, &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, unix.EACCES
	}
	how := int(flags&openMask) | unix.O_CLOEXEC | unix.O_NOCTTY
	fd, err := unix.Open(procFD(p.fd), how, 0)
	if err == unix.EPERM && flags&unix.O_APPEND != 0 {
		return unix.Open(procFD(p.fd), how|unix.O_APPEND, 0) // an append-only file (chattr +a)
	}
	if err == unix.EACCES && flags&fmodeExec != 0 && flags&unix.O_ACCMODE == unix.O_RDONLY {
		// A program that may be executed and not read: the node's kernel
		// needs its contents and does not show them.
		if e := unix.Faccessat2(p.fd, "", unix.X_OK, unix.AT_EMPTY_PATH|unix.AT_EACCESS); e != nil {
			return -1, err
		}
		c.w.root()
		return unix.Open(procFD(p.fd), how, 0)
	}
	return fd, err
}

func (c *call) create(in *wire.CreateIn, rest []byte) (answer, error) {
	n, _, err := name(rest)
	if err != nil {
		return answer{}, err
	}
	dir, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer dir.done()
	c.w.mask(in.Umask)
	// Always exclusive, so that a fifo or a device that somebody has put
	// there meanwhile is not opened.
	how := int(in.Flags&openMask) | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(dir.fd, n, how, in.Mode&0o7777)
	if errors.Is(err, unix.EEXIST) && in.Flags&unix.O_EXCL == 0 {
		fd, err = c.openExisting(dir.fd, n, in.Flags)
	}
	if err != nil {
		return answer{}, err
	}
	return c.opened(fd)
}

func (c *call) openExisting(dir int, n string, flags uint32) (int, error) {
	path, err := unix.Openat(dir, n, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, unix.ESTALE // gone again: the node looks it up once more
	}
	defer unix.Close(path)
	fd, err := c.reopen(place{fd: path}, flags)
	if errors.Is(err, unix.EACCES) {
		var st unix.Stat_t
		if unix.Fstat(path, &st) == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
			err = unix.ESTALE // no file: the node must open it otherwise
		}
	}
	return fd, err
}

func (c *call) tmpfile(in *wire.CreateIn, _ []byte) (answer, error) {
	dir, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer dir.done()
	c.w.mask(in.Umask)
	how := int(in.Flags&(openMask|unix.O_EXCL)) | unix.O_TMPFILE | unix.O_CLOEXEC
	fd, err := unix.Openat(dir.fd, ".", how, in.Mode&0o7777)
	if err != nil {
		return answer{}, err
	}
	return c.opened(fd)
}

// opened answers CREATE and TMPFILE; it owns fd.
func (c *call) opened(fd int) (answer, error) {
	entry, in, err := c.ss.learn(c.w, fd)
	if err != nil {
		unix.Close(fd)
		return answer{}, err
	}
	f := c.ss.newFile(in, fd)
	out := wire.OpenOut{FH: f.fh, OpenFlags: wire.FopenKeepCache}
	return answer{body: append(append([]byte(nil), wire.Bytes(&entry)...), wire.Bytes(&out)...)}, nil
}

func (ss *session) opRead(in *wire.ReadIn) (answer, error) {
	f, err := ss.file(in.FH)
	if err != nil {
		return answer{}, err
	}
	defer f.unref()
	buf := link.NewBuf(wire.OutHeaderSize + int(min(in.Size, wire.MaxWrite)))
	n, err := retry(func() (int, error) { return unix.Pread(f.fd, buf.B[wire.OutHeaderSize:], int64(in.Offset)) })
	if err != nil {
		buf.Free()
		return answer{}, err
	}
	buf.B = buf.B[:wire.OutHeaderSize+n]
	return answer{buf: buf}, nil
}

// Flags of pwritev2, include/uapi/linux/fs.h.
const (
	rwfDsync  = 0x2
	rwfSync   = 0x4
	rwfAppend = 0x10
)

func (c *call) write(in *wire.WriteIn, data []byte) (answer, error) {
	if int64(in.Size) > int64(len(data)) {
		return answer{}, unix.EINVAL
	}
	f, err := c.ss.file(in.FH)
	if err != nil {
		return answer{}, err
	}
	defer f.unref()
	// As the caller, so that the home's kernel takes set-id bits away and
	// counts quota as it would for a local write.
	if err := c.w.become(c.me); err != nil {
		return answer{}, err
	}
	how := 0
	if in.WriteFlags&wire.WriteCache == 0 {
		// O_APPEND is here a property of the write: the end of the file
		// is where home says, and pages of a mapping are written in place
		// although the kernel may have picked an appending descriptor.
		if in.Flags&unix.O_APPEND != 0 {
			how |= rwfAppend
		}
		switch {
		case in.Flags&unix.O_SYNC == unix.O_SYNC:
			how |= rwfSync
		case in.Flags&unix.O_DSYNC != 0:
			how |= rwfDsync
		}
	}
	n := 0
	for {
		m, err := retry(func() (int, error) {
			if how == 0 {
				return unix.Pwrite(f.fd, data[n:in.Size], int64(in.Offset)+int64(n))
			}
			return unix.Pwritev2(f.fd, [][]byte{data[:in.Size]}, int64(in.Offset), how)
		})
		if err != nil {
			return answer{}, err
		}
		// A program can be told that its write was cut short, by a full disk for
		// one. Of pages the kernel asks only whether there was an error.
		if n += m; n == int(in.Size) || m == 0 || in.WriteFlags&wire.WriteCache == 0 {
			break
		}
	}
	return answer{body: wire.Bytes(&wire.WriteOut{Size: uint32(n)})}, nil
}

// retry repeats what a signal to the thread has interrupted: Go preempts
// goroutines by signals.
func retry(f func() (int, error)) (int, error) {
	for {
		if n, err := f(); !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

func (ss *session) opRelease(in *wire.ReleaseIn) (answer, error) {
	ss.closeFile(in.FH)
	return answer{}, nil
}

func (ss *session) opFsync(in *wire.FsyncIn) (answer, error) {
	f, err := ss.file(in.FH)
	if err != nil {
		return answer{}, err
	}
	defer f.unref()
	if in.Flags&wire.FsyncData != 0 {
		return answer{}, unix.Fdatasync(f.fd)
	}
	return answer{}, unix.Fsync(f.fd)
}

func (ss *session) opLseek(in *wire.LseekIn) (answer, error) {
	f, err := ss.file(in.FH)
	if err != nil {
		return answer{}, err
	}
	defer f.unref()
	if in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return answer{}, unix.EINVAL // the node does the rest itself
	}
	// The descriptor's position is used by nothing else.
	off, err := unix.Seek(f.fd, int64(in.Offset), int(in.Whence))
	if err != nil {
		return answer{}, err
	}
	return answer{body: wire.Bytes(&wire.LseekOut{Offset: uint64(off)})}, nil
}

func (c *call) fallocate(in *wire.FallocateIn) (answer, error) {
	f, err := c.ss.file(in.FH)
	if err != nil {
		return answer{}, err
	}
	defer f.unref()
	if err := c.w.become(c.me); err != nil {
		return answer{}, err
	}
	_, err = retry(func() (int, error) {
		return 0, unix.Fallocate(f.fd, in.Mode, int64(in.Offset), int64(in.Length))
	})
	return answer{}, err
}

// copyMost bounds one COPY_FILE_RANGE: the kernel asks again for the rest, and
// a copy of a huge file does not hold a thread for minutes.
const copyMost = 64 << 20

func (c *call) copyFileRange(in *wire.CopyFileRangeIn) (answer, error) {
	src, err := c.ss.file(in.FHIn)
	if err != nil {
		return answer{}, err
	}
	defer src.unref()
	dst, err := c.ss.file(in.FHOut)
	if err != nil {
		return answer{}, err
	}
	defer dst.unref()
	if err := c.w.become(c.me); err != nil {
		return answer{}, err
	}
	from, to := int64(in.OffIn), int64(in.OffOut)
	n, err := retry(func() (int, error) {
		return unix.CopyFileRange(src.fd, &from, dst.fd, &to, int(min(in.Len, copyMost)), int(in.Flags))
	})
	if err != nil {
		return answer{}, err
	}
	return answer{body: wire.Bytes(&wire.WriteOut{Size: uint32(n)})}, nil
}
