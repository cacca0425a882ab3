package capsule

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"mosimg/agent/capsule/control"
)

// maxFrame bounds a frame from the shim, which sends 64 KiB at most.
const maxFrame = 1 << 20

// Output is a job's stdout or stderr, read from an offset on. The shim keeps
// every byte until it is acknowledged, so a reader that fails can begin again
// where it was.
type Output struct {
	conn net.Conn
	rest int // bytes of the current frame that were not read yet
}

// Output opens verb Stdout or Stderr at an offset. It takes the stream away from a
// reader before.
func (c *Capsule) Output(ctx context.Context, verb control.Verb, from uint64) (*Output, error) {
	conn, _, err := c.openStream(ctx, control.Request{Verb: verb, Offset: from})
	if err != nil {
		return nil, err
	}
	return &Output{conn: conn}, nil
}

func (c *Capsule) openStream(ctx context.Context, req control.Request) (net.Conn, control.Answer, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, control.Answer{}, err
	}
	a, err := c.exchange(ctx, conn, req)
	if err != nil {
		conn.Close()
		return nil, a, err
	}
	return conn, a, nil
}

// Read reads the stream. io.EOF is its true end; a shim that went away, or a
// job that moved, is io.ErrUnexpectedEOF or another error.
func (o *Output) Read(p []byte) (int, error) {
	if o.rest == 0 {
		var head [4]byte
		if _, err := io.ReadFull(o.conn, head[:]); err != nil {
			return 0, broken(err)
		}
		n := binary.BigEndian.Uint32(head[:])
		if n == 0 {
			return 0, io.EOF
		}
		if n > maxFrame {
			return 0, fmt.Errorf("frame of %d bytes; %d is the most", n, maxFrame)
		}
		o.rest = int(n)
	}
	n, err := o.conn.Read(p[:min(len(p), o.rest)])
	o.rest -= n
	return n, broken(err)
}

func broken(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Acknowledge lets the shim forget all bytes before offset.
func (o *Output) Acknowledge(offset uint64) error {
	_, err := o.conn.Write(binary.BigEndian.AppendUint64(nil, offset))
	return err
}

// Close ends the reading; the stream stays.
func (o *Output) Close() error { return o.conn.Close() }

// Input is a job's stdin.
type Input struct {
	conn net.Conn
	// Offset is the number of bytes that the job's pipe had taken when the
	// stream was opened: what follows is wanted.
	Offset uint64
	// Over says that the end of the stream was taken. It is how to know that after
	// CloseWrite: a connection that breaks looks as one that is done.
	Over bool
}

// Input opens the job's stdin. It takes the stream away from a writer before.
func (c *Capsule) Input(ctx context.Context) (*Input, error) {
	conn, a, err := c.openStream(ctx, control.Request{Verb: control.Stdin})
	if err != nil {
		return nil, err
	}
	return &Input{conn: conn, Offset: a.Offset, Over: a.Over}, nil
}

// Write sends bytes. That they were sent does not mean that the job's pipe has taken
// them: see Acknowledged.
func (i *Input) Write(p []byte) (int, error) {
	sent := 0
	for len(p) > 0 {
		n := min(len(p), maxFrame)
		bufs := net.Buffers{binary.BigEndian.AppendUint32(nil, uint32(n)), p[:n]}
		if _, err := bufs.WriteTo(i.conn); err != nil {
			return sent, err
		}
		sent, p = sent+n, p[n:]
	}
	return sent, nil
}

// CloseWrite ends the stream: the job reads its end after the last byte.
func (i *Input) CloseWrite() error {
	_, err := i.conn.Write(make([]byte, 4))
	return err
}

// Acknowledged waits for the next word on how many bytes of the stream, from
// its very beginning, the job's pipe has taken. io.EOF comes after the
// end of the stream was taken, or when the stream is broken.
func (i *Input) Acknowledged() (uint64, error) {
	var b [8]byte
	if _, err := io.ReadFull(i.conn, b[:]); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b[:]), nil
}

// Close breaks the connection; the stream stays open.
func (i *Input) Close() error { return i.conn.Close() }
