package client

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"mosimg/agent/jobs/wire"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
	"mosimg/internal/upgrade"
)

// How long to wait before the agent is tried again: an agent that restarts is
// back within a second or so, one that was stopped by an operator may be
// away for days.
const (
	firstWait = 20 * time.Millisecond
	lastWait  = time.Second
)

// noteAfter is how long the agent may be away before the user is told.
const noteAfter = 5 * time.Second

// farewell is how long the end of a session tries to tell the agent that the
// end was taken; otherwise the agent finds out that this process is gone.
const farewell = 2 * time.Second

// Config is what a Session carries between.
type Config struct {
	Agent Agent
	Job   string
	// Stdin, Stdout and Stderr are descriptors, which stay the caller's. A Stdin
	// of -1 is an empty one.
	Stdin, Stdout, Stderr int
	// Note shows the user a line; nil means that nobody wants it.
	Note func(string)
	Log  *slog.Logger // nil is silent
}

// Result is how a session ended.
type Result struct {
	wire.End
	// Stdout and Stderr are why not all of a stream could be written; EPIPE
	// when its reader is gone.
	Stdout, Stderr error
}

// Session is a mosrun that runs. Its methods may be called from any goroutine,
// also before and after Run.
type Session struct {
	cfg            Config
	in             *input
	stdout, stderr *output
	wake           chan struct{} // one token: there is something to send

	mu       sync.Mutex // guards the following
	orders   []order    // in the order given; one is dropped once it is heard
	ordered  uint64     // ID of the last one
	sent     uint64     // ID of the last one that was sent by this connection
	over     bool       // done is to be sent
	finished bool       // done was sent
	stopped  chan struct{}
}

// order is a signal, stop or cont. It is kept until the agent has said that it
// was heard, and is sent again to the next agent, which may have not.
type order struct {
	id     uint64
	kind   wire.Kind
	signal wire.Signal // without its ID
	sent   bool        // once at least: it may have been heard
}

// New makes a session with a job that was started.
func New(cfg Config) (*Session, error) {
	if cfg.Note == nil {
		cfg.Note = func(string) {}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	s := &Session{cfg: cfg, wake: make(chan struct{}, 1), stopped: make(chan struct{}, 1)}
	s.stdout = newOutput(wire.KindStdout, cfg.Stdout, s.poke)
	s.stderr = newOutput(wire.KindStderr, cfg.Stderr, s.poke)
	var err error
	s.in, err = newInput(cfg.Stdin, s.poke)
	return s, err
}

// poke makes the sender look for something to send.
func (s *Session) poke() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Signal sends a signal to the job's program, or to its process group. As with the
// kernel's, one that is still on its way is not sent twice.
func (s *Session) Signal(number int, group bool) {
	s.order(order{kind: wire.KindSignal, signal: wire.Signal{Number: number, Group: group}})
}

// Stop freezes the job and waits until it stands still or ctx ends.
func (s *Session) Stop(ctx context.Context) error {
	select {
	case <-s.stopped: // from a stop that was not waited for
	default:
	}
	s.order(order{kind: wire.KindStop})
	select {
	case <-s.stopped:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Cont lets a frozen job run on.
func (s *Session) Cont() {
	s.mu.Lock()
	// A stop that was not sent yet is no longer wanted.
	s.orders = slices.DeleteFunc(s.orders, func(o order) bool { return o.kind == wire.KindStop && !o.sent })
	s.mu.Unlock()
	s.order(order{kind: wire.KindCont})
}

func (s *Session) order(o order) {
	s.mu.Lock()
	if !slices.ContainsFunc(s.orders, func(old order) bool { return !old.sent && old.kind == o.kind && old.signal == o.signal }) {
		s.ordered++
		o.id = s.ordered
		s.orders = append(s.orders, o)
	}
	s.mu.Unlock()
	s.poke()
}

// heard drops the orders that need not be sent again.
func (s *Session) heard(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.orders = slices.DeleteFunc(s.orders, func(o order) bool { return o.id <= id })
}

// errEnded says that the job's end arrived and was taken.
var errEnded = errors.New("the job has ended")

// Run carries until the job has ended and all that it wrote is written, and
// the agent was told so. A connection that breaks is made again for as long
// as it takes. Only the end of ctx is an error: all else that may end a job is in
// the Result.
func (s *Session) Run(ctx context.Context) (Result, error) {
	go s.in.run()
	defer s.in.stop()
	for _, o := range []*output{s.stdout, s.stderr} {
		go o.run()
		defer o.stop()
	}
	var end *wire.End
	away := s.awayNote()
	defer away.stop()
	parting := false
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		heard, err := s.attach(ctx, &end, away)
		switch {
		case end != nil && (errors.Is(err, errEnded) || ctx.Err() != nil || refusal(err) != nil):
			return Result{End: *end, Stdout: s.stdout.drain(), Stderr: s.stderr.drain()}, nil
		case ctx.Err() != nil:
			return Result{}, context.Cause(ctx)
		case refusal(err) != nil:
			lost := Result{End: wire.End{Lost: refusal(err).Error()}}
			lost.Stdout, lost.Stderr = s.stdout.drain(), s.stderr.drain()
			return lost, nil
		}
		if end != nil && !parting {
			// Only the farewell is left to be said.
			parting = true
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, farewell)
			defer cancel()
		}
		away.start(err)
		s.cfg.Log.Info("the connection to the agent broke", "job", s.cfg.Job, "error", err)
		if heard {
			wait = firstWait
		}
		pause(ctx, wait)
	}
}

// refusal is an agent's answer that asking again will not change: it does not
// know the job, or it is another user's. Otherwise it is nil.
func refusal(err error) error {
	var r *unixhttp.Remote
	if errors.As(err, &r) && (r.Kind == fault.NotFound || r.Kind == fault.Refused) {
		return r
	}
	return nil
}

// attach is one connection, from hello to its break. heard tells that the
// agent spoke rightly. It sets *end when the job has ended.
func (s *Session) attach(ctx context.Context, end **wire.End, away *awayNote) (heard bool, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", s.cfg.Agent.Socket)
	if err != nil {
		return false, err
	}
	path, err := jobPath(s.cfg.Job, "/attach")
	if err != nil {
		return false, err
	}
	if conn, err = upgrade.Dial(ctx, conn, path, api.UpgradeJob); err != nil {
		return false, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()

	hello := wire.Hello{Stdout: s.stdout.attach(), Stderr: s.stderr.attach(), Stdin: s.in.known()}
	if err := wire.WriteJSON(conn, wire.KindHello, hello); err != nil {
		return false, err
	}
	r := bufio.NewReaderSize(conn, wire.MaxBody)
	first, err := wire.Read(r)
	if err != nil {
		return false, err
	}
	if first.Kind != wire.KindStdinTaken {
		return false, fmt.Errorf("the agent began with a message of kind %d", first.Kind)
	}
	taken, err := first.Offset()
	if err == nil {
		err = s.in.attach(taken)
	}
	if err != nil {
		return false, err
	}
	away.stop()
	s.mu.Lock()
	s.sent = 0 // what was not heard is sent again
	s.mu.Unlock()

	// The sender has the connection to itself, so that a message is never
	// within another, and so that one that is waiting for a full socket does not
	// keep us from reading.
	sending := make(chan error, 1)
	gone := make(chan struct{})
	go func() {
		err := s.send(conn, gone)
		conn.Close()
		sending <- err
	}()
	err = s.receive(r, end)
	if errors.Is(err, errEnded) {
		// The bytes came before their end: they are ours to write, however
		// the connection fares.
		_, _ = s.stdout.drain(), s.stderr.drain()
		conn.SetWriteDeadline(time.Now().Add(farewell))
		s.mu.Lock()
		s.over = true
		s.mu.Unlock()
		s.poke()
	} else {
		close(gone)
		conn.Close()
	}
	if sent := <-sending; sent == nil {
		err = errEnded // done is on its way: there is nothing left to say
	} else if errors.Is(err, errEnded) {
		err = sent
	}
	return true, err
}

// send sends what there is to send until done is sent, the connection breaks or
// gone is closed.
func (s *Session) send(conn net.Conn, gone <-chan struct{}) error {
	for {
		sent, err := s.sendNext(conn)
		if err != nil {
			return err
		}
		if sent {
			s.mu.Lock()
			finished := s.finished
			s.mu.Unlock()
			if finished {
				return nil
			}
			continue
		}
		select {
		case <-s.wake:
		case <-gone:
			return net.ErrClosed
		}
	}
}

// sendNext sends one message, if there is one: orders first, because a user
// waits for them, then acknowledgements, because the job may, then stdin.
func (s *Session) sendNext(w io.Writer) (sent bool, err error) {
	s.mu.Lock()
	if s.over {
		s.mu.Unlock()
		if err := wire.Write(w, wire.KindDone, nil); err != nil {
			return false, err
		}
		s.mu.Lock()
		s.finished = true
		s.mu.Unlock()
		return true, nil
	}
	var o order
	if i := slices.IndexFunc(s.orders, func(o order) bool { return o.id > s.sent }); i >= 0 {
		s.orders[i].sent = true // before it is: what fails may have arrived
		o = s.orders[i]
		s.sent = o.id
	}
	s.mu.Unlock()
	if o.id != 0 {
		o.signal.ID = o.id
		if o.kind == wire.KindSignal {
			return true, wire.WriteJSON(w, o.kind, o.signal)
		}
		return true, wire.WriteJSON(w, o.kind, o.signal.Order)
	}
	for _, out := range []*output{s.stdout, s.stderr} {
		if offset, due := out.ack(); due {
			return true, wire.WriteAck(w, out.kind, offset)
		}
	}
	if offset, data, due := s.in.next(); due {
		return true, wire.WriteData(w, wire.KindStdin, offset, data)
	}
	return false, nil
}

// receive takes messages until the connection breaks, or errEnded.
func (s *Session) receive(r io.Reader, end **wire.End) error {
	for {
		m, err := wire.Read(r)
		if err != nil {
			return err
		}
		switch m.Kind {
		case wire.KindStdout, wire.KindStderr:
			var offset uint64
			var data []byte
			if offset, data, err = m.Data(); err != nil {
				break
			}
			out := s.stdout
			if m.Kind == wire.KindStderr {
				out = s.stderr
			}
			err = out.receive(offset, data)
		case wire.KindStdinTaken:
			var offset uint64
			if offset, err = m.Offset(); err == nil {
				err = s.in.take(offset)
			}
		case wire.KindStopped:
			select {
			case s.stopped <- struct{}{}:
			default:
			}
		case wire.KindHeard:
			var id uint64
			if id, err = m.Offset(); err == nil {
				s.heard(id)
			}
		case wire.KindNote:
			s.cfg.Note(string(m.Body))
		case wire.KindEnded:
			var e wire.End
			if err = m.JSON(&e); err == nil {
				*end = &e
				return errEnded
			}
		default:
			// A newer agent may say more than we know of; what we must
			// understand it does not say without being asked.
		}
		if err != nil {
			return err
		}
	}
}

// awayNote tells the user once, in each outage that lasts, that the agent is
// away.
type awayNote struct {
	note func(string)

	mu    sync.Mutex // guards the following
	cause error
	timer *time.Timer
}

func (s *Session) awayNote() *awayNote { return &awayNote{note: s.cfg.Note} }

func (a *awayNote) start(cause error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cause = cause
	if a.timer == nil {
		a.timer = time.AfterFunc(noteAfter, a.say)
	}
}

func (a *awayNote) say() {
	a.mu.Lock()
	cause := a.cause
	a.mu.Unlock()
	text := "the agent does not answer; the job goes on, waiting"
	// That nobody listens, or hung up, is what the sentence says already.
	if !errors.Is(cause, syscall.ECONNREFUSED) && !errors.Is(cause, syscall.ENOENT) && !errors.Is(cause, io.EOF) {
		text += " (" + cause.Error() + ")"
	}
	a.note(text)
}

// stop ends an outage, of which there need be none.
func (a *awayNote) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.timer != nil {
		a.timer.Stop()
		a.timer = nil
	}
}
