package jobs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"mosimg/agent/capsule"
	"mosimg/agent/capsule/control"
	"mosimg/agent/jobs/wire"
)

// openTime bounds the opening of a stream.
const openTime = 10 * time.Second

// output is the job's stdout or stderr on its way to a mosrun. The shim keeps
// all that mosrun has not acknowledged, so what is on the way may be lost. It is also what
// bounds how much is on the way.
type output struct {
	kind wire.Kind
	verb control.Verb

	mu   sync.Mutex // guards the following
	sent uint64     // all bytes before it were sent, or are about to be; changed by drain only
	// acked: mosrun has written all bytes before it. It may be more than was sent: what
	// came by a connection before this one.
	acked  uint64
	closed bool            // nobody reads mosrun's end any more
	from   *capsule.Output // open now; nil if none is
	told   uint64          // how much of acked the shim there was told
}

// drain carries a stream to its end, from wherever the job is. An error is of
// mosrun's connection.
func (s *session) drain(o *output) error {
	wait := newPause()
	for {
		p, err := s.j.awaitPlace(s.ctx)
		if errors.Is(err, errLost) {
			break
		}
		if err != nil {
			return err
		}
		before := o.sent
		ended, err := s.pump(o, p)
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if ended {
			break
		}
		if o.sent > before {
			wait.reset()
		}
		s.j.s.log.Debug("an output stream is opened again", "job", s.j.id, "stream", o.verb, "at", o.sent, "why", err)
		if !wait.wait(s.ctx, p.ctx.Done()) {
			return context.Cause(s.ctx)
		}
	}
	return wire.WriteData(s.conn, o.kind, o.sent, nil)
}

// pump carries a stream from one place until it breaks or ends.
func (s *session) pump(o *output, p *place) (ended bool, err error) {
	c, ctx, cancel, err := s.j.capsule(s.ctx, p, openTime)
	if err != nil {
		return false, err
	}
	defer cancel()
	from, err := c.Output(ctx, o.verb, o.sent)
	if err != nil {
		return false, err
	}
	defer func() { _ = from.Close() }()
	defer context.AfterFunc(p.ctx, func() { _ = from.Close() })()
	defer context.AfterFunc(s.ctx, func() { _ = from.Close() })()
	if err := o.open(from); err != nil {
		return false, err
	}
	defer o.open(nil) //nolint:errcheck // nothing is said to nobody
	buf := make([]byte, wire.MaxData)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			at := o.sent
			o.mu.Lock()
			o.sent += uint64(n)
			err := o.tell()
			o.mu.Unlock()
			if err := wire.WriteData(s.conn, o.kind, at, buf[:n]); err != nil {
				s.cancel()
				return false, err
			}
			if err != nil {
				return false, err
			}
		}
		if errors.Is(err, io.EOF) {
			// The frozen copy that a move leaves behind ends its streams too, when it
			// is killed; by then it is the job no more.
			rec, rerr := s.j.s.conf.Home.Job(s.j.id)
			return rerr == nil && rec.At == p.at, err
		}
		if err != nil {
			return false, err
		}
	}
}

// open makes from the stream's source; what it was not told yet, it is told.
func (o *output) open(from *capsule.Output) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.from, o.told = from, 0
	return o.tell()
}

// tell tells the shim what it may forget, but nothing that it has yet to send; mu is held.
func (o *output) tell() error {
	if o.from == nil {
		return nil
	}
	if at := min(o.acked, o.sent); at > o.told {
		if err := o.from.Acknowledge(at); err != nil {
			return err
		}
		o.told = at
	}
	if o.closed && o.told != control.Closed {
		o.told = control.Closed
		return o.from.Acknowledge(control.Closed)
	}
	return nil
}

// acknowledge notes how much of a stream mosrun has written out.
func (s *session) acknowledge(stream wire.Kind, at uint64) error {
	o := s.out[stream]
	if o == nil {
		return fmt.Errorf("acknowledgement of stream %d", stream)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if at == wire.Closed {
		o.closed = true
	} else {
		o.acked = max(o.acked, at)
	}
	_ = o.tell() // a stream that is broken is opened again
	return nil
}
