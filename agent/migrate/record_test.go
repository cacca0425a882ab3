package migrate

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"mosimg/agent/capsule/control"
	"mosimg/internal/api"
)

func ok(t *testing.T) func(Record, error) Record {
	return func(r Record, err error) Record {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
}

// The home's word about each copy, at each point of a move.
func TestVerdict(t *testing.T) {
	must := ok(t)
	start := NewRecord("j", 1, 1).Confirm()
	moving := must(start.Reserve(2))
	committed := must(moving.Commit())
	confirmed := committed.Confirm()
	taken := must(committed.Reclaim("gone"))
	src, dst := Placement{1, 1}, Placement{2, 2}
	for _, tt := range []struct {
		name     string
		rec      Record
		src, dst Verdict
	}{
		{"before", start, Run, Discard},
		{"under way", moving, Wait, Wait},
		{"called off", moving.Abort("x"), Run, Discard},
		{"committed", committed, Wait, Run},
		{"runs", confirmed, Discard, Run},
		{"source killed", confirmed.Settle(), Discard, Run},
		{"taken back", taken, Run, Discard},
		{"taken back and runs", taken.Confirm(), Discard, Discard}, // the source has epoch 3 by now
		{"over", confirmed.Finish(End{}), Discard, Discard},
	} {
		gotSrc, _ := tt.rec.Verdict(src)
		gotDst, _ := tt.rec.Verdict(dst)
		if gotSrc != tt.src || gotDst != tt.dst {
			t.Errorf("%s: source %s, destination %s; want %s, %s", tt.name, gotSrc, gotDst, tt.src, tt.dst)
		}
		if tt.src == Run && tt.dst == Run {
			t.Errorf("%s: two copies may run", tt.name)
		}
	}
	if _, epoch := taken.Verdict(src); epoch != 3 {
		t.Errorf("a job that was taken back has epoch %d; want 3: epoch 2 was given out", epoch)
	}
}

func TestTodo(t *testing.T) {
	must := ok(t)
	start := NewRecord("j", 1, 1).Confirm()
	moving := must(start.Reserve(2))
	committed := must(moving.Commit())
	for _, tt := range []struct {
		name string
		rec  Record
		want Task
	}{
		{"steady", start, Nothing},
		{"home died in the middle", moving, CallOff},
		{"called off", moving.Abort("x"), Nothing},
		{"committed", committed, ResumeAt},
		{"runs", committed.Confirm(), KillPrev},
		{"done", committed.Confirm().Settle(), Nothing},
		{"taken back", must(committed.Reclaim("x")), ResumeAt},
		{"over, copy left", committed.Finish(End{}), KillPrev},
	} {
		if got := tt.rec.Todo(); got != tt.want {
			t.Errorf("%s: Todo = %q; want %q", tt.name, got, tt.want)
		}
	}
}

func TestReserveRefuses(t *testing.T) {
	must := ok(t)
	start := NewRecord("j", 1, 1).Confirm()
	moving := must(start.Reserve(2))
	committed := must(moving.Commit())
	for name, r := range map[string]Record{"moving": moving, "committed": committed, "not settled": committed.Confirm(), "over": start.Finish(End{})} {
		if _, err := r.Reserve(3); err == nil {
			t.Errorf("%s: Reserve = no error", name)
		}
	}
	if _, err := start.Reserve(1); err == nil {
		t.Error("a move to where it is = no error")
	}
	if r := must(moving.Abort("x").Reserve(2)); r.Next.Epoch != 3 {
		t.Errorf("epoch %d after an abort; want 3: a late copy of epoch 2 must not fit", r.Next.Epoch)
	}
}

// model is the protocol without I/O: a home, nodes with copies, and everything
// that can go wrong between them, in any order.
type model struct {
	r      *rand.Rand
	rec    Record
	copies map[Placement]*modelCopy
	ready  uint64 // epoch of which the coordinator has heard that both copies are complete
	log    []string
}

type modelCopy struct {
	phase phase
	state control.State
}

func (m *model) do(what string) { m.log = append(m.log, fmt.Sprintf("%s: %+v", what, m.rec)) }

// settle is what a node does with a copy of its own accord.
func (m *model) settle(p Placement, c *modelCopy) {
	r := diagnose(c.phase, c.state)
	epoch := p.Epoch
	if r == ask {
		var v Verdict
		v, epoch = m.rec.Verdict(p)
		r = treat(c.state, v)
	}
	switch r {
	case resume:
		c.phase, c.state = running, control.Running
	case thaw:
		delete(m.copies, p)
		m.copies[Placement{p.Node, epoch}] = c
		c.phase, c.state = running, control.Running
	case noteGone:
		c.phase = gone
	case noteLost:
		if c.phase == running && p == m.rec.At {
			m.rec = m.rec.Finish(End{Lost: "x"})
		}
		c.phase = ended
	case throwAway:
		delete(m.copies, p)
	}
}

// step does one random thing that can happen.
func (m *model) step() {
	at, next := m.copies[m.rec.At], (*modelCopy)(nil)
	if m.rec.Next != nil {
		next = m.copies[*m.rec.Next]
	}
	switch m.r.IntN(10) {
	case 0:
		if r, err := m.rec.Reserve(api.NodeID(1 + m.r.IntN(3))); err == nil {
			m.rec = r
			m.do("reserve")
		}
	case 1: // prepare
		if m.rec.Next != nil && next == nil {
			m.copies[*m.rec.Next] = &modelCopy{prepared, control.Empty}
			m.do("prepare")
		}
	case 2: // freeze
		if m.rec.Next != nil && at != nil && at.state == control.Running {
			at.phase, at.state = frozen, control.Dumped
			m.do("freeze")
		}
	case 3: // restore, or commit once both copies were complete
		if m.rec.Next != nil && m.ready == m.rec.Next.Epoch {
			m.rec, _ = m.rec.Commit()
			m.do("commit")
		} else if next != nil && next.state == control.Empty && at != nil && at.state == control.Dumped {
			next.phase, next.state = restored, control.Restored
			if m.r.IntN(4) > 0 { // the home hears of it
				m.ready = m.rec.Next.Epoch
			}
			m.do("restore")
		}
	case 4: // the coordinator gives up, or is a new one
		if m.rec.Next != nil && m.r.IntN(6) == 0 {
			m.rec = m.rec.Abort("x")
			m.do("abort")
		}
	case 5, 6: // the home's task is carried out, its answer lost or not
		heard := m.r.IntN(3) > 0
		switch m.rec.Todo() {
		case ResumeAt:
			m.resumeAt(heard)
		case KillPrev:
			delete(m.copies, *m.rec.Prev)
			if heard {
				m.rec = m.rec.Settle()
			}
			m.do("kill")
		}
	case 7: // a shim dies
		if m.r.IntN(6) == 0 {
			for _, c := range m.copies {
				c.state = noShim
				m.do("shim dies")
				break
			}
		}
	default: // a node's agent was restarted or looks after its copies
		for p, c := range m.copies {
			m.settle(p, c)
			m.do(fmt.Sprint("settle ", p))
			break
		}
	}
}

func (m *model) resumeAt(heard bool) {
	p := m.rec.At
	if c := m.copies[Placement{p.Node, m.rec.Thaws}]; c != nil && m.rec.Thaws != 0 {
		delete(m.copies, Placement{p.Node, m.rec.Thaws})
		m.copies[p] = c
		if c.state == control.Dumped {
			c.phase, c.state = running, control.Running
		}
	}
	c := m.copies[p]
	if c != nil && c.phase == restored && c.state == noShim {
		c.phase = gone
	}
	switch {
	case c == nil || c.phase == frozen:
		m.rec = m.rec.Finish(End{Lost: "x"})
	case c.phase == gone:
		if m.rec.Prev == nil || m.rec.Thaws != 0 {
			m.rec = m.rec.Finish(End{Lost: "x"})
		} else {
			m.rec, _ = m.rec.Reclaim("x")
		}
	default:
		if c.phase == restored {
			c.phase, c.state = running, control.Running
		}
		if heard {
			m.rec = m.rec.Confirm()
		}
	}
	m.do("resume")
}

// check holds the invariants: one copy runs at most, and it is the one that
// the home's record names.
func (m *model) check(t *testing.T) {
	t.Helper()
	runs := 0
	for p, c := range m.copies {
		if c.state != control.Running {
			continue
		}
		runs++
		if p != m.rec.At && m.rec.End == nil {
			t.Errorf("copy %v runs, the job is %+v", p, m.rec)
		}
	}
	if runs > 1 {
		t.Errorf("%d copies run", runs)
	}
	if t.Failed() {
		for _, l := range m.log {
			t.Log(l)
		}
		t.FailNow()
	}
}

// Whatever is lost, repeated or restarted, in whatever order, a job is never
// run twice.
func TestNeverTwo(t *testing.T) {
	commits, losses := 0, 0
	for seed := range uint64(3000) {
		m := &model{r: rand.New(rand.NewPCG(seed, 1)), rec: NewRecord("j", 1, 1).Confirm(), copies: map[Placement]*modelCopy{{1, 1}: {running, control.Running}}}
		for range 80 {
			m.step()
			m.check(t)
		}
		commits += m.rec.Moves
		if m.rec.End != nil {
			losses++
		}
	}
	if commits < 500 {
		t.Errorf("only %d moves were committed: the model does not get anywhere", commits)
	}
	t.Logf("%d moves, %d jobs lost with their shim", commits, losses)
}

func TestDiagnose(t *testing.T) {
	for _, tt := range []struct {
		phase phase
		state control.State
		want  remedy
	}{
		{running, control.Running, leave},
		{running, noShim, noteLost},
		{frozen, noShim, noteLost},
		{restored, noShim, noteGone},
		{prepared, noShim, noteGone},
		{running, control.Restored, resume}, // died between journal and act
		{restored, control.Restored, ask},
		{prepared, control.Restored, ask}, // died between act and journal
		{running, control.Dumped, ask},
		{frozen, control.Dumped, ask},
		{frozen, control.Running, noteRun},
		{running, control.Ended, noteEnd},
		{ended, control.Ended, tell},
		{ended, noShim, tell},
		{gone, noShim, ask},
		{running, control.Dumping, busy},
		{frozen, control.Moved, throwAway},
		{prepared, control.Failed, ask},
	} {
		if got := diagnose(tt.phase, tt.state); got != tt.want {
			t.Errorf("diagnose(%s, %q) = %s; want %s", tt.phase, tt.state, got, tt.want)
		}
	}
}

func TestParseAvailable(t *testing.T) {
	if got, err := parseAvailable("MemTotal:  9 kB\nMemAvailable:   12 kB\n"); err != nil || got != 12<<10 {
		t.Errorf("parseAvailable = %d, %v", got, err)
	}
	if _, err := parseAvailable("x"); err == nil {
		t.Error("parseAvailable of nothing = no error")
	}
}

func TestJobNames(t *testing.T) {
	for name, want := range map[JobID]bool{"17": true, "a-1": true, "": false, "../x": false, "A": false, "a.b": false} {
		if got := name.check() == nil; got != want {
			t.Errorf("%q: %v; want %v", name, got, want)
		}
	}
}
