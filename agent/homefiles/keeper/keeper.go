// Package keeper runs the home's file server (package home) as a process of its
// own, because open files and locks of guests live in it and must outlive the
// agent; and it is the agent's side of talking to it.
//
// Its unix socket is root's. A connection begins with one line of JSON. With an
// operation it is answered by one line and closed. With {"Session":N} the rest
// is a session of home files of node N, whom the agent has authenticated.
package keeper

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/agent/homefiles/home"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// op is what the agent asks for.
type op string

const (
	opPrepare op = "prepare"
	opSync    op = "sync"
	opLocks   op = "locks"
	opCommit  op = "commit"
	opReclaim op = "reclaim"
	opSettle  op = "settle"
	opAbort   op = "abort"
	opRemove  op = "remove"
)

// request is the first line of a connection.
type request struct {
	Session api.NodeID `json:",omitempty"`

	Op    op                `json:",omitempty"`
	Job   string            `json:",omitempty"`
	Epoch uint64            `json:",omitempty"` // next, or now
	Node  api.NodeID        `json:",omitempty"`
	Pids  map[uint32]uint32 `json:",omitempty"` // of opCommit
	// Of opPrepare: what the server needs if it does not know the job.
	Cred       *home.Cred `json:",omitempty"`
	OwnerEpoch uint64     `json:",omitempty"`
	OwnerNode  api.NodeID `json:",omitempty"`
}

type reply struct {
	Error *control.Error `json:",omitempty"`
	Locks []string       `json:",omitempty"`
}

// idleTime is how long a keeper without any job waits for the next one.
const idleTime = 30 * time.Second

// firstLine bounds the wait for a connection's first line, and its length.
const (
	firstLineTime = 10 * time.Second
	maxLine       = 1 << 20
)

// server is a running keeper.
type server struct {
	home *home.Server
	log  *slog.Logger

	mu   sync.Mutex // guards the following
	jobs map[string]bool
	last time.Time // when the last job went
}

// Run serves until ctx ends or there has been nothing to keep for a while.
func Run(ctx context.Context, l net.Listener, log *slog.Logger) error {
	h, err := home.New(home.Config{Log: log})
	if err != nil {
		return err
	}
	defer h.Close()
	s := &server{home: h, log: log, jobs: make(map[string]bool), last: time.Now()}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	go func() {
		for !s.idle() {
			time.Sleep(time.Second)
		}
		cancel()
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		go s.serve(ctx, c)
	}
}

func (s *server) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.jobs) == 0 && time.Since(s.last) > idleTime
}

func (s *server) serve(ctx context.Context, c net.Conn) {
	defer c.Close()
	if err := onlyRoot(c); err != nil {
		s.log.Warn("refused", "err", err)
		return
	}
	if err := c.SetDeadline(time.Now().Add(firstLineTime)); err != nil {
		return
	}
	req, err := readLine(c)
	if err != nil {
		s.log.Warn("connection", "err", err)
		return
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return
	}
	if req.Session != 0 {
		if err := s.home.Serve(ctx, c, req.Session); err != nil {
			s.log.Info("session", "node", req.Session, "err", err)
		}
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // nothing more comes: an end is the asker's
		_, _ = c.Read(make([]byte, 1))
		cancel()
	}()
	var a reply
	a.Locks, err = s.do(ctx, req)
	a.Error = control.FromError(err)
	if err := json.NewEncoder(c).Encode(a); err != nil {
		s.log.Debug("answer", "err", err)
	}
}

// readLine reads the first line and not a byte more.
func readLine(r io.Reader) (req request, err error) {
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(r, b); err != nil {
			return req, err
		}
		if b[0] == '\n' {
			break
		}
		if line = append(line, b[0]); len(line) > maxLine {
			return req, errors.New("the first line does not end")
		}
	}
	return req, json.Unmarshal(line, &req)
}

// onlyRoot keeps users out, should the socket's mode ever not.
func onlyRoot(c net.Conn) error {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("connection is a %T", c)
	}
	rc, err := uc.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := rc.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if cerr == nil && cred.Uid != 0 {
		cerr = fmt.Errorf("user %d is not root", cred.Uid)
	}
	return cerr
}

func (s *server) do(ctx context.Context, r request) (locks []string, err error) {
	if !s.knows(r.Job) {
		if r.Op != opPrepare {
			return nil, nil // its guests have nothing here
		}
		if err := s.add(r); err != nil {
			return nil, err
		}
	}
	switch r.Op {
	case opPrepare:
		return nil, s.home.Prepare(r.Job, r.Epoch, r.Node)
	case opSync:
		return nil, s.home.Sync(ctx, r.Job)
	case opLocks:
		return s.home.Locks(r.Job), nil
	case opCommit:
		return nil, s.home.Commit(r.Job, r.Epoch, r.Pids)
	case opReclaim:
		return nil, s.home.Reclaim(r.Job, r.Epoch)
	case opSettle:
		s.home.Settle(r.Job)
		return nil, nil
	case opAbort:
		s.home.Abort(r.Job, r.Epoch)
		return nil, nil
	case opRemove:
		s.home.Remove(r.Job)
		s.mu.Lock()
		delete(s.jobs, r.Job)
		s.last = time.Now()
		s.mu.Unlock()
		return nil, nil
	}
	return nil, fault.New(fault.Usage, "ask the keeper of home files for", string(r.Op), "it does not know that", "it is older than the agent; let the jobs end")
}

func (s *server) knows(job string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.jobs[job]
}

// add begins to serve a job.
func (s *server) add(r request) error {
	if r.Cred == nil {
		return fault.New(fault.Usage, "serve home files of", "job "+r.Job, "its owner is not told", "")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.jobs[r.Job] {
		return nil
	}
	if err := s.home.Add(home.Capsule{ID: r.Job, Root: "/", Node: r.OwnerNode, Epoch: r.OwnerEpoch, Users: []home.Cred{*r.Cred}}); err != nil {
		return err
	}
	s.jobs[r.Job] = true
	return nil
}

// Listen opens the socket, in place of one that a dead keeper has left.
func Listen(path string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fault.New(fault.Refused, "listen on", path, "another keeper answers there", "")
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	return net.Listen("unix", path)
}

// readReply reads an answer.
func readReply(c net.Conn) (a reply, err error) {
	line, err := bufio.NewReader(io.LimitReader(c, maxLine)).ReadBytes('\n')
	if err != nil {
		return a, err
	}
	return a, json.Unmarshal(line, &a)
}
