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

	mu     sync.Mutex      // guards the following
	sent   uint64          // all bytes before it were sent; grows in drain only
	acked  uint64          // mosrun has written all bytes before it
	closed bool            // nobody reads mosrun's end any more
	from   *capsule.Output // open now; nil if none is
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
	defer from.Close()
	defer context.AfterFunc(p.ctx, func() { from.Close() })()
	defer context.AfterFunc(s.ctx, func() { from.Close() })()
	if err := o.open(from); err != nil {
		return false, err
	}
	defer o.open(nil) //nolint:errcheck // nothing is said to nobody
	buf := make([]byte, wire.MaxData)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if err := wire.WriteData(s.conn, o.kind, o.sent, buf[:n]); err != nil {
				s.cancel()
				return false, err
			}
			o.mu.Lock()
			o.sent += uint64(n)
			o.mu.Unlock()
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
	o.from = from
	var err error
	if from != nil && o.acked > 0 {
		err = from.Acknowledge(o.acked)
	}
	if from != nil && o.closed {
		err = errors.Join(err, from.Acknowledge(control.Closed))
	}
	return err
}

// acknowledge notes how much of a stream mosrun has written out.
func (s *session) acknowledge(stream wire.Kind, at uint64) error {
	o := s.out[stream]
	if o == nil {
		return fmt.Errorf("acknowledgement of stream %d", stream)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case at == wire.Closed && o.closed:
		return nil
	case at == wire.Closed:
		o.closed = true
	case at > o.sent:
		return fmt.Errorf("acknowledgement of %d bytes; %d were sent", at, o.sent)
	case at <= o.acked:
		return nil
	default:
		o.acked = at
	}
	if o.from != nil {
		_ = o.from.Acknowledge(at) // a stream that is broken is opened again
	}
	return nil
}
