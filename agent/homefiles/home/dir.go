package home

import (
	"encoding/binary"
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/link"
	"mosimg/agent/homefiles/wire"
)

// dirStream reads a directory for one open descriptor. Offsets are those of
// the home's file system, which keep their meaning while names come and go,
// for as long as the directory is open.
type dirStream struct {
	raw  []byte // what getdents gave and was not used yet
	next int64  // offset of the first entry in raw, or of what getdents gives next
	held []byte
}

// entry is one name of a directory.
type entry struct {
	ino  uint64
	off  int64 // where the next one begins
	typ  uint8
	name string
}

// parseDirent cuts the first entry off the bytes that getdents64 gave.
func parseDirent(b []byte) (entry, []byte, error) {
	const fixed = 19
	if len(b) < fixed {
		return entry{}, nil, io.ErrUnexpectedEOF
	}
	n := int(binary.NativeEndian.Uint16(b[16:]))
	if n < fixed || n > len(b) {
		return entry{}, nil, io.ErrUnexpectedEOF
	}
	e := entry{ino: binary.NativeEndian.Uint64(b), off: int64(binary.NativeEndian.Uint64(b[8:])), typ: b[18]}
	name, _, ok := wire.Name(b[fixed:n])
	if !ok {
		return entry{}, nil, io.ErrUnexpectedEOF
	}
	e.name = name
	return e, b[n:], nil
}

// peek gives the entry at off and what follows it.
func (d *dirStream) peek(fd int, off int64) (entry, []byte, error) {
	if off != d.next {
		if _, err := unix.Seek(fd, off, unix.SEEK_SET); err != nil {
			return entry{}, nil, err
		}
		d.raw, d.next = nil, off
	}
	if len(d.raw) == 0 {
		if d.held == nil {
			d.held = make([]byte, 32<<10)
		}
		n, err := retry(func() (int, error) { return unix.Getdents(fd, d.held) })
		if err != nil {
			return entry{}, nil, err
		}
		if n == 0 {
			return entry{}, nil, io.EOF
		}
		d.raw = d.held[:n]
	}
	return parseDirent(d.raw)
}

func (c *call) opendir() (answer, error) {
	p, err := c.place()
	if err != nil {
		return answer{}, err
	}
	defer p.done()
	fd, err := unix.Openat(p.fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EACCES) {
		// "." needs search permission, which reading a directory does not.
		fd, err = unix.Open(procFD(p.fd), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return answer{}, err
	}
	f := c.ss.newFile(c.in, fd)
	f.dir = &dirStream{}
	return answer{body: wire.Bytes(&wire.OpenOut{FH: f.fh})}, nil
}

const (
	direntSize = 24
	entrySize  = 128 // of wire.EntryOut
)

// readdir fills the answer with whole entries. plus adds to each what a lookup
// of it would tell.
func (c *call) readdir(in *wire.ReadIn, plus bool) (answer, error) {
	f, err := c.ss.file(in.FH)
	if err != nil {
		return answer{}, err
	}
	defer f.unref()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dir == nil {
		return answer{}, unix.ENOTDIR
	}
	if err := c.w.become(c.me); err != nil {
		return answer{}, err
	}
	room := int(min(in.Size, wire.MaxWrite))
	buf := link.NewBuf(wire.OutHeaderSize + room)
	out := buf.B[:wire.OutHeaderSize]
	off := int64(in.Offset)
	fail := func(err error) (answer, error) {
		if len(out) > wire.OutHeaderSize {
			buf.B = out // what was read is good; the error comes next time
			return answer{buf: buf}, nil
		}
		buf.Free()
		return answer{}, err
	}
	for {
		e, rest, err := f.dir.peek(f.fd, off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fail(err)
		}
		size := direntSize + (len(e.name)+7)&^7
		if plus {
			size += entrySize
		}
		if len(out)+size > len(buf.B) {
			if len(out) == wire.OutHeaderSize {
				return fail(unix.EINVAL) // as getdents says it
			}
			break
		}
		if plus {
			// An entry that cannot be looked up has node id 0: the
			// kernel then knows only its name.
			var eo wire.EntryOut
			if e.name != "." && e.name != ".." {
				if eo, err = c.entry(f.fd, e.name); err != nil {
					eo = wire.EntryOut{}
				}
				if err := c.w.become(c.me); err != nil {
					return fail(err)
				}
			}
			out = append(out, wire.Bytes(&eo)...)
		}
		fold := uint64(0)
		if c.in.m != nil {
			fold = c.in.m.fold
		}
		d := wire.Dirent{Ino: e.ino ^ fold, Off: uint64(e.off), Namelen: uint32(len(e.name)), Type: uint32(e.typ)}
		out = append(out, wire.Bytes(&d)...)
		out = append(out, e.name...)
		for len(out)%8 != 0 { // the header of 16 keeps this aligned
			out = append(out, 0)
		}
		f.dir.raw, f.dir.next, off = rest, e.off, e.off
	}
	buf.B = out
	return answer{buf: buf}, nil
}
