package jobs_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule"
	"mosimg/agent/capsule/control"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// fleet is the nodes of a test, without programs: what stands in for a shim
// speaks package control over sockets, and its job is a sum: it echoes stdin to
// stdout, writes a dot to stderr for each line, and ends with status 3 when stdin ends. A job
// moves as with real ones: frozen, copied, and the old copy killed.
type fleet struct {
	t testing.TB

	homeMu sync.RWMutex // held while home is used
	home   *migrate.Home

	mu     sync.Mutex // guards the following
	copies map[copyKey]*standIn
	images map[migrate.JobID]state
	down   map[api.NodeID]bool // does not answer
	// cut says after how many bytes a new connection to a shim breaks; nil is never.
	cut func() int
	// refuse, if set, is the answer to the next start.
	refuse error
	specs  map[migrate.JobID]control.Spec
}

func newFleet(t testing.TB) *fleet {
	return &fleet{t: t, copies: map[copyKey]*standIn{}, images: map[migrate.JobID]state{}, down: map[api.NodeID]bool{}, specs: map[migrate.JobID]control.Spec{}}
}

type copyKey struct {
	job migrate.JobID
	at  migrate.Placement
}

// state is what travels of a job.
type state struct {
	taken   uint64 // of stdin
	over    bool
	base    [2]uint64
	out     [2][]byte
	eof     [2]bool
	signals []int
	last    uint64 // ID of the last one
	stopped bool
}

func (s state) clone() state {
	for i := range s.out {
		s.out[i] = bytes.Clone(s.out[i])
	}
	s.signals = slices.Clone(s.signals)
	return s
}

// standIn is a copy of a job and its shim.
type standIn struct {
	f    *fleet
	job  migrate.JobID
	at   migrate.Placement
	cond *sync.Cond // on fleet.mu; signalled at each change

	state
	phase control.State
	users [3]net.Conn // stdin, stdout, stderr
	gone  bool
	held  bool
	end   migrate.End
}

// keeps is how much output a shim keeps before its job waits.
const keeps = 20_000

func (f *fleet) add(job migrate.JobID, at migrate.Placement, phase control.State) *standIn {
	s := &standIn{f: f, job: job, at: at, phase: phase, cond: sync.NewCond(&f.mu)}
	f.copies[copyKey{job, at}] = s
	return s
}

func (f *fleet) find(job migrate.JobID, at migrate.Placement) (*standIn, error) {
	if f.down[at.Node] {
		return nil, fault.New(fault.Unavailable, "connect to", fmt.Sprintf("node %d", at.Node), "no route to host", "")
	}
	if s := f.copies[copyKey{job, at}]; s != nil {
		return s, nil
	}
	return nil, fault.New(fault.NotFound, "find", fmt.Sprint(at), "it is not on this node", "")
}

// capsule is a jobs.Config.Capsule.
func (f *fleet) capsule(job migrate.JobID, at migrate.Placement) (*capsule.Capsule, error) {
	return capsule.Remote(string(job), func(context.Context) (net.Conn, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		s, err := f.find(job, at)
		if err != nil && fault.KindOf(err) != fault.NotFound {
			return nil, err
		}
		ours, theirs := sockets(f.t)
		go func() {
			defer theirs.Close()
			if s == nil { // as migrate.Node's bridge answers
				_ = control.Send(theirs, control.Answer{Error: control.FromError(err)})
				return
			}
			s.serve(theirs)
		}()
		if f.cut != nil {
			return &cutConn{Conn: ours, left: f.cut()}, nil
		}
		return ours, nil
	}), nil
}

func sockets(t testing.TB) (a, b net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Error(err)
		}
		f.Close()
	}
	return conns[0], conns[1]
}

// cutConn breaks after some bytes, both directions counted together.
type cutConn struct {
	net.Conn
	mu   sync.Mutex // guards left
	left int
}

func (c *cutConn) spend(n int) (now int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now = min(n, c.left)
	c.left -= now
	return now
}

func (c *cutConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if got := c.spend(n); got < n {
		c.Close()
		return got, io.ErrUnexpectedEOF
	}
	return n, err
}

func (c *cutConn) Write(p []byte) (int, error) {
	n := c.spend(len(p))
	m, err := c.Conn.Write(p[:n])
	if err == nil && n < len(p) {
		c.Close()
		err = net.ErrClosed
	}
	return m, err
}

// cuts gives breaks that are often early and seldom late.
func cuts(seed uint64, most int) func() int {
	rng := rand.New(rand.NewPCG(seed, 1))
	var mu sync.Mutex
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		if rng.IntN(4) == 0 {
			return rng.IntN(400)
		}
		return rng.IntN(most)
	}
}

func (s *standIn) serve(c net.Conn) {
	var req control.Request
	if _, err := control.Receive(c, &req); err != nil {
		return
	}
	a, stream := s.do(c, req)
	if control.Send(c, a) != nil || !stream {
		return
	}
	switch req.Verb {
	case control.Stdin:
		s.takeInput(c)
	case control.Stdout:
		s.giveOutput(c, 0, req.Offset)
	case control.Stderr:
		s.giveOutput(c, 1, req.Offset)
	}
}

func (s *standIn) do(c net.Conn, req control.Request) (a control.Answer, stream bool) {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	defer s.cond.Broadcast()
	refuse := func() (control.Answer, bool) {
		return control.Answer{Error: control.FromError(fault.New(fault.Refused, string(req.Verb), fmt.Sprint(s.at), "it is "+string(s.phase), ""))}, false
	}
	running := s.phase == control.Running
	switch req.Verb {
	case control.Query:
	case control.Stdin:
		s.use(0, c)
		a.Offset, a.Over, stream = s.taken, s.over, true
	case control.Stdout:
		s.use(1, c)
		stream = true
	case control.Stderr:
		s.use(2, c)
		stream = true
	case control.Signal:
		if !running {
			return refuse()
		}
		if req.ID != 0 && req.ID <= s.last {
			break
		}
		s.last = req.ID
		s.signals = append(s.signals, req.Signal)
	case control.Stop, control.Cont:
		if !running {
			return refuse()
		}
		s.stopped = req.Verb == control.Stop
	case control.Kill:
		s.finish(migrate.End{Signal: int(unix.SIGKILL)})
	default:
		return refuse()
	}
	a.Status = control.Status{State: s.phase, Stopped: s.stopped}
	if req.Measure {
		a.Status.Use = &control.Use{Processes: 2, Bytes: 4096, CPUMicros: 1_500_000}
	}
	return a, stream
}

// use makes c the user of a stream; mu is held.
func (s *standIn) use(stream int, c net.Conn) {
	if s.users[stream] != nil {
		s.users[stream].Close()
	}
	s.users[stream] = c
}

// finish ends the job here; mu is held.
func (s *standIn) finish(end migrate.End) {
	if s.phase == control.Ended {
		return
	}
	if s.phase == control.Running {
		s.phase, s.end = control.Ended, end
		go s.tellEnd()
	}
	s.eof = [2]bool{true, true}
	s.cond.Broadcast()
}

// tellEnd tells the home that the job has ended, as a node does: until it hears.
func (s *standIn) tellEnd() {
	for told := false; !told; time.Sleep(time.Millisecond) {
		s.f.homeMu.RLock()
		if s.f.home != nil {
			err := s.f.home.Ended(context.Background(), s.at.Node, s.job, s.at, s.end)
			told = err == nil || fault.KindOf(err) == fault.NotFound || fault.KindOf(err) == fault.Refused
		}
		s.f.homeMu.RUnlock()
	}
}

func (s *standIn) takeInput(c net.Conn) {
	for {
		var head [4]byte
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		data := make([]byte, binary.BigEndian.Uint32(head[:]))
		if _, err := io.ReadFull(c, data); err != nil {
			return
		}
		end := len(data) == 0
		for len(data) > 0 || end {
			taken, n, ok := s.take(c, data, end)
			if !ok || end {
				return
			}
			data = data[n:]
			if _, err := c.Write(binary.BigEndian.AppendUint64(nil, taken)); err != nil {
				return
			}
		}
	}
}

// take is the job reading its stdin: some of it at once.
func (s *standIn) take(c net.Conn, data []byte, end bool) (taken uint64, n int, ok bool) {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	for len(s.out[0]) >= keeps && !s.held && s.users[0] == c && s.phase == control.Running {
		s.cond.Wait()
	}
	if s.held || s.gone || s.users[0] != c {
		return 0, 0, false
	}
	if s.phase == control.Restored {
		s.f.t.Error("stdin for a copy that may never run")
	}
	defer s.cond.Broadcast()
	if end {
		s.over = true
		s.finish(migrate.End{Exit: 3})
		return s.taken, 0, true
	}
	n = min(len(data), 5000)
	s.taken += uint64(n)
	if s.phase == control.Running {
		s.out[0] = append(s.out[0], data[:n]...)
		s.out[1] = append(s.out[1], bytes.Repeat([]byte("."), bytes.Count(data[:n], []byte("\n")))...)
	}
	return s.taken, n, true
}

func (s *standIn) giveOutput(c net.Conn, i int, from uint64) {
	go func() {
		for {
			var b [8]byte
			if _, err := io.ReadFull(c, b[:]); err != nil {
				s.f.mu.Lock()
				c.Close()
				s.cond.Broadcast()
				s.f.mu.Unlock()
				return
			}
			s.acknowledge(c, i, binary.BigEndian.Uint64(b[:]))
		}
	}()
	for {
		data, end, ok := s.output(c, i, from)
		if !ok {
			return
		}
		if len(data) == 0 && !end {
			continue
		}
		if _, err := c.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...)); err != nil {
			return
		}
		from += uint64(len(data))
		if end {
			io.Copy(io.Discard, c) // the last acknowledgements are read by the other one
			return
		}
	}
}

func (s *standIn) acknowledge(c net.Conn, i int, at uint64) {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	defer s.cond.Broadcast()
	switch have := s.base[i] + uint64(len(s.out[i])); {
	case s.users[i+1] != c:
	case at == control.Closed:
		s.eof[i] = true
	case at > have:
		s.f.t.Errorf("%d bytes of output %d acknowledged; there are %d", at, i, have)
	case at > s.base[i]:
		s.out[i] = bytes.Clone(s.out[i][at-s.base[i]:])
		s.base[i] = at
	}
}

// output is what follows a byte of an output stream, when there is something.
func (s *standIn) output(c net.Conn, i int, from uint64) (data []byte, end, ok bool) {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	for {
		if s.users[i+1] != c { // another has taken the stream over, and may have acknowledged more
			return nil, false, false
		}
		if from < s.base[i] || from > s.base[i]+uint64(len(s.out[i])) {
			s.f.t.Errorf("output %d asked for from byte %d; it has %d to %d", i, from, s.base[i], s.base[i]+uint64(len(s.out[i])))
			return nil, false, false
		}
		data = s.out[i][from-s.base[i]:]
		data = bytes.Clone(data[:min(len(data), 3000)])
		if len(data) > 0 || s.eof[i] {
			return data, len(data) == 0, true
		}
		if s.gone {
			return nil, false, false
		}
		s.cond.Wait()
	}
}

// node is one of the fleet: a migrate.Peer.
type node struct {
	f  *fleet
	id api.NodeID
}

func (n node) with(o migrate.Order, f func(*standIn) error) error {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	s, err := n.f.find(o.Job, migrate.Placement{Node: n.id, Epoch: o.Epoch})
	if err != nil {
		return err
	}
	defer s.cond.Broadcast()
	return f(s)
}

func (n node) Start(_ context.Context, o migrate.Order, spec control.Spec) error {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	n.f.specs[o.Job] = spec
	if n.f.refuse != nil {
		return n.f.refuse
	}
	n.f.add(o.Job, migrate.Placement{Node: n.id, Epoch: o.Epoch}, control.Running)
	return nil
}

func (n node) Inspect(_ context.Context, o migrate.Order) (migrate.Facts, error) {
	return migrate.Facts{}, n.with(o, func(*standIn) error { return nil })
}

func (n node) Prepare(_ context.Context, o migrate.Order) error {
	n.f.mu.Lock()
	defer n.f.mu.Unlock()
	n.f.add(o.Job, migrate.Placement{Node: n.id, Epoch: o.Epoch}, control.Empty)
	return nil
}

func (n node) Freeze(_ context.Context, o migrate.Order) (migrate.Pids, error) {
	return nil, n.with(o, func(s *standIn) error {
		if s.phase != control.Running {
			return errors.New("it is " + string(s.phase))
		}
		s.phase, s.held = control.Dumped, true
		if s.users[0] != nil {
			s.users[0].Close()
		}
		n.f.images[o.Job] = s.state.clone()
		return nil
	})
}

func (n node) Restore(_ context.Context, o migrate.Order) (migrate.Pids, error) {
	return nil, n.with(o, func(s *standIn) error {
		s.state, s.phase = n.f.images[o.Job], control.Restored
		return nil
	})
}

func (n node) Resume(_ context.Context, o migrate.Order) error {
	return n.with(o, func(s *standIn) error { s.phase = control.Running; return nil })
}

func (n node) Thaw(_ context.Context, o migrate.Order) error {
	return n.with(o, func(s *standIn) error { s.phase, s.held = control.Running, false; return nil })
}

func (n node) Discard(_ context.Context, o migrate.Order) error {
	err := n.with(o, func(s *standIn) error {
		// A killed copy's pipes end before its shim does.
		s.phase = control.Moved
		s.eof = [2]bool{true, true}
		s.cond.Broadcast()
		delete(n.f.copies, copyKey{s.job, s.at})
		time.AfterFunc(time.Millisecond, func() {
			n.f.mu.Lock()
			defer n.f.mu.Unlock()
			s.gone = true
			for _, c := range s.users {
				if c != nil {
					c.Close()
				}
			}
			s.cond.Broadcast()
		})
		return nil
	})
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}
