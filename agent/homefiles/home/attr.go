package home

import (
	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
)

func (c *call) attrOut(st *unix.Stat_t) answer {
	c.ss.tell(c.in, st)
	out := wire.AttrOut{AttrValid: uint64(attrTTL.Seconds()), Attr: c.ss.attr(c.in, st)}
	return answer{body: wire.Bytes(&out)}
}

func (c *call) getattr(in *wire.GetattrIn) (answer, error) {
	var st unix.Stat_t
	if in.Flags&wire.GetattrFH != 0 {
		if f, err := c.ss.file(in.FH); err == nil {
			defer f.unref()
			if err := unix.Fstat(f.fd, &st); err != nil {
				return answer{}, err
			}
			return c.attrOut(&st), nil
		}
	}
	p, err := c.ss.open(c.w, c.in)
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	if err := unix.Fstat(p.fd, &st); err != nil {
		return answer{}, err
	}
	return c.attrOut(&st), nil
}

func (c *call) setattr(in *wire.SetattrIn) (answer, error) {
	p, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	if in.Valid&wire.FattrMode != 0 {
		if err := unix.Fchmodat(unix.AT_FDCWD, procFD(p.fd), in.Mode&0o7777, 0); err != nil {
			return answer{}, err
		}
	}
	if in.Valid&(wire.FattrUID|wire.FattrGID) != 0 {
		uid, gid := -1, -1
		if in.Valid&wire.FattrUID != 0 {
			uid = int(int32(in.UID))
		}
		if in.Valid&wire.FattrGID != 0 {
			gid = int(int32(in.GID))
		}
		if err := unix.Fchownat(p.fd, "", uid, gid, unix.AT_EMPTY_PATH); err != nil {
			return answer{}, err
		}
	}
	if in.Valid&wire.FattrSize != 0 {
		if err := c.truncate(p, in); err != nil {
			return answer{}, err
		}
	}
	if in.Valid&(wire.FattrAtime|wire.FattrMtime) != 0 {
		ts := []unix.Timespec{
			timeArg(in.Valid, wire.FattrAtime, wire.FattrAtimeNow, in.Atime, in.AtimeNsec),
			timeArg(in.Valid, wire.FattrMtime, wire.FattrMtimeNow, in.Mtime, in.MtimeNsec),
		}
		if err := unix.UtimesNanoAt(p.fd, "", ts, unix.AT_EMPTY_PATH); err != nil {
			return answer{}, err
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(p.fd, &st); err != nil {
		return answer{}, err
	}
	return c.attrOut(&st), nil
}

// truncate goes through the open file if the job did: ftruncate needs no
// permission any more.
func (c *call) truncate(p place, in *wire.SetattrIn) error {
	if in.Valid&wire.FattrFH != 0 {
		f, err := c.ss.file(in.FH)
		if err != nil {
			return err
		}
		defer f.unref()
		return unix.Ftruncate(f.fd, int64(in.Size))
	}
	return unix.Truncate(procFD(p.fd), int64(in.Size))
}

// utimensat's special nanoseconds, include/uapi/linux/stat.h.
const (
	utimeNow  = 1<<30 - 1
	utimeOmit = 1<<30 - 2
)

func timeArg(valid, set, now uint32, sec uint64, nsec uint32) unix.Timespec {
	var ts unix.Timespec
	switch {
	case valid&set == 0:
		setNsec(&ts, utimeOmit)
	case valid&now != 0:
		setNsec(&ts, utimeNow)
	default:
		ts = unix.NsecToTimespec(int64(nsec))
		setSec(&ts, int64(sec))
	}
	return ts
}

func (c *call) access(in *wire.AccessIn) (answer, error) {
	p, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	return answer{}, unix.Faccessat2(p.fd, "", in.Mask, unix.AT_EMPTY_PATH|unix.AT_EACCESS)
}

func (c *call) readlink() (answer, error) {
	p, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(p.fd, "", buf)
	if err != nil {
		return answer{}, err
	}
	return answer{body: buf[:n]}, nil
}

func (c *call) statfs() (answer, error) {
	p, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	var st unix.Statfs_t
	if err := unix.Fstatfs(p.fd, &st); err != nil {
		return answer{}, err
	}
	out := wire.StatfsOut{
		Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), Namelen: uint32(st.Namelen), Frsize: uint32(st.Frsize),
	}
	return answer{body: wire.Bytes(&out)}, nil
}
