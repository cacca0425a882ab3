package pages

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"mosimg/internal/fault"
)

// Magic begins a stream, version 1; numbers are big-endian. The source sends it once,
// then records of one byte and what belongs to it:
//
//	'O' kind u8, id u64              pages of this image follow
//	'P' vaddr u64, n u32, n pages    at most MaxRun of them
//	'Z' vaddr u64, n u32             pages that are all zero
//	'F' length u16, name, size u64, size bytes   a small image
//	'S'                              the destination answers when all before is stored
//	'E'                              the end; the same
//
// The destination answers 'S' and 'E' with a u16 length and so many bytes of
// text: none when all is well, otherwise what went wrong. It may answer so at any time, and
// then reads no more. An unknown magic or record is an error.
const Magic = "mosimg-pages-1\n"

const (
	recOpen  = 'O'
	recPages = 'P'
	recZero  = 'Z'
	recFile  = 'F'
	recSync  = 'S'
	recEnd   = 'E'
)

// maxName bounds the name of a small image.
const maxName = 255

// Writer sends pages and files as a stream. It is for one goroutine.
type Writer struct {
	w       *bufio.Writer
	r       io.Reader
	Bytes   uint64 // sent so far, without buffering
	Pages64 uint64 // pages with content sent so far
	Images  uint64 // images begun so far
	begun   bool
}

// NewWriter makes a Writer on a connection to Receive.
func NewWriter(conn io.ReadWriter) *Writer {
	// A run of MaxRun pages is larger than the buffer and goes past it.
	return &Writer{w: bufio.NewWriterSize(conn, 64<<10), r: conn}
}

func (w *Writer) put(b []byte) error {
	if !w.begun {
		w.begun = true
		if err := w.put([]byte(Magic)); err != nil {
			return err
		}
	}
	n, err := w.w.Write(b)
	w.Bytes += uint64(n)
	if err != nil {
		// The destination says why it reads no more, if it can.
		return errors.Join(fmt.Errorf("send pages: %w", fault.HungUp("the destination", err)), w.answer())
	}
	return nil
}

// Open implements Receiver.
func (w *Writer) Open(id ImageID) error {
	w.Images++
	return w.put(binary.BigEndian.AppendUint64([]byte{recOpen, byte(id.Kind)}, id.ID))
}

func runRecord(rec byte, vaddr uint64, n uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64([]byte{rec}, vaddr), n)
}

// Pages implements Receiver.
func (w *Writer) Pages(vaddr uint64, data []byte) error {
	if err := w.put(runRecord(recPages, vaddr, uint32(len(data)/Size))); err != nil {
		return err
	}
	w.Pages64 += uint64(len(data) / Size)
	return w.put(data)
}

// Zero implements Receiver.
func (w *Writer) Zero(vaddr uint64, n uint32) error { return w.put(runRecord(recZero, vaddr, n)) }

// File implements FileReceiver.
func (w *Writer) File(name string, size int64, data io.Reader) error {
	h := binary.BigEndian.AppendUint16([]byte{recFile}, uint16(len(name)))
	h = binary.BigEndian.AppendUint64(append(h, name...), uint64(size))
	if err := w.put(h); err != nil {
		return err
	}
	n, err := io.CopyN(w.w, data, size)
	w.Bytes += uint64(n)
	if err != nil {
		return fmt.Errorf("send %s: %w", name, err)
	}
	return nil
}

// Sync implements Receiver.
func (w *Writer) Sync() error { return w.ask(recSync) }

// End ends the stream; the destination has all of it when End returns nil.
func (w *Writer) End() error { return w.ask(recEnd) }

func (w *Writer) ask(rec byte) error {
	if err := w.put([]byte{rec}); err != nil {
		return err
	}
	if err := w.w.Flush(); err != nil {
		return errors.Join(fmt.Errorf("send pages: %w", fault.HungUp("the destination", err)), w.answer())
	}
	return w.answer()
}

// ErrDestination is what the destination says went wrong there.
var ErrDestination = errors.New("the destination")

func (w *Writer) answer() error {
	var head [2]byte
	if _, err := io.ReadFull(w.r, head[:]); err != nil {
		return fmt.Errorf("wait for the destination to have the pages: %w", fault.HungUp("it", err))
	}
	text := make([]byte, binary.BigEndian.Uint16(head[:]))
	if _, err := io.ReadFull(w.r, text); err != nil {
		return fmt.Errorf("wait for the destination to have the pages: %w", fault.HungUp("it", err))
	}
	if len(text) > 0 {
		return fmt.Errorf("%w: %s", ErrDestination, text)
	}
	return nil
}

// Receive reads a stream to its end, into to. What goes wrong is also told
// to the source.
func Receive(conn io.ReadWriter, to FileReceiver) error {
	err := receive(conn, to)
	if err != nil {
		return errors.Join(err, reply(conn, err))
	}
	return nil
}

func reply(w io.Writer, err error) error {
	var text string
	if err != nil {
		text = err.Error()
		if text = text[:min(len(text), 1<<10)]; text == "" {
			text = "unknown"
		}
	}
	_, werr := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(text))), text...))
	return werr
}

func receive(conn io.ReadWriter, to FileReceiver) error {
	r := bufio.NewReaderSize(conn, 64<<10)
	magic := make([]byte, len(Magic))
	if _, err := io.ReadFull(r, magic); err != nil {
		return fmt.Errorf("receive pages: %w", err)
	}
	if string(magic) != Magic {
		return fmt.Errorf("receive pages: the stream begins with %q; the source runs another version", magic)
	}
	buf := make([]byte, MaxRun*Size)
	opened := false
	for {
		rec, err := r.ReadByte()
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return fmt.Errorf("receive pages: %w", err)
		}
		switch rec {
		case recOpen:
			err = receiveOpen(r, to)
			opened = err == nil
		case recPages, recZero:
			if !opened {
				return errors.New("receive pages: a run without an image")
			}
			err = receiveRun(r, rec, buf, to)
		case recFile:
			err = receiveFile(r, to)
		case recSync, recEnd:
			if err := to.Sync(); err != nil {
				return err
			}
			if err := reply(conn, nil); err != nil {
				return fmt.Errorf("receive pages: %w", err)
			}
			if rec == recEnd {
				return nil
			}
		default:
			return fmt.Errorf("receive pages: record %#x; the source runs another version", rec)
		}
		if err != nil {
			return fmt.Errorf("receive pages: %w", err)
		}
	}
}

func receiveOpen(r io.Reader, to Receiver) error {
	var b [9]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	id := ImageID{Kind: Kind(b[0]), ID: binary.BigEndian.Uint64(b[1:])}
	if err := id.check(); err != nil {
		return err
	}
	return to.Open(id)
}

func receiveRun(r io.Reader, rec byte, buf []byte, to Receiver) error {
	var b [12]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	vaddr, n := binary.BigEndian.Uint64(b[:]), binary.BigEndian.Uint32(b[8:])
	if err := checkRun(vaddr, n); err != nil {
		return err
	}
	if n > MaxRun {
		return fmt.Errorf("run of %d pages; %d is the most", n, MaxRun)
	}
	if rec == recZero {
		return to.Zero(vaddr, n)
	}
	if _, err := io.ReadFull(r, buf[:n*Size]); err != nil {
		return err
	}
	return to.Pages(vaddr, buf[:n*Size])
}

func receiveFile(r io.Reader, to FileReceiver) error {
	var b [8]byte
	if _, err := io.ReadFull(r, b[:2]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint16(b[:])
	if n == 0 || n > maxName {
		return fmt.Errorf("file name of %d bytes", n)
	}
	name := make([]byte, n)
	if _, err := io.ReadFull(r, name); err != nil {
		return err
	}
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return err
	}
	size := binary.BigEndian.Uint64(b[:])
	if size > 1<<62 {
		return fmt.Errorf("file of %d bytes", size)
	}
	data := &io.LimitedReader{R: r, N: int64(size)}
	if err := to.File(string(name), int64(size), data); err != nil {
		return err
	}
	if data.N != 0 {
		return fmt.Errorf("file %q ended %d bytes early", name, data.N)
	}
	return nil
}
