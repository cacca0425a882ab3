package tftpd

import (
	"bytes"
	"encoding/binary"
	"strings"
)

// Opcodes (RFC 1350 section 5; OACK: RFC 2347).
//
//	RRQ   | 1 | file name | 0 | mode | 0 | { option | 0 | value | 0 } ...
//	WRQ   | 2 | as RRQ
//	DATA  | 3 | block number, 16 bits | 0 to blksize bytes
//	ACK   | 4 | block number, 16 bits
//	ERROR | 5 | code, 16 bits | text | 0
//	OACK  | 6 | { option | 0 | value | 0 } ...
const (
	opRRQ   = 1
	opWRQ   = 2
	opData  = 3
	opAck   = 4
	opError = 5
	opOACK  = 6
)

// headerSize is what a DATA packet has before its bytes.
const headerSize = 4

// Error codes (RFC 1350 appendix).
const (
	codeUndefined = 0
	codeNotFound  = 1
	codeAccess    = 2
	codeIllegal   = 4
)

// option is a name, in lower case, and its value.
type option struct{ name, value string }

// request is a read request.
type request struct {
	name string // as the client wrote it
	mode string // in lower case
	opts []option
}

// opcode is that of a packet, or 0.
func opcode(p []byte) uint16 {
	if len(p) < 2 {
		return 0
	}
	return binary.BigEndian.Uint16(p)
}

// parseRequest reads a RRQ or WRQ. Some ROMs fill the packet up with zeros:
// what comes after an empty option name is not looked at.
func parseRequest(p []byte) (r request, ok bool) {
	if op := opcode(p); op != opRRQ && op != opWRQ {
		return r, false
	}
	p = p[2:]
	next := func() (string, bool) {
		i := bytes.IndexByte(p, 0)
		if i < 0 {
			return "", false
		}
		s := string(p[:i])
		p = p[i+1:]
		return s, true
	}
	if r.name, ok = next(); !ok || r.name == "" {
		return request{}, false
	}
	mode, ok := next()
	if !ok {
		return request{}, false
	}
	r.mode = strings.ToLower(mode)
	for {
		name, ok := next()
		if !ok || name == "" {
			return r, true
		}
		value, ok := next()
		if !ok {
			return r, true // cut off: the options before it count
		}
		r.opts = append(r.opts, option{strings.ToLower(name), value})
	}
}

// appendDataHeader appends the header of block n, counted from 1 without end;
// on the wire the number goes on with 0 after 65535, which is what clients do
// that can do it at all.
func appendDataHeader(b []byte, n uint64) []byte {
	b = binary.BigEndian.AppendUint16(b, opData)
	return binary.BigEndian.AppendUint16(b, uint16(n))
}

func oackPacket(opts []option) []byte {
	b := binary.BigEndian.AppendUint16(nil, opOACK)
	for _, o := range opts {
		b = append(append(b, o.name...), 0)
		b = append(append(b, o.value...), 0)
	}
	return b
}

func errorPacket(code uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, opError)
	b = binary.BigEndian.AppendUint16(b, code)
	return append(append(b, text...), 0)
}

// parseAck is the block number of an ACK.
func parseAck(p []byte) (uint16, bool) {
	if opcode(p) != opAck || len(p) < headerSize {
		return 0, false
	}
	return binary.BigEndian.Uint16(p[2:]), true
}

// parseError is the text of an ERROR, made fit to be logged.
func parseError(p []byte) (text string, ok bool) {
	if opcode(p) != opError {
		return "", false
	}
	if len(p) > headerSize {
		b, _, _ := bytes.Cut(p[headerSize:], []byte{0})
		text = printable(string(b[:min(len(b), 80)]))
	}
	return text, true
}

// printable is a text of a client's without what a terminal would act on.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}
