package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/internal/fault"
)

// serve answers agents until one tells the shim to quit.
func (s *shim) serve() {
	go func() {
		for {
			c, err := s.listener.AcceptUnix()
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				s.log.Error("accept", "err", err)
				continue
			}
			go s.handle(c)
		}
	}()
	<-s.stop
	s.listener.Close()
	// What is left dies with process 1.
}

// handle serves one connection: requests in turn, until it is closed or has
// become a stream.
func (s *shim) handle(c *net.UnixConn) {
	defer c.Close()
	if err := onlyRoot(c); err != nil {
		s.log.Warn("refused", "err", err)
		return
	}
	for {
		var req control.Request
		files, err := control.Receive(c, &req)
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.log.Warn("control connection", "err", err)
			}
			return
		}
		switch req.Verb {
		case control.Stdin, control.Stdout, control.Stderr:
			control.CloseAll(files)
			if err := s.stream(c, req); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				s.log.Info("stream ended", "name", req.Verb, "err", err)
			}
			return
		}
		err = s.do(c, req, files)
		control.CloseAll(files)
		st := s.query()
		if req.Measure {
			st.Use = s.measure(st)
		}
		if err := control.Send(c, control.Answer{Error: control.FromError(err), Status: st}); err != nil {
			return
		}
		if req.Verb == control.Quit {
			s.quit.Do(func() { close(s.stop) })
			return
		}
	}
}

// onlyRoot keeps users out, should the folder's mode ever not. Seen from this
// pid namespace the peer has no pid, but it has a uid.
func onlyRoot(c *net.UnixConn) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := rc.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if cerr != nil {
		return cerr
	}
	if cred.Uid != 0 {
		return fault.New(fault.Refused, "talk to", "shim", fmt.Sprintf("user %d is not root", cred.Uid), "")
	}
	return nil
}

func (s *shim) do(c *net.UnixConn, req control.Request, files []*os.File) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	switch req.Verb {
	case control.Query:
		return nil
	case control.Start:
		return s.start(ctx, req.Spec)
	case control.Wait:
		return s.awaitEnd(c)
	case control.Dump:
		if len(files) < 1 || len(files) > 3 {
			return fault.New(fault.Usage, "dump", "capsule "+s.conf.ID, "needs the images folder, and at most a page socket and a gate", "")
		}
		var pages *os.File
		if len(files) > 1 {
			pages = files[1]
		}
		var gate net.Conn
		if len(files) > 2 {
			var err error
			if gate, err = net.FileConn(files[2]); err != nil {
				return err
			}
			defer gate.Close()
		}
		release := cancelOnHangup(c, cancel)
		defer release()
		// The images folder stays in use until the decision.
		images, err := dup(files[0])
		if err != nil {
			return err
		}
		return s.dump(ctx, images, pages, gate)
	case control.Finish:
		return s.finish(req.Commit)
	case control.Restore:
		if len(files) != 1 || req.Owner == nil {
			return fault.New(fault.Usage, "restore", "capsule "+s.conf.ID, "needs the images folder and the owner", "")
		}
		release := cancelOnHangup(c, cancel)
		defer release()
		return s.restore(ctx, files[0], *req.Owner)
	case control.Resume:
		return s.resume()
	case control.Stop, control.Cont:
		return s.setStopped(ctx, req.Verb == control.Stop)
	case control.Kill:
		return s.kill(ctx)
	case control.Signal:
		return s.signal(req)
	case control.Quit:
		return s.kill(ctx)
	}
	return fault.New(fault.Usage, "ask", "shim", "it does not know "+string(req.Verb), "the shim is older than the agent; let the job end")
}

// awaitEnd returns when the job is over here, or the asker is gone.
func (s *shim) awaitEnd(c *net.UnixConn) error {
	gone := make(chan struct{})
	release := onHangup(c, func() { close(gone) })
	defer release()
	for {
		wait := s.changed.wait()
		switch s.query().State {
		case control.Ended, control.Moved, control.Failed:
			return nil
		}
		select {
		case <-wait:
		case <-gone:
			return net.ErrClosed
		}
	}
}

func (s *shim) stream(c *net.UnixConn, req control.Request) error {
	s.mu.Lock()
	in, out := s.stdin, s.out
	s.mu.Unlock()
	if in == nil {
		err := fault.New(fault.Refused, "open", string(req.Verb), "no job was started in capsule "+s.conf.ID, "")
		return control.Send(c, control.Answer{Error: control.FromError(err), Status: s.query()})
	}
	answer := control.Answer{Status: s.query()}
	if req.Verb == control.Stdin {
		in.take(c)
		answer.Offset, answer.Over = in.accepted()
	}
	if err := control.Send(c, answer); err != nil {
		return err
	}
	switch req.Verb {
	case control.Stdin:
		return in.serve(c)
	case control.Stdout:
		return out[0].serve(c, req.Offset)
	default:
		return out[1].serve(c, req.Offset)
	}
}

// errHangup is why a dump or restore is called off whose agent has died.
var errHangup = errors.New("the agent hung up")

func cancelOnHangup(c *net.UnixConn, cancel context.CancelCauseFunc) (release func()) {
	return onHangup(c, func() { cancel(errHangup) })
}

// onHangup calls f when the peer closes the connection. Until release returns
// nothing else may read from it; release leaves unread what has come.
func onHangup(c *net.UnixConn, f func()) (release func()) {
	rc, err := c.SyscallConn()
	if err != nil {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		rc.Read(func(fd uintptr) bool { //nolint:errcheck // the deadline of release is its usual end
			n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
			if err == unix.EAGAIN {
				return false
			}
			if n == 0 || err != nil {
				f()
			}
			return true
		})
	}()
	return func() {
		c.SetReadDeadline(deadlinePast)
		<-done
		c.SetReadDeadline(deadlineNone)
	}
}

func dup(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}
