package jobs_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// only is the one copy of a job; nil if there is none.
func (f *fleet) only(id string) *standIn {
	f.mu.Lock()
	defer f.mu.Unlock()
	var found *standIn
	for key, s := range f.copies {
		if string(key.job) == id {
			if found != nil {
				return nil
			}
			found = s
		}
	}
	return found
}

func (s *standIn) got() []int {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	return slices.Clone(s.signals)
}

func (s *standIn) set(f func(*standIn)) {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	f(s)
	s.cond.Broadcast()
}

// A signal that is sent while the job moves arrives where it has moved to, once
// and in order; a second one of a kind waits no more than it does in the kernel.
func TestSignalsWaitForAMove(t *testing.T) {
	f := newFleet(t)
	f.cut = cuts(3, 2000) // many an answer is lost
	h := newHome(t, f)
	id := h.run(request())
	m := h.attach(id, h.socket)
	m.session.Signal(int(unix.SIGUSR1), false)
	until(t, "the first signal is there", func() bool { return len(f.only(id).got()) == 1 })

	// As in the middle of a dump.
	f.only(id).set(func(s *standIn) { s.phase = control.Dumping })
	for _, sig := range []unix.Signal{unix.SIGHUP, unix.SIGUSR2, unix.SIGHUP, unix.SIGTERM} {
		m.session.Signal(int(sig), true)
		time.Sleep(10 * time.Millisecond) // each its own message
	}
	f.only(id).set(func(s *standIn) { s.phase = control.Running })
	if _, err := h.agent().Move(t.Context(), id, "n2"); err != nil {
		t.Fatal(err)
	}
	want := []int{int(unix.SIGUSR1), int(unix.SIGHUP), int(unix.SIGUSR2), int(unix.SIGTERM)}
	until(t, "all signals are there", func() bool { return len(f.only(id).got()) >= len(want) })
	time.Sleep(50 * time.Millisecond)
	if got := f.only(id).got(); !slices.Equal(got, want) {
		t.Errorf("signals %v; want %v", got, want)
	}
	m.stdin.Close()
	m.wait()
}

// A signal that an agent has taken and not delivered when it dies reaches the
// job by the next one; those that were delivered do not come again.
func TestSignalsOutliveTheAgent(t *testing.T) {
	f := newFleet(t)
	f.cut = cuts(4, 3000)
	h := newHome(t, f)
	id := h.run(request())
	m := h.attach(id, h.socket)
	var want []int
	send := func(signals ...unix.Signal) {
		for _, sig := range signals {
			m.session.Signal(int(sig), false)
			want = append(want, int(sig))
		}
	}
	arrived := func() {
		t.Helper()
		until(t, "all signals are there", func() bool { return len(f.only(id).got()) >= len(want) })
	}
	send(unix.SIGUSR1, unix.SIGUSR2)
	arrived()
	for range 3 {
		f.only(id).set(func(s *standIn) { s.phase = control.Dumping })
		send(unix.SIGHUP, unix.SIGTERM, unix.SIGUSR1)
		time.Sleep(30 * time.Millisecond) // the agent has them
		h.stop()
		f.only(id).set(func(s *standIn) { s.phase = control.Running })
		h.start()
		arrived()
		h.stop() // perhaps before mosrun was told that they were heard
		h.start()
	}
	send(unix.SIGHUP)
	arrived()
	time.Sleep(50 * time.Millisecond)
	if got := f.only(id).got(); !slices.Equal(got, want) {
		t.Errorf("signals %v; want %v", got, want)
	}
	m.stdin.Close()
	m.wait()
}

func TestStopAndCont(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	id := h.run(request())
	m := h.attach(id, h.socket)
	if err := m.session.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	state := func() api.JobState {
		st, err := h.agent().Show(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return st.State
	}
	if got := state(); got != api.JobStopped {
		t.Errorf("a stopped job is shown as %q", got)
	}
	m.session.Cont()
	until(t, "it runs on", func() bool { return state() == api.JobRuns })
	m.stdin.Close()
	m.wait()
}

// A kill that hits the copy which is just being left behind must not be lost.
func TestKill(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	id := h.run(request())
	m := h.attach(id, h.socket)
	src := f.only(id)
	src.set(func(s *standIn) { s.phase = control.Dumped })
	killed := make(chan error)
	go func() { killed <- h.agent().Kill(t.Context(), id) }()
	until(t, "the kill is at the source", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return src.eof[0]
	})
	src.set(func(s *standIn) { s.phase = control.Running; s.eof = [2]bool{} })
	if err := <-killed; err != nil {
		t.Fatal(err)
	}
	if res, _, _ := m.wait(); res.Signal != int(unix.SIGKILL) {
		t.Errorf("a killed job ended as %+v", res)
	}
	until(t, "there is no such job", func() bool { return fault.KindOf(h.agent().Kill(t.Context(), id)) == fault.NotFound })
}

// A node that does not have the job any more has lost it: its user is told at
// once, and not after a lease.
func TestNodeStartedAnew(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	req := request()
	req.Node = "2"
	id := h.run(req)
	m := h.attach(id, h.socket)
	m.stdin.Write([]byte("one\n"))
	until(t, "its output is with us", m.saw("one\n"))
	s := f.only(id)
	if err := (node{f, 2}).Discard(t.Context(), migrate.Order{Job: s.job, Epoch: s.at.Epoch}); err != nil {
		t.Fatal(err)
	}
	res, stdout, _ := m.wait()
	if !strings.Contains(res.Lost, "node 2 does not have it any more") || string(stdout) != "one\n" {
		t.Errorf("the job ended as %+v with output %q", res, stdout)
	}
}

// A list is quick whatever a node does, and says which job waits.
func TestListWithASilentNode(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	var ids []string
	for _, to := range []string{"", "n2", "n3"} {
		req := request()
		req.Node = to
		ids = append(ids, h.run(req))
	}
	list := func() (states []api.JobState) {
		began := time.Now()
		table, err := h.agent().List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("the list took %v", took)
		}
		for i, j := range table.Jobs {
			if j.ID != ids[i] {
				t.Errorf("job %d of the list is %s; want %s", i, j.ID, ids[i])
			}
			if j.Bytes != 4096 || j.Processes != 2 || j.CPUSeconds != 1.5 {
				t.Errorf("job %s takes %d bytes, %d processes, %v s", j.ID, j.Bytes, j.Processes, j.CPUSeconds)
			}
			states = append(states, j.State)
		}
		return states
	}
	if got, want := list(), []api.JobState{api.JobRuns, api.JobRuns, api.JobRuns}; !slices.Equal(got, want) {
		t.Errorf("states %v; want %v", got, want)
	}
	f.mu.Lock()
	f.down[3] = true
	f.mu.Unlock()
	// One look without an answer is no outage: the last state is shown, at once.
	if got, want := list(), []api.JobState{api.JobRuns, api.JobRuns, api.JobRuns}; !slices.Equal(got, want) {
		t.Errorf("with node 3 down: states %v; want %v", got, want)
	}
	for _, id := range ids[:2] {
		if err := h.agent().Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

func TestMoveRefusals(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	id := h.run(request())
	locked := request()
	locked.Locked = true
	pinned := h.run(locked)
	for _, tc := range []struct {
		name, job, to string
		kind          fault.Kind
		want          string
	}{
		{"no such job", "1-2-abc", "2", fault.NotFound, "there is none of this name"},
		{"no such node", id, "9", fault.NotFound, "it is not a member of the cluster"},
		{"no such name", id, "nowhere", fault.NotFound, "it is not a member of the cluster"},
		{"a name that is a number", id, "-1", fault.NotFound, "it is not a member of the cluster"},
		{"down", id, "dead", fault.Unavailable, "node 4 (dead): it is down"},
		{"no CRIU there", id, "5", fault.Refused, "CRIU does not work there"},
		{"there already", id, "head", fault.Refused, "on node 1 already"},
		{"home already", id, "home", fault.Refused, "on node 1 already"},
	} {
		_, err := h.agent().Move(t.Context(), tc.job, tc.to)
		if fault.KindOf(err) != tc.kind || err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v (kind %d); want kind %d and %q", tc.name, err, fault.KindOf(err), tc.kind, tc.want)
		}
	}
	st, err := h.agent().Move(t.Context(), id, "3")
	if err != nil || st.Node != 3 || st.Moves != 1 || st.State != api.JobRuns || st.Reason != "" {
		t.Errorf("Move = %+v, %v", st, err)
	}
	if st, err = h.agent().Move(t.Context(), id, "home"); err != nil || st.Node != 1 || st.Moves != 2 {
		t.Errorf("Move home = %+v, %v", st, err)
	}
	// A lock is against moves that nobody asked for.
	if st, err = h.agent().Move(t.Context(), pinned, "2"); err != nil || st.Node != 2 || !st.Locked {
		t.Errorf("Move of a locked job = %+v, %v", st, err)
	}
	for _, id := range []string{id, pinned} {
		if err := h.agent().Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}
