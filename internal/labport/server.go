package labport

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
)

var (
	errKilled  = errors.New("killed by the host")
	errSession = errors.New("the host began a new session")
)

// Serve answers on the guest's end of a port until it ends or ctx does. It
// runs what it is told with the rights of this process.
func Serve(ctx context.Context, rw io.ReadWriter, log *slog.Logger) error {
	return ServeMachine(ctx, rw, Local{}, log)
}

// ServeMachine is Serve for any machine. With a Client it is a relay: it lets
// several processes of the host share one port.
func ServeMachine(ctx context.Context, rw io.ReadWriter, m Machine, log *slog.Logger) error {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	s := &server{ctx: ctx, machine: m, log: log, wire: &wire{w: rw}, greeted: make(chan struct{}), ops: make(map[int64]*serverOp)}
	defer s.wait.Wait()
	defer cancel(io.EOF)

	done := make(chan error, 1)
	go func() {
		defer close(s.greeted)
		// The writer may block until a host is there, so this is not
		// done before the reader runs.
		if err := s.wire.resync(); err == nil {
			s.wire.send(message{Op: opReady, Version: protocolVersion})
		}
	}()
	go func() { done <- readLines(rw, s.take) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		// A port that cannot be interrupted keeps its reader; it holds
		// nothing but the port.
		if c, ok := rw.(io.Closer); ok {
			c.Close()
		}
		return context.Cause(ctx)
	}
}

type server struct {
	ctx     context.Context
	machine Machine
	log     *slog.Logger
	wire    *wire
	wait    sync.WaitGroup
	greeted chan struct{} // closed when opReady was sent

	mu      sync.Mutex // guards the following
	session string
	ops     map[int64]*serverOp // running operations of the current session
}

// serverOp is one running operation.
type serverOp struct {
	cancel   context.CancelCauseFunc
	in       chan message // data for it; has room for a whole window
	out, err *stream
}

func (s *server) take(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	op := s.ops[m.ID]
	switch m.Op {
	case opHello:
		// A hello may be repeated before its answer arrives; the session
		// has begun by then, perhaps with operations.
		if m.Session != s.session {
			s.session = m.Session
			for id, op := range s.ops {
				op.cancel(errSession)
				delete(s.ops, id)
			}
			s.log.Debug("lab port: new session", "session", m.Session)
		}
		// Not from here: a write may block, and then nothing is read.
		go func() {
			// After our own greeting: the host takes one that comes
			// later for a restart, and gives up what it began.
			<-s.greeted
			s.wire.send(message{Op: opHello, Session: m.Session, Version: protocolVersion})
		}()
	case opRun, opPut:
		if op != nil {
			return
		}
		if len(s.ops) >= maxOps {
			go s.wire.send(message{Op: opExit, ID: m.ID, Error: "too many operations at once on this port"})
			return
		}
		s.begin(m)
	case opData:
		if op == nil {
			return
		}
		select {
		case op.in <- m:
		default: // the host ignores the window
			op.cancel(errors.New("data beyond the window"))
		}
	case opKill:
		if op != nil {
			op.cancel(errKilled)
		}
	case opAck:
		switch {
		case op == nil:
		case m.Stream == opOut:
			op.out.acked()
		case m.Stream == opErr:
			op.err.acked()
		}
	}
}

// begin starts an operation; s.mu is held.
func (s *server) begin(m message) {
	ctx, cancel := context.WithCancelCause(s.ctx)
	op := &serverOp{
		cancel: cancel,
		in:     make(chan message, window+1),
		out:    newStream(ctx, s.wire, m.ID, opOut),
		err:    newStream(ctx, s.wire, m.ID, opErr),
	}
	s.ops[m.ID] = op
	s.log.Debug("lab port: begin", "op", m.Op, "id", m.ID, "argv", m.Argv, "user", m.User, "path", m.Path)
	s.wait.Go(func() {
		defer cancel(nil)
		in := &input{ctx: ctx, wire: s.wire, id: m.ID, from: op.in}
		end := message{Op: opExit, ID: m.ID}
		var err error
		if m.Op == opPut {
			err = s.machine.Put(ctx, m.Path, modeOf(m.Mode), in)
		} else {
			var exit Exit
			exit, err = s.machine.Run(ctx, Cmd{Argv: m.Argv, User: m.User, Dir: m.Dir, Env: m.Env,
				Stdin: in, Stdout: op.out, Stderr: op.err})
			end.Status, end.Signal = exit.Status, exit.Signal
		}
		if err != nil {
			end.Error = err.Error()
		}
		s.mu.Lock()
		current := s.ops[m.ID] == op
		if current {
			delete(s.ops, m.ID)
		}
		s.mu.Unlock()
		if current {
			s.wire.send(end)
		}
	})
}

// input is the reading side of an operation's data messages.
type input struct {
	ctx  context.Context
	wire *wire
	id   int64
	from <-chan message
	rest []byte
	eof  bool
}

// Read implements io.Reader.
func (r *input) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.eof {
			return 0, io.EOF
		}
		select {
		case m := <-r.from:
			r.rest, r.eof = m.Data, m.EOF
			if err := r.wire.send(message{Op: opAck, ID: r.id, Stream: opData}); err != nil {
				return 0, err
			}
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}
