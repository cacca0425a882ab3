// Package clienttest is an agent for tests of what runs beside one: it answers
// the job paths of the agent's unix socket and speaks agent/jobs/wire, but runs
// a job as a plain child process, so that a test needs neither root nor CRIU. It can be
// taken away and come back, and it can cut connections at chosen bytes. A
// client that breaks the protocol fails the test.
package clienttest

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
	"mosimg/internal/upgrade"
)

// Agent is the agent. Its exported fields are set by the functions given to New.
type Agent struct {
	Socket string
	// Cut, if set, says after how many bytes the next attached connection
	// breaks, both directions counted together; 0 is never.
	Cut func() int
	// LoseAnswers is how many answers to POST PathJobs are lost after the job
	// was started.
	LoseAnswers int
	// Members is the answer of PathMembers.
	Members api.MemberTable
	// Refuse, if set, answers a start, unless it returns nil.
	Refuse func(api.JobStart) error

	t    testing.TB
	mux  *http.ServeMux
	mu   sync.Mutex // guards the following
	srv  *http.Server
	jobs map[string]*Job // by token
	list []*Job
}

// New makes an agent, sets it up and makes it listen in a folder of the test's.
func New(t testing.TB, setup ...func(*Agent)) *Agent {
	t.Helper()
	a := &Agent{t: t, Socket: filepath.Join(t.TempDir(), "agent.sock"), jobs: map[string]*Job{}, mux: http.NewServeMux()}
	a.mux.HandleFunc("POST "+api.PathJobs, a.start)
	a.mux.HandleFunc("GET "+api.PathJobs+"/{id}/attach", a.attach)
	a.mux.HandleFunc("GET "+api.PathMembers, func(w http.ResponseWriter, _ *http.Request) { unixhttp.Reply(w, a.Members) })
	for _, set := range setup {
		set(a)
	}
	a.Up()
	t.Cleanup(func() {
		a.Down()
		for _, j := range a.Jobs() {
			j.kill()
		}
	})
	return a
}

// Handle adds a path of the test's own.
func (a *Agent) Handle(pattern string, h http.HandlerFunc) { a.mux.HandleFunc(pattern, h) }

// Up makes the agent listen.
func (a *Agent) Up() {
	l, err := net.Listen("unix", a.Socket)
	if err != nil {
		a.t.Fatal(err)
	}
	srv := &http.Server{Handler: a.mux}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.srv != nil {
		panic("clienttest: Up of an agent that is up")
	}
	a.srv = srv
	go func() { _ = srv.Serve(l) }() // until Down
}

// Down ends the agent as a kill would: its socket stays, its connections
// break, its jobs go on.
func (a *Agent) Down() {
	a.mu.Lock()
	srv := a.srv
	a.srv = nil
	a.mu.Unlock()
	if srv == nil {
		return
	}
	srv.Close()
	os.Remove(a.Socket)
	for _, j := range a.Jobs() {
		j.detach()
	}
}

// Jobs are the jobs that were started, in that order.
func (a *Agent) Jobs() []*Job {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]*Job(nil), a.list...)
}

// Forget makes the agent not know its jobs any more.
func (a *Agent) Forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.jobs = map[string]*Job{}
}

func (a *Agent) start(w http.ResponseWriter, r *http.Request) {
	var req api.JobStart
	if err := unixhttp.ReadJSON(w, r, &req); err != nil {
		unixhttp.Fail(w, err)
		return
	}
	j, err := a.startJob(req)
	if err != nil {
		unixhttp.Fail(w, err)
		return
	}
	a.mu.Lock()
	lose := a.LoseAnswers > 0
	if lose {
		a.LoseAnswers--
	}
	a.mu.Unlock()
	if lose {
		panic(http.ErrAbortHandler)
	}
	unixhttp.Reply(w, api.JobStarted{ID: j.ID})
}

func (a *Agent) startJob(req api.JobStart) (*Job, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if j := a.jobs[req.Token]; j != nil {
		return j, nil
	}
	if len(req.Token) != 32 {
		a.t.Errorf("token %q; want 16 bytes in hex", req.Token)
	}
	if a.Refuse != nil {
		if err := a.Refuse(req); err != nil {
			return nil, err
		}
	}
	j := &Job{Start: req, ID: fmt.Sprintf("1-%d", len(a.list)+1), t: a.t}
	if err := j.run(); err != nil {
		kind := fault.Refused
		if errors.Is(err, syscall.ENOENT) {
			kind = fault.NotFound
		}
		return nil, fault.New(kind, "run", req.Argv[0], err, "")
	}
	a.jobs[req.Token] = j
	a.list = append(a.list, j)
	return j, nil
}

func (a *Agent) attach(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	var j *Job
	for _, k := range a.jobs {
		if k.ID == r.PathValue("id") {
			j = k
		}
	}
	a.mu.Unlock()
	if j == nil {
		unixhttp.Fail(w, fault.New(fault.NotFound, "find job", r.PathValue("id"), "no job has this name", ""))
		return
	}
	conn, err := upgrade.Accept(w, r, api.UpgradeJob)
	if err != nil {
		a.t.Error(err)
		return
	}
	if a.Cut != nil {
		a.mu.Lock()
		n := a.Cut()
		a.mu.Unlock()
		if n > 0 {
			conn = &cutConn{Conn: conn, left: n}
		}
	}
	j.serve(conn)
}

// cutConn breaks after some bytes, in the midst of a message or between two.
type cutConn struct {
	net.Conn
	mu   sync.Mutex // guards left
	left int
}

func (c *cutConn) allow(n int) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n = min(n, c.left)
	c.left -= n
	return n
}

func (c *cutConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if m := c.allow(n); m < n {
		c.Close()
		return m, net.ErrClosed
	}
	return n, err
}

func (c *cutConn) Write(p []byte) (int, error) {
	n := c.allow(len(p))
	m, err := c.Conn.Write(p[:n])
	if err == nil && n < len(p) {
		c.Close()
		err = net.ErrClosed
	}
	return m, err
}
