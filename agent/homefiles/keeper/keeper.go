// Package keeper runs the home's file server (package home) as a process of its
// own, because open files and locks of guests live in it and must outlive the
// agent; and it is the agent's side of talking to it.
//
// Its unix socket is root's. A connection begins with one line of JSON. With an
// operation it is answered by one line and closed. With {"Session":N,"Key":K} it is
// answered by the keeper's own key; then the agent hands over a connection, on
// which K, a process of node N, whom the agent has authenticated, has a session of
// home files (see package direct). The session lasts as long as the unix
// connection: an agent that dies, or hears that a node is out, ends it.
package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/agent/homefiles/direct"
	"mosimg/agent/homefiles/home"
	"mosimg/agent/homefiles/process"
	"mosimg/agent/homefiles/rootsock"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/urgent"
)

// Verb is the first argument that makes a program which calls Main the keeper;
// the second is the socket.
const Verb = "homefiles-keeper"

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

// needsJob tells whether an operation can only be carried out by the keeper that
// was told of the job: to call it done would leave a guest without its files.
func (o op) needsJob() bool { return o == opSync || o == opCommit }

// lost is what is said of a job that this keeper, or none, knows.
func lost(r request) error {
	return fault.New(fault.NotFound, string(r.Op), "home files of job "+r.Job, "the process that served them has died", "")
}

// request is the first line of a connection.
type request struct {
	Session api.NodeID `json:",omitempty"`
	Key     direct.Key `json:",omitempty"` // of Session

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
	Key   direct.Key     `json:",omitempty"` // to Session
	Error *control.Error `json:",omitempty"`
	Locks []string       `json:",omitempty"`
	// Ending says that this keeper ends, having had nothing to do; the next
	// one is to be asked.
	Ending bool `json:",omitempty"`
}

// Times of ending: idleTime is how long a keeper without any job waits for the
// next one, endTime how long the next keeper waits for the end of this one.
const (
	idleTime = 30 * time.Second
	endTime  = 5 * time.Second
)

// Main is the keeper's process, started by Client. It ends when ctx does, or
// when it has had no job for a while.
func Main(ctx context.Context, socket string, log *slog.Logger) error {
	raiseNofile(log)
	// A thread that waits for requests (package direct) counts as running for a moment;
	// the only one that may would keep the others from running.
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))
	if err := urgent.Raise(); err != nil {
		log.Warn("home files are no more urgent than jobs", "why", err)
	}
	unlock, err := lock(socket + ".lock")
	var l net.Listener
	if err == nil {
		defer unlock()
		l, err = rootsock.Listen(socket)
	}
	process.Ready(err)
	if err != nil {
		return err
	}
	return serve(ctx, l, log, idleTime)
}

// lock makes this the only keeper of a socket: with two of them, a job's files
// would be open in one and asked for in the other.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for until := time.Now().Add(endTime); ; time.Sleep(20 * time.Millisecond) {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) || time.Now().After(until) {
			f.Close()
			return nil, fault.New(fault.Refused, "keep home files at", path, err, "another keeper runs")
		}
	}
}

// raiseNofile allows as many open files as this machine can have: those of all
// guests are open here.
func raiseNofile(log *slog.Logger) {
	data, err := os.ReadFile("/proc/sys/fs/nr_open")
	var most uint64
	if err == nil {
		most, err = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	}
	if err == nil {
		err = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: most})
	}
	if err != nil {
		log.Warn("guests share this machine's usual limit of open files", "err", err)
	}
}

// server is a running keeper.
type server struct {
	home *home.Server
	self *direct.Identity
	log  *slog.Logger

	mu sync.Mutex
	// The following is guarded by mu.
	jobs   map[string]bool
	last   time.Time // when the last job went
	ending bool      // no job is taken any more
}

// serve serves until ctx ends or there has been nothing to keep for idle.
func serve(ctx context.Context, l net.Listener, log *slog.Logger, idle time.Duration) error {
	self, err := direct.New()
	if err != nil {
		l.Close()
		return err
	}
	h, err := home.New(home.Config{Log: log})
	if err != nil {
		l.Close()
		return err
	}
	defer h.Close()
	s := &server{home: h, self: self, log: log, jobs: make(map[string]bool), last: time.Now()}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel()
		for t := time.NewTicker(idle / 30); ; {
			select {
			case <-ctx.Done():
				t.Stop()
				return
			case <-t.C:
				if s.end(idle) {
					return
				}
			}
		}
	}()
	return rootsock.Serve(ctx, l, log, s.connection)
}

// end lets no job begin any more, if there has been none for so long.
func (s *server) end(idle time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ending = len(s.jobs) == 0 && time.Since(s.last) > idle
	return s.ending
}

func (s *server) connection(ctx context.Context, c net.Conn, req request) {
	defer c.Close()
	if req.Session != 0 {
		if err := s.session(ctx, c, req); err != nil {
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
	a, err := s.do(ctx, req)
	a.Error = control.FromError(err)
	if err := json.NewEncoder(c).Encode(a); err != nil {
		s.log.Debug("answer", "err", err)
	}
}

// handTime bounds the wait for a connection that an agent hands over.
const handTime = 20 * time.Second

// session serves one connection of a node's mount.
func (s *server) session(ctx context.Context, agent net.Conn, req request) error {
	if err := json.NewEncoder(agent).Encode(reply{Key: s.self.Key}); err != nil {
		return err
	}
	if err := agent.SetDeadline(time.Now().Add(handTime)); err != nil {
		return err
	}
	raw, err := rootsock.Take(agent)
	if err != nil {
		return err
	}
	if err := agent.SetDeadline(time.Time{}); err != nil {
		return errors.Join(err, raw.Close())
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // nothing more comes: an end is the agent's
		_, _ = agent.Read(make([]byte, 1))
		cancel()
	}()
	conn, err := s.self.Server(ctx, raw, req.Key)
	if err != nil {
		return err
	}
	return s.home.Serve(ctx, conn, req.Session)
}

func (s *server) do(ctx context.Context, r request) (a reply, err error) {
	if r.Op == opPrepare {
		if a.Ending, err = s.add(r); a.Ending || err != nil {
			return a, err
		}
	} else if !s.knows(r.Job) {
		if r.Op.needsJob() {
			return a, lost(r)
		}
		return a, nil // its guests have nothing here
	}
	switch r.Op {
	case opPrepare:
		return a, s.home.Prepare(r.Job, r.Epoch, r.Node)
	case opSync:
		return a, s.home.Sync(ctx, r.Job)
	case opLocks:
		a.Locks = s.home.Locks(r.Job)
		return a, nil
	case opCommit:
		return a, s.home.Commit(r.Job, r.Epoch, r.Pids)
	case opReclaim:
		return a, s.home.Reclaim(r.Job, r.Epoch)
	case opSettle:
		s.home.Settle(r.Job)
		return a, nil
	case opAbort:
		s.home.Abort(r.Job, r.Epoch)
		return a, nil
	case opRemove:
		s.home.Remove(r.Job)
		s.mu.Lock()
		delete(s.jobs, r.Job)
		s.last = time.Now()
		s.mu.Unlock()
		return a, nil
	}
	return a, fault.New(fault.Usage, "ask the keeper of home files for", string(r.Op), "it does not know that", "it is older than the agent; let the jobs end")
}

func (s *server) knows(job string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.jobs[job]
}

// add begins to serve a job, unless it is served already or this keeper ends.
func (s *server) add(r request) (ending bool, err error) {
	if r.Cred == nil {
		return false, fault.New(fault.Usage, "serve home files of", "job "+r.Job, "its owner is not told", "")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending || s.jobs[r.Job] {
		return s.ending, nil
	}
	err = s.home.Add(home.Capsule{ID: r.Job, Root: "/", Node: r.OwnerNode, Epoch: r.OwnerEpoch, Users: []home.Cred{*r.Cred}})
	if err == nil {
		s.jobs[r.Job] = true
	}
	return false, err
}
