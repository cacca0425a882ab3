package home

import (
	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
)

// Extended attributes go through the magic link in /proc, which ends at the
// inode also when that is a symbolic link. The home's kernel decides who may
// set what: a worker has no CAP_SETFCAP and no CAP_SYS_ADMIN, so security.* and
// trusted.* are out of a job's reach.

// xattrMost is XATTR_SIZE_MAX and XATTR_LIST_MAX.
const xattrMost = 64 << 10

func (c *call) getxattr(in *wire.GetxattrIn, rest []byte) (answer, error) {
	n, _, ok := wire.Name(rest)
	if !ok || n == "" {
		return answer{}, unix.EINVAL
	}
	return c.xattrOut(in.Size, func(path string, dst []byte) (int, error) { return unix.Getxattr(path, n, dst) })
}

func (c *call) listxattr(in *wire.GetxattrIn) (answer, error) {
	return c.xattrOut(in.Size, unix.Listxattr)
}

// xattrOut answers with the size of the result if size is 0, and else with the
// result itself.
func (c *call) xattrOut(size uint32, get func(string, []byte) (int, error)) (answer, error) {
	p, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	if size == 0 {
		n, err := get(procFD(p.fd), nil)
		if err != nil {
			return answer{}, err
		}
		return answer{body: wire.Bytes(&wire.GetxattrOut{Size: uint32(n)})}, nil
	}
	dst := make([]byte, min(size, xattrMost))
	n, err := get(procFD(p.fd), dst)
	if err != nil {
		return answer{}, err
	}
	return answer{body: dst[:n]}, nil
}

func (c *call) setxattr(in *wire.SetxattrIn, rest []byte) (answer, error) {
	n, value, ok := wire.Name(rest)
	if !ok || n == "" || int64(in.Size) > int64(len(value)) {
		return answer{}, unix.EINVAL
	}
	p, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	return answer{}, unix.Setxattr(procFD(p.fd), n, value[:in.Size], int(in.Flags))
}

func (c *call) removexattr() (answer, error) {
	n, _, ok := wire.Name(c.r.body)
	if !ok || n == "" {
		return answer{}, unix.EINVAL
	}
	p, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	return answer{}, unix.Removexattr(procFD(p.fd), n)
}
