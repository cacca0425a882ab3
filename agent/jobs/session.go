package jobs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/agent/jobs/wire"
)

// helloTime bounds the wait for a mosrun's first message.
const helloTime = 10 * time.Second

// session is one attached mosrun. What it carries it keeps at both ends only: a
// session that breaks is no loss.
type session struct {
	j      *job
	conn   net.Conn // each message is one Write, and so is never within another
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // closes when nothing of it is left

	in    *input
	out   map[wire.Kind]*output
	words chan word // of others to this mosrun
}

// word is a message that is no part of a stream.
type word struct {
	kind wire.Kind
	body []byte
}

// maxWords is how many wait for a mosrun that does not read: it is stopped, and
// one word or two is all that comes in that time.
const maxWords = 16

// attach serves a mosrun until its connection breaks, another one takes its
// place, or the job's end was taken.
func (j *job) attach(ctx context.Context, conn net.Conn) error {
	s := &session{j: j, conn: conn, done: make(chan struct{}), words: make(chan word, maxWords)}
	s.ctx, s.cancel = context.WithCancel(ctx)
	defer close(s.done)
	defer s.cancel()
	stop := context.AfterFunc(s.ctx, func() { conn.Close() })
	defer stop()

	if err := conn.SetReadDeadline(time.Now().Add(helloTime)); err != nil {
		return err
	}
	m, err := wire.Read(conn)
	var hello wire.Hello
	if err == nil && m.Kind != wire.KindHello {
		err = fmt.Errorf("it began with a message of kind %d", m.Kind)
	}
	if err == nil {
		err = m.JSON(&hello)
	}
	if err == nil {
		err = conn.SetReadDeadline(time.Time{})
	}
	if err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	s.in = newInput(hello.Stdin, j.infoNow().NoStdin)
	s.out = map[wire.Kind]*output{
		// What it has written out it does not acknowledge again, and the shim may not have heard.
		wire.KindStdout: {kind: wire.KindStdout, verb: control.Stdout, sent: hello.Stdout, acked: hello.Stdout},
		wire.KindStderr: {kind: wire.KindStderr, verb: control.Stderr, sent: hello.Stderr, acked: hello.Stderr},
	}
	var old *session
	j.change(func() { old, j.session = j.session, s })
	defer j.change(func() {
		if j.session == s {
			j.session = nil
		}
	})
	if old != nil {
		// Only one may give acknowledgements and stdin at a time.
		old.cancel()
		<-old.done
	}
	return s.run(hello)
}

// run carries all streams, each in its own goroutine.
func (s *session) run(hello wire.Hello) error {
	if err := wire.WriteOffset(s.conn, wire.KindStdinTaken, hello.Stdin); err != nil {
		return err
	}
	var work, streams sync.WaitGroup
	defer work.Wait()
	defer s.cancel()
	fail := make(chan error, 1) // the first failure is the reason
	try := func(err error) {
		select {
		case fail <- err:
		default:
		}
		s.cancel()
	}
	for _, o := range s.out {
		streams.Add(1)
		work.Go(func() {
			defer streams.Done()
			if err := s.drain(o); err != nil {
				try(err)
			}
		})
	}
	work.Go(func() {
		if err := s.feed(); err != nil {
			try(err)
		}
	})
	work.Go(func() {
		for {
			select {
			case w := <-s.words:
				if err := wire.Write(s.conn, w.kind, w.body); err != nil {
					try(err)
					return
				}
			case <-s.ctx.Done():
				return
			}
		}
	})
	work.Go(func() {
		streams.Wait()
		if err := s.end(); err != nil {
			try(err)
		}
	})
	err := s.receive()
	select {
	case first := <-fail:
		return first
	default:
		return err
	}
}

// tell says something to the mosrun, without waiting for it.
func (s *session) tell(kind wire.Kind, body []byte) {
	select {
	case s.words <- word{kind, body}:
	default:
		s.j.s.log.Warn("mosrun does not read what it is told", "job", s.j.id, "kind", kind)
	}
}

// end tells how the job ended, once both streams have.
func (s *session) end() error {
	rec, err := s.j.awaitEnd(s.ctx)
	if err != nil {
		return err
	}
	return wire.WriteJSON(s.conn, wire.KindEnded, wire.End{Exit: rec.End.Exit, Signal: rec.End.Signal, Lost: rec.End.Lost})
}

// order passes an order on to the job, and tells at once of one that was heard before.
func (s *session) order(o order) {
	heard := s.j.order(o)
	if o.id == 0 || o.id > heard {
		return
	}
	if o.verb == control.Stop { // the one that it was told to may have gone before it heard
		s.tell(wire.KindStopped, nil)
	}
	s.tellHeard(heard)
}

func (s *session) tellHeard(id uint64) {
	s.tell(wire.KindHeard, binary.BigEndian.AppendUint64(nil, id))
}

// errUnasked is a mosrun that is done with a job that has not ended.
var errUnasked = errors.New("it takes an end that it was not told")

// receive takes messages until the connection breaks or the end was taken.
func (s *session) receive() error {
	for {
		m, err := wire.Read(s.conn)
		if err != nil {
			return err
		}
		switch m.Kind {
		case wire.KindStdin:
			var at uint64
			var data []byte
			if at, data, err = m.Data(); err == nil {
				err = s.in.receive(at, data)
			}
		case wire.KindAck:
			var stream wire.Kind
			var at uint64
			if stream, at, err = m.Ack(); err == nil {
				err = s.acknowledge(stream, at)
			}
		case wire.KindSignal:
			var sig wire.Signal
			if err = m.JSON(&sig); err != nil {
				break
			}
			if sig.Number < 1 || sig.Number > lastSignal {
				err = fmt.Errorf("signal %d", sig.Number)
				break
			}
			s.order(order{verb: control.Signal, signal: unix.Signal(sig.Number), group: sig.Group, id: sig.ID})
		case wire.KindStop, wire.KindCont:
			var o wire.Order
			if o, err = m.Order(); err != nil {
				break
			}
			verb := control.Stop
			if m.Kind == wire.KindCont {
				verb = control.Cont
			}
			s.order(order{verb: verb, id: o.ID})
		case wire.KindDone:
			s.j.change(func() {
				if s.j.rec.End == nil {
					err = errUnasked
				} else {
					s.j.taken = true
				}
			})
			if err == nil {
				return nil
			}
		default:
			err = fmt.Errorf("message of kind %d", m.Kind)
		}
		if err != nil {
			return err
		}
	}
}
