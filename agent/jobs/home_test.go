package jobs_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"mosimg/agent/agentapi"
	"mosimg/agent/capsule/capsuletest"
	"mosimg/agent/jobs"
	"mosimg/agent/jobs/client"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
)

func TestMain(m *testing.M) {
	capsuletest.Main(m, map[string]func([]string) int{"mosrun": mosrunMain, "ask": askMain, "count": countMain})
}

// home is an agent, as far as jobs of its own go: node 1 of a fleet. It can be
// stopped and started again.
type home struct {
	t      *testing.T
	f      *fleet
	socket string
	dir    string
	conf   func(*jobs.Config) // more of it
	peer   func(api.NodeID) migrate.Peer

	cancel  context.CancelFunc
	work    sync.WaitGroup
	service *jobs.Service
}

type source struct{}

func (source) Status() api.AgentStatus  { return api.AgentStatus{} }
func (source) Members() api.MemberTable { return api.MemberTable{} }

var silent = slog.New(slog.DiscardHandler)

func members() []api.Member {
	return []api.Member{
		{Node: 1, Name: "head", Self: true, Liveness: api.Alive, Migration: true},
		{Node: 2, Name: "n2", Liveness: api.Alive, Migration: true},
		{Node: 3, Name: "n3", Liveness: api.Alive, Migration: true},
		{Node: 4, Name: "dead", Liveness: api.Dead, Migration: true},
		{Node: 5, Name: "old", Liveness: api.Alive},
	}
}

func newHome(t *testing.T, f *fleet) *home {
	t.Helper()
	h := &home{t: t, f: f, dir: openDir(t), peer: func(id api.NodeID) migrate.Peer { return node{f, id} }}
	h.socket = filepath.Join(h.dir, "agent.sock")
	h.start()
	t.Cleanup(h.stop)
	return h
}

// openDir is a folder that other users can reach.
func openDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "mosimg-jobs-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (h *home) start() {
	h.t.Helper()
	log := slog.New(slog.NewTextHandler(testWriter{h.t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	journal, err := migrate.OpenJournal[migrate.Record](filepath.Join(h.dir, "records"))
	if err != nil {
		h.t.Fatal(err)
	}
	var service *jobs.Service
	mh, err := migrate.NewHome(migrate.HomeConfig{
		Self: 1, Journal: journal, Peer: h.peer, Log: log,
		Changed: func(r migrate.Record) { service.Changed(r) },
	})
	if err != nil {
		h.t.Fatal(err)
	}
	conf := jobs.Config{Self: 1, Dir: filepath.Join(h.dir, "info"), Home: mh, Capsule: h.f.capsule, Nodes: members, RootJobs: true, Log: log}
	if h.conf != nil {
		h.conf(&conf)
	}
	if service, err = jobs.New(conf); err != nil {
		h.t.Fatal(err)
	}
	h.service = service
	h.f.homeMu.Lock()
	h.f.home = mh
	h.f.homeMu.Unlock()
	l, err := agentapi.ListenUnix(h.socket)
	if err != nil {
		h.t.Fatal(err)
	}
	api1 := agentapi.New(source{}, nil)
	api1.Handle(api.PathJobs, service.Handler())
	api1.Handle(api.PathJobs+"/", service.Handler())
	ctx, cancel := context.WithCancel(context.Background())
	h.cancel = cancel
	h.work.Go(func() { service.Run(ctx) })
	h.work.Go(func() { mh.Run(ctx) })
	h.work.Go(func() {
		if err := api1.ServeUnix(ctx, l); err != nil {
			h.t.Error(err)
		}
	})
}

// stop ends the agent; the jobs go on.
func (h *home) stop() {
	h.f.homeMu.Lock()
	h.f.home = nil
	h.f.homeMu.Unlock()
	h.cancel()
	h.work.Wait()
}

// testWriter logs until the test is over; then late goroutines have nobody to tell.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	if w.t.Context().Err() == nil && testing.Verbose() {
		w.t.Log(strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

func (h *home) agent() client.Agent { return client.Agent{Socket: h.socket} }

var tokens = struct {
	sync.Mutex
	n int
}{}

func newToken() string {
	tokens.Lock()
	defer tokens.Unlock()
	tokens.n++
	return fmt.Sprintf("%06x%026x", tokens.n, tokens.n)
}

func request() api.JobStart {
	return api.JobStart{Token: newToken(), Argv: []string{"sum"}, Env: []string{"PATH=/bin"}, Dir: "/", Nice: 0}
}

func (h *home) run(req api.JobStart) string {
	h.t.Helper()
	id, err := h.agent().Start(h.t.Context(), req)
	if err != nil {
		h.t.Fatal(err)
	}
	return id
}

// mosrun is the user's side of a job: a real one but for its process.
type mosrun struct {
	t       *testing.T
	session *client.Session
	stdin   *os.File // write end
	result  chan client.Result
	ended   sync.WaitGroup // of both streams

	mu    sync.Mutex // guards the following
	out   [2][]byte
	notes []string
}

// saw tells whether the user has seen something on stdout.
func (m *mosrun) saw(text string) func() bool {
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return bytes.Contains(m.out[0], []byte(text))
	}
}

func (h *home) attach(id, socket string) *mosrun {
	h.t.Helper()
	m := &mosrun{t: h.t, result: make(chan client.Result, 1)}
	r, w, err := os.Pipe()
	if err != nil {
		h.t.Fatal(err)
	}
	m.stdin = w
	var ends [2]*os.File
	for i := range ends {
		pr, pw, err := os.Pipe()
		if err != nil {
			h.t.Fatal(err)
		}
		ends[i] = pw
		m.ended.Go(func() {
			defer pr.Close()
			buf := make([]byte, 8192)
			for {
				n, err := pr.Read(buf)
				m.mu.Lock()
				m.out[i] = append(m.out[i], buf[:n]...)
				m.mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	m.session, err = client.New(client.Config{
		Agent: client.Agent{Socket: socket}, Job: id, Stdin: int(r.Fd()), Stdout: int(ends[0].Fd()), Stderr: int(ends[1].Fd()),
		Note: func(s string) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.notes = append(m.notes, s)
		},
	})
	if err != nil {
		h.t.Fatal(err)
	}
	ctx := h.t.Context()
	go func() {
		defer r.Close()
		res, err := m.session.Run(ctx)
		if err != nil && ctx.Err() == nil {
			m.t.Error(err)
		}
		ends[0].Close()
		ends[1].Close()
		m.result <- res
	}()
	return m
}

// wait waits for the job's end.
func (m *mosrun) wait() (res client.Result, stdout, stderr []byte) {
	m.t.Helper()
	select {
	case res = <-m.result:
	case <-time.After(20 * time.Second):
		m.t.Fatal("the job does not end")
	}
	m.ended.Wait()
	return res, m.out[0], m.out[1]
}

// proxy is a socket in front of another one whose connections break.
func proxy(t *testing.T, to string, cut func() int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "p")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				up, err := net.Dial("unix", to)
				if err != nil {
					return
				}
				defer up.Close()
				cc := &cutConn{Conn: c, left: cut()}
				go func() {
					io.Copy(up, cc)
					up.Close()
					c.Close()
				}()
				io.Copy(cc, up)
			}()
		}
	}()
	return path
}

// until waits for something to become so.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so after 20 s: %s", what)
		}
	}
}
