package mounts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"mosimg/agent/homefiles/forward"
	"mosimg/agent/homefiles/rootsock"
)

// A mount's process has a socket on which the agent asks. A connection is one
// line with a question and one with the answer; what opWriters allows ends with the
// connection.

type op string

const (
	opReady   op = "ready"   // answered when the mount answers
	opWriters op = "writers" // see forward.Control
	opDrain   op = "drain"   // as above
)

type question struct {
	Op     op
	Thread uint32 `json:",omitempty"` // of opWriters
}

type answer struct {
	Over   string   `json:",omitempty"` // the mount is over, and why
	Error  string   `json:",omitempty"`
	Inodes []uint64 `json:",omitempty"` // of opWriters
}

// overError is why a mount is over.
type overError string

func (e overError) Error() string { return string(e) }

// ask asks a mount's process.
func (m mount) ask(ctx context.Context, q question) (answer, error) {
	a, c, err := m.askKept(ctx, q)
	if c != nil {
		c.Close()
	}
	return a, err
}

// askKept is ask that leaves the connection open.
func (m mount) askKept(ctx context.Context, q question) (a answer, c net.Conn, err error) {
	c, err = rootsock.Dial(ctx, m.path(socketName), q)
	if err == nil {
		stop := rootsock.Bound(ctx, c)
		defer stop()
		err = rootsock.ReadLine(c, &a)
	}
	switch {
	case err != nil && ctx.Err() != nil:
		return a, c, fmt.Errorf("the home does not answer: %w", context.Cause(ctx))
	case err != nil:
		if why, rerr := os.ReadFile(m.path(endName)); rerr == nil {
			return a, c, overError(why)
		}
		return a, c, fmt.Errorf("the process of the mount is gone: %w", err)
	case a.Over != "":
		return a, c, overError(a.Over)
	case a.Error != "":
		return a, c, errors.New(a.Error)
	}
	return a, c, nil
}

// state is what a mount's process tells about its mount.
type state struct {
	dir     mount
	log     *slog.Logger
	forward forward.Control
	ready   chan struct{} // closed when the mount answers
	over    chan struct{} // closed when it is over
	why     error         // set before over is closed
}

// end notes why the mount is over, for who asks now and for who asks later.
func (s *state) end(why error) {
	select {
	case <-s.over:
		return // the first cause is the cause
	default:
	}
	if why == nil {
		why = errors.New("the mount is over")
	}
	s.why = why
	if err := os.WriteFile(s.dir.path(endName), []byte(why.Error()), 0o600); err != nil {
		s.log.Warn("cannot leave word of the end", "err", err)
	}
	close(s.over)
}

// answer answers a question.
func (s *state) answer(ctx context.Context, c net.Conn, q question) {
	defer c.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // nothing more comes: an end is the asker's
		_, _ = c.Read(make([]byte, 1))
		cancel()
	}()
	var a answer
	switch err := s.await(ctx); {
	case err != nil:
		a.Over = err.Error()
	case q.Op == opWriters:
		inodes, done := s.forward.Writers(q.Thread)
		defer done()
		a.Inodes = inodes
	case q.Op == opDrain:
		if err := s.forward.Drain(ctx); err != nil {
			a.Error = err.Error()
		}
	}
	if err := json.NewEncoder(c).Encode(a); err != nil {
		s.log.Debug("answer", "err", err)
		return
	}
	if q.Op == opWriters {
		<-ctx.Done()
	}
}

// await waits until the mount answers; its error is why it does not any more.
func (s *state) await(ctx context.Context) error {
	select {
	case <-s.over: // though it was ready once
		return s.why
	default:
	}
	select {
	case <-s.ready:
		return nil
	case <-s.over:
		return s.why
	case <-ctx.Done():
		return context.Cause(ctx) // nobody hears it
	}
}
