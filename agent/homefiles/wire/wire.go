// Package wire is the language of a home files connection: how a node's
// forwarder and the home's handler greet each other, how requests, replies
// and notifications are framed, and the layout of the FUSE messages inside.
//
// A connection belongs to one session: one FUSE mount of one capsule on one
// node, in one epoch. It carries FUSE messages unchanged, as the node's kernel
// wrote them, in numbered frames that each side keeps until the other has
// acknowledged them, so that a session outlives its connections (package link
// does that). Both sides must be little-endian machines, as all are that
// mosimg builds for: the FUSE messages are in the node's byte order.
//
// Everything here is a pure function of bytes and is fuzzed. The connection
// must be authenticated and encrypted by the caller.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Version of the protocol. A HELLO with another version is answered with
// Refused{RefuseVersion} and the connection is closed: both ends come from one
// image, so there is nothing to negotiate.
const Version = 1

// HeaderSize is the length of a frame's header. All numbers little-endian:
//
//	 0  u32  length of the body in bytes, at most MaxBody
//	 4  u8   kind
//	 5  u8   flags
//	 6  u16  zero
//	 8  u64  number of this frame, from 1 in each direction; 0 in kinds that
//	         are not numbered (Hello, Welcome, Refused, Ack, Fenced)
//	16  u64  highest number received from the other side, all before it too
const HeaderSize = 24

// MaxBody bounds a frame's body: the largest FUSE request (1 MiB of data and
// its headers) with room to spare.
const MaxBody = 1<<20 + 64<<10

// Kind says what a frame's body is.
type Kind uint8

const (
	// KindHello opens a connection, node to home. Body: see Hello.
	KindHello Kind = 1
	// KindWelcome accepts it, home to node; its ack field says what to
	// resend from. No body.
	KindWelcome Kind = 2
	// KindRefused turns it down, home to node. Body: see Refused.
	KindRefused Kind = 3
	// KindRequest is a FUSE request, node to home. Numbered.
	KindRequest Kind = 4
	// KindReply is a FUSE reply, home to node. Numbered.
	KindReply Kind = 5
	// KindNotify is a FUSE notification (unique 0), home to node. Numbered.
	KindNotify Kind = 6
	// KindAck carries only its ack field; it also keeps a quiet connection
	// alive. Not numbered, no body.
	KindAck Kind = 7
	// KindFenced ends a session for good, home to node: another placement of
	// the capsule has the current epoch. No body.
	KindFenced Kind = 8
	// KindPolicy tells the forwarder how to act from now on, home to node.
	// Numbered. Body: u32 of Policy bits, then u32 numbers of processes whose
	// locks moved here.
	KindPolicy Kind = 9
	// KindGone tells the home that one of these processes has ended, node to
	// home. Numbered. Body: u32, the process.
	KindGone Kind = 10
)

// FlagAfterNotify on a reply: it must reach the kernel only after all earlier
// notifications have, because it promises what they bring about (an open or a
// lock that sees the file's newest contents).
const FlagAfterNotify uint8 = 1

// PolicyForwardFlush tells the forwarder to forward each FLUSH, also of
// owners it has seen no lock of: the home holds locks that moved here with
// the capsule.
const PolicyForwardFlush uint32 = 1

// Header is a frame's header.
type Header struct {
	Length uint32
	Kind   Kind
	Flags  uint8
	Seq    uint64
	Ack    uint64
}

// Put writes h to b, which must have HeaderSize bytes.
func (h Header) Put(b []byte) {
	_ = b[HeaderSize-1]
	binary.LittleEndian.PutUint32(b[0:], h.Length)
	b[4], b[5], b[6], b[7] = byte(h.Kind), h.Flags, 0, 0
	binary.LittleEndian.PutUint64(b[8:], h.Seq)
	binary.LittleEndian.PutUint64(b[16:], h.Ack)
}

// ParseHeader reads a header from b, which must have HeaderSize bytes, and
// refuses what no side of this version sends.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize {
		return Header{}, io.ErrUnexpectedEOF
	}
	h := Header{
		Length: binary.LittleEndian.Uint32(b[0:]),
		Kind:   Kind(b[4]),
		Flags:  b[5],
		Seq:    binary.LittleEndian.Uint64(b[8:]),
		Ack:    binary.LittleEndian.Uint64(b[16:]),
	}
	switch {
	case h.Length > MaxBody:
		return Header{}, fmt.Errorf("frame of %d bytes; at most %d are allowed", h.Length, MaxBody)
	case h.Kind < KindHello || h.Kind > KindGone:
		return Header{}, fmt.Errorf("frame of unknown kind %d", h.Kind)
	case h.Kind.Numbered() != (h.Seq != 0):
		return Header{}, fmt.Errorf("frame of kind %d has number %d", h.Kind, h.Seq)
	case b[6] != 0 || b[7] != 0:
		return Header{}, errors.New("frame with a reserved field that is not zero")
	}
	return h, nil
}

// Numbered tells whether frames of this kind are kept until acknowledged.
func (k Kind) Numbered() bool {
	return k == KindRequest || k == KindReply || k == KindNotify || k == KindPolicy || k == KindGone
}

// AppendFrame appends a frame that is not numbered.
func AppendFrame(dst []byte, kind Kind, ack uint64, body []byte) []byte {
	var hdr [HeaderSize]byte
	Header{Length: uint32(len(body)), Kind: kind, Ack: ack}.Put(hdr[:])
	return append(append(dst, hdr[:]...), body...)
}

// ReadFrame reads one frame. It is for greetings: a body of more than max
// bytes is refused before it is read.
func ReadFrame(r io.Reader, limit uint32) (Header, []byte, error) {
	var b [HeaderSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return Header{}, nil, err
	}
	h, err := ParseHeader(b[:])
	if err != nil {
		return Header{}, nil, err
	}
	if h.Length > limit {
		return Header{}, nil, fmt.Errorf("greeting of %d bytes; at most %d are allowed", h.Length, limit)
	}
	body := make([]byte, h.Length)
	if _, err := io.ReadFull(r, body); err != nil {
		return Header{}, nil, err
	}
	return h, body, nil
}
