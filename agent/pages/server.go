package pages

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// CRIU's page-server protocol (criu/page-xfer.c), little-endian. CRIU sends
// commands:
//
//	up to 4.1: u32 command, u32 pages, u64 vaddr, u64 image
//	from 4.2:  u32 command, u32 (unused), u64 pages, u64 vaddr, u64 image
//
// The low 16 bits of command say what, the high ones are flags. image is
// id<<8 | kind. Answers: one byte to Open2 (is there a parent image), an int32 to Parent
// (the same) and to Close and ForceClose (0: all is well).
const (
	psOpen       = 3
	psOpen2      = 4
	psParent     = 5
	psAdd        = 6
	psClose      = 0x1023
	psForceClose = 0x1024

	psCommandBits = 16
	psKindBits    = 8

	flagParent  = 1 // the page is in the parent image
	flagLazy    = 2 // the page could be sent later; it is not
	flagPresent = 4 // the page's bytes follow
)

// Protocol is a version of the page-server protocol.
type Protocol int

const (
	// Protocol41 is spoken by CRIU up to 4.1.
	Protocol41 Protocol = iota
	// Protocol42 is spoken by CRIU from 4.2 on.
	Protocol42
)

// ProtocolOf is what a version of CRIU speaks, such as "4.1.1".
func ProtocolOf(version string) Protocol {
	major, rest, _ := strings.Cut(version, ".")
	minor, _, _ := strings.Cut(rest, ".")
	a, err1 := strconv.Atoi(major)
	b, err2 := strconv.Atoi(minor)
	if err1 == nil && err2 == nil && (a > 4 || a == 4 && b >= 2) {
		return Protocol42
	}
	return Protocol41
}

type command struct {
	what  uint32
	flags uint32
	pages uint64
	vaddr uint64
	image ImageID
}

func (p Protocol) read(r io.Reader) (c command, err error) {
	var b [32]byte
	h := b[:24]
	if p == Protocol42 {
		h = b[:32]
	}
	if _, err := io.ReadFull(r, h); err != nil {
		return c, err
	}
	word := binary.LittleEndian.Uint32(h)
	c.what, c.flags = word&(1<<psCommandBits-1), word>>psCommandBits
	if p == Protocol42 {
		c.pages = binary.LittleEndian.Uint64(h[8:])
	} else {
		c.pages = uint64(binary.LittleEndian.Uint32(h[4:]))
	}
	image := binary.LittleEndian.Uint64(h[len(h)-8:])
	c.vaddr = binary.LittleEndian.Uint64(h[len(h)-16:])
	c.image = ImageID{Kind: Kind(image), ID: image >> psKindBits}
	return c, nil
}

// maxPages is the longest run that CRIU may announce: the user half of an
// x86-64 address space.
const maxPages = 1 << 47 / Size

// ErrHungUp is a CRIU that closed its page socket before it had said that all
// pages were sent: its dump has failed, and its log says why.
var ErrHungUp = errors.New("criu hung up before all pages were sent")

// Serve takes the pages of one dump from CRIU at sock, and returns when CRIU
// has said that they are all, and has been told that they have arrived.
// After an error CRIU must be made to fail by closing sock.
func Serve(sock io.ReadWriter, p Protocol, to Receiver) error {
	buf := make([]byte, MaxRun*Size)
	opened := false
	for {
		c, err := p.read(sock)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return ErrHungUp
		}
		if err != nil {
			return fmt.Errorf("read pages from criu: %w", err)
		}
		switch c.what {
		case psOpen, psOpen2:
			if err := c.image.check(); err != nil {
				return fmt.Errorf("criu sends %w", err)
			}
			if err := to.Open(c.image); err != nil {
				return err
			}
			opened = true
			if c.what == psOpen2 {
				_, err = sock.Write([]byte{0})
			}
		case psParent:
			_, err = sock.Write(make([]byte, 4))
		case psAdd:
			if !opened || c.flags&^flagLazy != flagPresent || c.pages > maxPages {
				// Pages of a parent image occur with pre-copy only.
				return fmt.Errorf("criu sends %d pages at %#x with flags %#x", c.pages, c.vaddr, c.flags)
			}
			err = takeRun(sock, c.vaddr, c.pages, buf, to)
		case psClose, psForceClose:
			if err := to.Sync(); err != nil {
				return err
			}
			_, err = sock.Write(make([]byte, 4))
			if err == nil {
				return nil
			}
		default:
			return fmt.Errorf("criu sends command %#x; is it newer than this mosimg?", c.what)
		}
		if err != nil {
			return fmt.Errorf("take pages from criu: %w", err)
		}
	}
}

// takeRun hands a run on in parts.
func takeRun(r io.Reader, vaddr, n uint64, buf []byte, to Receiver) error {
	for n > 0 {
		part := buf[:min(n, MaxRun)*Size]
		if err := checkRun(vaddr, uint32(len(part)/Size)); err != nil {
			return err
		}
		if _, err := io.ReadFull(r, part); err != nil {
			return err
		}
		if err := split(vaddr, part, to); err != nil {
			return err
		}
		vaddr, n = vaddr+uint64(len(part)), n-uint64(len(part)/Size)
	}
	return nil
}

var zeroPage [Size]byte

// split hands on runs of pages with content and runs without.
func split(vaddr uint64, data []byte, to Receiver) error {
	for len(data) > 0 {
		zero := bytes.Equal(data[:Size], zeroPage[:])
		end := Size
		for end < len(data) && bytes.Equal(data[end:end+Size], zeroPage[:]) == zero {
			end += Size
		}
		var err error
		if zero {
			err = to.Zero(vaddr, uint32(end/Size))
		} else {
			err = to.Pages(vaddr, data[:end])
		}
		if err != nil {
			return err
		}
		vaddr, data = vaddr+uint64(end), data[end:]
	}
	return nil
}
