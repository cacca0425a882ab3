package home

import (
	"errors"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
)

// name cuts a name off the request and checks it.
func name(b []byte) (string, []byte, error) {
	n, rest, ok := wire.Name(b)
	if !ok {
		return "", nil, unix.EINVAL
	}
	return n, rest, validName(n)
}

func (c *call) lookup() (answer, error) {
	n, _, err := name(c.r.body)
	if err != nil {
		return answer{}, err
	}
	dir, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer dir.done()
	out, err := c.entry(dir.fd, n)
	if errors.Is(err, unix.ENOENT) && c.ss.srv.watch.alive() {
		// "Not there" may be kept as long as a name may, but only while
		// somebody tells the node when it appears: sqlite looks for a
		// journal and must find the one another process has left.
		return answer{body: wire.Bytes(&wire.EntryOut{EntryValid: uint64(attrTTL.Seconds())})}, nil
	}
	if err != nil {
		return answer{}, err
	}
	return answer{body: wire.Bytes(&out)}, nil
}

// entry looks a name up.
func (c *call) entry(dir int, n string) (wire.EntryOut, error) {
	fd, err := unix.Openat(dir, n, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return wire.EntryOut{}, err
	}
	defer unix.Close(fd)
	out, _, err := c.ss.learn(c.w, fd)
	return out, err
}

// made answers a request that has made the name n.
func (c *call) made(dir int, n string) (answer, error) {
	out, err := c.entry(dir, n)
	if errors.Is(err, unix.ENOENT) {
		err = unix.ESTALE // somebody at home took it away at once: look again
	}
	if err != nil {
		return answer{}, err
	}
	return answer{body: wire.Bytes(&out)}, nil
}

func (c *call) mkdir(in *wire.MkdirIn, rest []byte) (answer, error) {
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
	if err := unix.Mkdirat(dir.fd, n, in.Mode&0o7777); err != nil {
		return answer{}, err
	}
	return c.made(dir.fd, n)
}

// mknod makes files, fifos and sockets. A job makes no devices, not even the
// 0:0 one that overlayfs takes for a whiteout.
func (c *call) mknod(in *wire.MknodIn, rest []byte) (answer, error) {
	n, _, err := name(rest)
	if err != nil {
		return answer{}, err
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return answer{}, unix.EPERM
	}
	dir, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer dir.done()
	c.w.mask(in.Umask)
	if err := unix.Mknodat(dir.fd, n, in.Mode, 0); err != nil {
		return answer{}, err
	}
	return c.made(dir.fd, n)
}

func (c *call) symlink() (answer, error) {
	n, rest, err := name(c.r.body)
	if err != nil {
		return answer{}, err
	}
	target, _, ok := wire.Name(rest)
	if !ok {
		return answer{}, unix.EINVAL
	}
	dir, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer dir.done()
	if err := unix.Symlinkat(target, dir.fd, n); err != nil {
		return answer{}, err
	}
	return c.made(dir.fd, n)
}

func (c *call) link(in *wire.LinkIn, rest []byte) (answer, error) {
	n, _, err := name(rest)
	if err != nil {
		return answer{}, err
	}
	old, err := c.ss.inode(in.OldNodeID)
	if err != nil {
		return answer{}, err
	}
	src, err := c.placeOf(old)
	if err != nil {
		return answer{}, err
	}
	defer src.done()
	dir, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer dir.done()
	// Through /proc, because AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH. The
	// magic link ends at the inode, also when that is a symbolic link.
	if err := unix.Linkat(unix.AT_FDCWD, procFD(src.fd), dir.fd, n, unix.AT_SYMLINK_FOLLOW); err != nil {
		return answer{}, err
	}
	return c.made(dir.fd, n)
}

func (c *call) remove(flags int) (answer, error) {
	n, _, err := name(c.r.body)
	if err != nil {
		return answer{}, err
	}
	dir, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer dir.done()
	return answer{}, unix.Unlinkat(dir.fd, n, flags)
}

func (c *call) rename(newDir uint64, flags uint32, rest []byte) (answer, error) {
	from, rest, err := name(rest)
	if err != nil {
		return answer{}, err
	}
	to, _, err := name(rest)
	if err != nil {
		return answer{}, err
	}
	if flags&unix.RENAME_WHITEOUT != 0 {
		return answer{}, unix.EINVAL // makes a device
	}
	in, err := c.ss.inode(newDir)
	if err != nil {
		return answer{}, err
	}
	src, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer src.done()
	dst, err := c.placeOf(in)
	if err != nil {
		return answer{}, err
	}
	defer dst.done()
	return answer{}, unix.Renameat2(src.fd, from, dst.fd, to, uint(flags))
}
