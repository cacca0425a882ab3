package jobs

import (
	"context"
	"fmt"
	"sync"

	"mosimg/agent/capsule"
	"mosimg/agent/jobs/wire"
)

// input is stdin on its way from a mosrun to the job. What was received and is
// not yet with the job is kept, to be sent again to wherever the job is then.
type input struct {
	mu      sync.Mutex    // guards the following
	changed chan struct{} // closed, and replaced, when any of it changes
	base    uint64        // the job has all bytes before it
	kept    []byte        // bytes [base, base+len(kept))
	eof     bool          // nothing follows kept
}

func newInput(base uint64, eof bool) *input {
	return &input{base: base, eof: eof, changed: make(chan struct{})}
}

// wake wakes who waits in next; mu is held.
func (i *input) wake() {
	close(i.changed)
	i.changed = make(chan struct{})
}

// receive takes a piece of the stream from mosrun; an empty one is its end.
func (i *input) receive(at uint64, data []byte) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	end := i.base + uint64(len(i.kept))
	switch {
	case i.eof && len(data) == 0:
		return nil
	case i.eof:
		return fmt.Errorf("stdin goes on after its end")
	case at > end:
		return fmt.Errorf("stdin at byte %d; byte %d comes next", at, end)
	case len(data) == 0 && at < end:
		return fmt.Errorf("the end of stdin at byte %d; %d bytes came", at, end)
	case len(data) == 0:
		i.eof = true
	default:
		// What the job had already when it was asked may come again.
		if skip := end - at; skip < uint64(len(data)) {
			data = data[skip:]
		} else {
			return nil
		}
		if len(i.kept)+len(data) > wire.StdinWindow {
			return fmt.Errorf("more than %d bytes of stdin that were not asked for", wire.StdinWindow)
		}
		i.kept = append(i.kept, data...)
	}
	i.wake()
	return nil
}

// take notes that the job has all bytes before at.
func (i *input) take(at uint64) (grew bool, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case at < i.base:
		return false, fmt.Errorf("the job has %d bytes of stdin; mosrun has forgotten %d", at, i.base)
	case at == i.base:
		return false, nil
	}
	// The job may have more than we got from this mosrun's connection.
	n := min(at-i.base, uint64(len(i.kept)))
	i.kept = append([]byte(nil), i.kept[n:]...)
	i.base = at
	return true, nil
}

// next is what follows byte at, or that the stream ends there, or what to wait for.
func (i *input) next(at uint64) (data []byte, end bool, changed <-chan struct{}, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if at < i.base {
		return nil, false, nil, fmt.Errorf("the job's node says that it has %d bytes of stdin; it was sent %d", i.base, at)
	}
	rest := i.kept[at-i.base:]
	if n := min(len(rest), wire.MaxData); n > 0 {
		return append(data, rest[:n]...), false, nil, nil
	}
	return nil, i.eof, i.changed, nil
}

// feed carries stdin to wherever the job is, until the job has its end or has
// ended. An error is of mosrun's connection.
func (s *session) feed() error {
	wait := newPause()
	for {
		p, err := s.j.awaitPlace(s.ctx)
		if err != nil {
			return nil // the outputs tell
		}
		fed, over, err := s.feedTo(p)
		if s.ctx.Err() != nil || over {
			return nil
		}
		if s.j.ended() {
			return nil
		}
		if fed {
			wait.reset()
		}
		s.j.s.log.Debug("stdin is opened again", "job", s.j.id, "why", err)
		if !wait.wait(s.ctx, p.ctx.Done()) {
			return nil
		}
	}
}

func (j *job) ended() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.rec.End != nil
}

// feedTo carries stdin to one place until that breaks. over tells that the job
// has all of it and its end; fed that something was taken.
func (s *session) feedTo(p *place) (fed, over bool, err error) {
	c, ctx, cancel, err := s.j.capsule(s.ctx, p, openTime)
	if err != nil {
		return false, false, err
	}
	defer cancel()
	to, err := c.Input(ctx)
	if err != nil {
		return false, false, err
	}
	fed, err = s.took(to.Offset)
	if err != nil || to.Over {
		_ = to.Close()
		return fed, to.Over, err
	}
	stopPlace := context.AfterFunc(p.ctx, func() { _ = to.Close() })
	defer stopPlace()
	stopSession := context.AfterFunc(s.ctx, func() { _ = to.Close() })
	defer stopSession()

	broken := make(chan struct{})
	var more bool
	var rerr error
	go func() {
		defer close(broken)
		for {
			at, err := to.Acknowledged()
			if err != nil {
				return
			}
			if _, err := s.took(at); err != nil {
				rerr = err
				_ = to.Close()
				return
			}
			more = true
		}
	}()
	err = s.write(to, broken)
	_ = to.Close()
	<-broken
	if rerr != nil {
		err = rerr
	}
	return fed || more, false, err
}

// write writes to the job's stdin until that is broken, or its end was written.
// Then the connection ends, and whether the end was taken is seen when it
// is opened anew.
func (s *session) write(to *capsule.Input, broken <-chan struct{}) error {
	sent := to.Offset
	for {
		data, end, changed, err := s.in.next(sent)
		switch {
		case err != nil:
			return err
		case len(data) > 0:
			if _, err := to.Write(data); err != nil {
				return err
			}
			sent += uint64(len(data))
			continue
		case end:
			err := to.CloseWrite()
			if err == nil {
				<-broken
			}
			return err
		}
		select {
		case <-changed:
		case <-broken:
			return fmt.Errorf("stdin broke at byte %d", sent)
		}
	}
}

// took notes that the job has all bytes of stdin before at, and tells mosrun.
func (s *session) took(at uint64) (grew bool, err error) {
	if grew, err = s.in.take(at); !grew || err != nil {
		if err != nil {
			s.j.s.log.Warn("stdin", "job", s.j.id, "err", err)
			s.cancel()
		}
		return grew, err
	}
	if err = wire.WriteOffset(s.conn, wire.KindStdinTaken, at); err != nil {
		s.cancel()
	}
	return grew, err
}
