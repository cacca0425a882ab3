package balance

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"mosimg/internal/api"
)

func node(id api.NodeID, load float64) Node {
	return Node{ID: id, Load: load, CPUs: 1, Speed: StandardSpeed, MemTotal: 1 << 30, MemFree: 512 << 20}
}

func job(id string, load float64) Job {
	return Job{ID: id, Home: 1, Load: load, CPU: time.Minute, Bytes: 10 << 20, Here: time.Hour}
}

func loops(n int) []Job {
	var out []Job
	for i := range n {
		out = append(out, job(string(rune('a'+i)), 1))
	}
	return out
}

// checkDecision holds for every decision.
func checkDecision(t *testing.T, c Cluster, d Decision) {
	t.Helper()
	for _, j := range c.Jobs {
		if m := d.Move; m != nil && m.Job == j.ID {
			checkMove(t, c, j, *m)
			if d.Why[j.ID] != "" {
				t.Errorf("job %s goes, and does not because %s", j.ID, d.Why[j.ID])
			}
			continue
		}
		if d.Why[j.ID] == "" {
			t.Errorf("job %s stays, nobody knows why: %+v", j.ID, c)
		}
	}
	if len(d.Why) > len(c.Jobs) {
		t.Errorf("%d reasons for %d jobs", len(d.Why), len(c.Jobs))
	}
}

// checkMove: what no state of the cluster may lead to.
func checkMove(t *testing.T, c Cluster, j Job, m Move) {
	t.Helper()
	bad := func(why string) { t.Errorf("job %+v is sent to node %d: %s; of %+v", j, m.To, why, c) }
	var to *Node
	for i := range c.Others {
		if c.Others[i].ID == m.To {
			to = &c.Others[i]
		}
	}
	switch {
	case to == nil || m.To == c.Self.ID:
		bad("no other node")
		return
	case m.Reason == "":
		bad("nobody knows why")
	case j.Pinned != "":
		bad("it is pinned")
	case j.Wait > 0 || j.Refused[m.To] != "":
		bad("it has been refused")
	case j.Locked && !c.Self.Leaving:
		bad("it is locked")
	case c.kept(j) != "" && !c.Self.Leaving:
		bad("it is to stay")
	case to.Away != "" || to.Leaving || to.Age > Fresh:
		bad("nobody is there")
	case to.Blocked && to.ID != j.Home:
		bad("it takes no guests")
	case to.MemFree < 2*j.Bytes:
		bad("it does not fit")
	case m.Gain != 0 && m.Gain <= 1:
		bad("it does not gain")
	}
}

// The property test: whatever is heard, measured and remembered, a decision is
// one that can be carried out and is explained, and the next one does not undo it.
func TestAnyCluster(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 12))
	chance := func(p float64) bool { return rng.Float64() < p }
	anyNode := func(id api.NodeID) Node {
		n := node(id, 8*rng.Float64())
		n.CPUs, n.Speed = rng.IntN(9), []int{0, 500, 9000, 10000, 30000}[rng.IntN(5)]
		n.MemTotal = rng.Int64N(1 << 31)
		n.MemFree = rng.Int64N(n.MemTotal + 1)
		n.Age = time.Duration(rng.Int64N(int64(8 * time.Second)))
		n.Blocked, n.Leaving = chance(0.1), chance(0.1)
		if chance(0.1) {
			n.Away = "it is down"
		}
		return n
	}
	moves := 0
	for range 50_000 {
		c := Cluster{Self: anyNode(1), Seed: rng.Uint64()}
		if chance(0.05) {
			c.Stay = "stay"
		}
		if chance(0.05) {
			c.LocalStay = "lstay"
		}
		c.Self.Age = 0
		for id := range api.NodeID(rng.IntN(5)) {
			c.Others = append(c.Others, anyNode(id+2))
		}
		for i := range rng.IntN(6) {
			j := Job{ID: fmt.Sprint(i), Home: api.NodeID(1 + rng.IntN(4)), Load: 3 * rng.Float64(), CPU: time.Duration(rng.Int64N(int64(5 * time.Second))),
				Bytes: rng.Int64N(1 << 29), Moves: rng.IntN(4), Here: time.Duration(rng.Int64N(int64(time.Minute))), Locked: chance(0.1)}
			if chance(0.1) {
				j.Pinned = "it holds a socket"
			}
			if chance(0.1) {
				j.Wait, j.WaitWhy = time.Second, "it failed"
			}
			if chance(0.2) {
				j.Refused = map[api.NodeID]string{api.NodeID(2 + rng.IntN(4)): "its CPU lacks avx2"}
			}
			c.Jobs = append(c.Jobs, j)
		}
		for range rng.IntN(3) {
			c.Sent = append(c.Sent, Sent{To: api.NodeID(1 + rng.IntN(5)), Load: rng.Float64(), Bytes: rng.Int64N(1 << 26), Ago: time.Duration(rng.Int64N(int64(20 * time.Second)))})
		}
		d := Decide(c)
		checkDecision(t, c, d)
		if d.Move != nil {
			moves++
			checkSettles(t, c, *d.Move)
		}
		if to, why := Place(c, rng.Int64N(1<<30)); why == "" || to < 0 || int(to) > len(c.Others)+1 {
			t.Errorf("Place = %d, %q", to, why)
		}
		if t.Failed() {
			return
		}
	}
	if moves < 2_500 {
		t.Errorf("only %d of 50000 decisions were moves: the test looks at little", moves)
	}
}

// checkSettles: once a job that moved for its speed is there, with all loads
// exact and every wait over, it is not moved back.
func checkSettles(t *testing.T, c Cluster, m Move) {
	t.Helper()
	if m.Limit == 0 || c.starves() {
		return
	}
	var back Cluster
	for i := range c.Jobs {
		if c.Jobs[i].ID == m.Job {
			j := c.Jobs[i]
			j.Here, j.Refused = time.Hour, nil
			back.Jobs = []Job{j}
		}
	}
	for _, n := range c.Others {
		if n.ID == m.To {
			back.Self = n
			back.Self.Load = c.expected(n) + m.Load
			back.Self.MemFree, back.Self.MemFull = back.Self.MemTotal, 0
		}
	}
	source := c.Self
	source.Load, source.MemFree = max(0, source.Load-m.Load), source.MemTotal
	back.Others = []Node{source}
	if d := Decide(back); d.Move != nil && c.Self.Load >= m.Load {
		t.Errorf("%+v, and then back: %+v; of %+v", m, *d.Move, c)
	}
}

func TestDecide(t *testing.T) {
	busy := func(load float64, jobs int, others ...Node) Cluster {
		return Cluster{Self: node(1, load), Others: others, Jobs: loops(jobs)}
	}
	with := func(c Cluster, f func(*Cluster)) Cluster {
		f(&c)
		return c
	}
	for _, tc := range []struct {
		name string
		c    Cluster
		want string // JOB>NODE, or part of the reason of job a
	}{
		// MOSIX's own cases.
		{"2 and 0", busy(2, 2, node(2, 0)), "b>2"},
		{"2 and 1", busy(2, 2, node(2, 1)), "no node is better"},
		{"1 and 0", busy(1, 1, node(2, 0)), "no node is better"},
		{"6 and 4", busy(6, 6, node(2, 4)), "b>2"},
		{"the least loaded", busy(6, 6, node(2, 2), node(3, 1), node(4, 3)), "b>3"},
		{"second-highest load", with(busy(6, 3, node(2, 0)), func(c *Cluster) { c.Jobs[0].Load, c.Jobs[1].Load, c.Jobs[2].Load = 1, 3, 2 }), "c>2"},
		{"the highest of one", busy(2, 1, node(2, 0)), "a>2"},
		// CPUs and speed.
		{"a CPU each", with(busy(2, 2, node(2, 0)), func(c *Cluster) { c.Self.CPUs = 2 }), "no node is better"},
		{"three on two CPUs", with(busy(3, 3, node(2, 0)), func(c *Cluster) { c.Self.CPUs = 2 }), "b>2"},
		{"four CPUs there", with(busy(2, 2, node(2, 2)), func(c *Cluster) { c.Others[0].CPUs = 4 }), "b>2"},
		{"a faster CPU", with(busy(1, 1, node(2, 0)), func(c *Cluster) { c.Others[0].Speed = 15000 }), "a>2"},
		{"a little faster", with(busy(1, 1, node(2, 0)), func(c *Cluster) { c.Others[0].Speed, c.Others[0].CPUs = 10900, 4 }), "no node is better"},
		{"a slower CPU", with(busy(2, 2, node(2, 0)), func(c *Cluster) { c.Others[0].Speed = 6000 }), "no node is better"},
		{"speed not known there", with(busy(2, 2, node(2, 0)), func(c *Cluster) { c.Others[0].Speed = 0 }), "speed is not known"},
		{"speed not known here", with(busy(2, 2, node(2, 0)), func(c *Cluster) { c.Self.Speed = 0 }), "speed of this node"},
		// Who may go.
		{"nobody else", busy(3, 3), "there is no other node"},
		{"new", with(busy(2, 1, node(2, 0)), func(c *Cluster) { c.Jobs[0].CPU = 100 * time.Millisecond }), "it is new"},
		{"idle", with(busy(2, 1, node(2, 0)), func(c *Cluster) { c.Jobs[0].Load = 0.1 }), "hardly uses"},
		{"just come", with(busy(3, 1, node(2, 0)), func(c *Cluster) { c.Jobs[0].Moves, c.Jobs[0].Here = 1, 4*time.Second }), "stays for 7s"},
		{"come often", with(busy(3, 1, node(2, 0)), func(c *Cluster) { c.Jobs[0].Moves, c.Jobs[0].Here = 6, 20*time.Second }), "stays for 32s"},
		{"started a moment ago", with(busy(3, 1, node(2, 0)), func(c *Cluster) { c.Jobs[0].Here = 2 * time.Second }), "a>2"},
		{"locked", with(busy(2, 1, node(2, 0)), func(c *Cluster) { c.Jobs[0].Locked = true }), "locked"},
		{"locked, another not", with(busy(2, 2, node(2, 0)), func(c *Cluster) { c.Jobs[1].Locked = true }), "a>2"},
		{"pinned", with(busy(2, 1, node(2, 0)), func(c *Cluster) { c.Jobs[0].Pinned = "it has a socket" }), "it has a socket"},
		{"backed off", with(busy(2, 1, node(2, 0)), func(c *Cluster) { c.Jobs[0].Wait, c.Jobs[0].WaitWhy = 9*time.Second, "no room" }), "again in 9s: no room"},
		{"misfit", with(busy(2, 1, node(2, 0)), func(c *Cluster) { c.Jobs[0].Refused = map[api.NodeID]string{2: "its CPU lacks avx2"} }), "lacks avx2"},
		{"misfit, the next fits", with(busy(4, 2, node(2, 0), node(3, 1)), func(c *Cluster) { c.Jobs[1].Refused = map[api.NodeID]string{2: "no"} }), "b>3"},
		{"stay", with(busy(2, 2, node(2, 0)), func(c *Cluster) { c.Stay = "mosctl stay" }), "mosctl stay"},
		{"lstay", with(busy(2, 2, node(2, 0)), func(c *Cluster) { c.LocalStay = "mosctl lstay" }), "mosctl lstay"},
		{"lstay, a guest", with(busy(2, 1, node(2, 0)), func(c *Cluster) { c.LocalStay, c.Jobs[0].Home = "mosctl lstay", 2 }), "a>2"},
		// Where to.
		{"old news", with(busy(9, 2, node(2, 0)), func(c *Cluster) { c.Others[0].Age = 7 * time.Second }), "not heard of for 7s"},
		{"down", with(busy(9, 2, node(2, 0)), func(c *Cluster) { c.Others[0].Away = "it is down" }), "it is down"},
		{"blocked", with(busy(9, 2, node(2, 0)), func(c *Cluster) { c.Others[0].Blocked = true }), "takes no guests"},
		{"blocked, but home", with(busy(9, 1, node(2, 0)), func(c *Cluster) { c.Others[0].Blocked, c.Jobs[0].Home = true, 2 }), "a>2"},
		{"leaving", with(busy(9, 2, node(2, 0)), func(c *Cluster) { c.Others[0].Leaving = true }), "it is leaving"},
		{"no memory", with(busy(9, 2, node(2, 0)), func(c *Cluster) { c.Others[0].MemFree = 110 << 20 }), "needs 20 MiB"},
		{"home of the equals", with(busy(9, 1, node(2, 0), node(3, 0), node(4, 0)), func(c *Cluster) { c.Jobs[0].Home = 3 }), "a>3"},
		// What was just sent counts.
		{"sent there", with(busy(3, 3, node(2, 0)), func(c *Cluster) { c.Sent = []Sent{{To: 2, Load: 2}} }), "no node is better"},
		{"sent long ago", with(busy(3, 3, node(2, 0)), func(c *Cluster) { c.Sent = []Sent{{To: 2, Load: 2, Ago: time.Minute}} }), "b>2"},
		{"memory sent there", with(busy(3, 3, node(2, 0)), func(c *Cluster) { c.Sent = []Sent{{To: 2, Bytes: 250 << 20}} }), "needs 20 MiB"},
		// Leaving: guests go whatever the loads are, locked or new.
		{"a leaving node's guest", with(busy(0, 1, node(2, 9)), func(c *Cluster) { c.Self.Leaving, c.Jobs[0].Home, c.Jobs[0].Locked, c.Jobs[0].CPU = true, 2, true, 0 }), "a>2"},
		{"a leaving node's own", with(busy(9, 1, node(2, 0)), func(c *Cluster) { c.Self.Leaving = true }), "its home"},
		{"a leaving node's guest cannot go", with(busy(0, 1, node(2, 9)), func(c *Cluster) { c.Self.Leaving, c.Jobs[0].Home, c.Others[0].Away = true, 2, "it is down" }), "no other takes it"},
		// Memory.
		{"starving: the smallest that is enough", with(busy(0, 3, node(2, 9)), func(c *Cluster) {
			c.Self.MemFree, c.Jobs[0].Bytes, c.Jobs[1].Bytes, c.Jobs[2].Bytes = 30<<20, 90<<20, 200<<20, 40<<20
		}), "a>2"},
		{"starving: none is enough", with(busy(0, 3, node(2, 9)), func(c *Cluster) {
			c.Self.MemFree, c.Jobs[0].Bytes, c.Jobs[1].Bytes, c.Jobs[2].Bytes = 10<<20, 20<<20, 60<<20, 40<<20
		}), "b>2"},
		{"starving by pressure", with(busy(0, 2, node(2, 9)), func(c *Cluster) {
			c.Self.MemFull, c.Jobs[0].Bytes, c.Jobs[1].Bytes = 0.2, 60<<20, 100<<20
		}), "a>2"},
		{"pressure of before the last left", with(busy(0, 2, node(2, 9)), func(c *Cluster) {
			c.Self.MemFull, c.Sent = 0.2, []Sent{{To: 2, Bytes: 1 << 20, Ago: 5 * time.Second}}
		}), "no node is better"},
		{"starving, and nobody has room", with(busy(0, 1, node(2, 9)), func(c *Cluster) { c.Self.MemFree, c.Others[0].MemFree = 10<<20, 50<<20 }), "no other has enough"},
		{"starving: locked stays", with(busy(0, 1, node(2, 9)), func(c *Cluster) { c.Self.MemFree, c.Jobs[0].Locked = 10<<20, true }), "locked"},
	} {
		d := Decide(tc.c)
		checkDecision(t, tc.c, d)
		got := d.Why["a"]
		if d.Move != nil {
			got = fmt.Sprintf("%s>%d", d.Move.Job, d.Move.To)
		}
		if !strings.Contains(got, tc.want) {
			t.Errorf("%s: %q; want %q", tc.name, got, tc.want)
		}
	}
}

// Where mosrun -b starts a program.
func TestPlace(t *testing.T) {
	idle, full := node(2, 0), node(1, 1)
	for _, tc := range []struct {
		name   string
		self   Node
		others []Node
		sent   []Sent
		bytes  int64
		want   api.NodeID
	}{
		{name: "alone", self: node(1, 9), want: 1},
		{name: "home is idle", self: node(1, 0), others: []Node{idle}, want: 1},
		{name: "home is idle and slow", self: Node{ID: 1, CPUs: 1, Speed: 2000, MemTotal: 1 << 30, MemFree: 1 << 29}, others: []Node{idle}, want: 1},
		{name: "home is busy", self: full, others: []Node{idle}, want: 2},
		{name: "as busy everywhere", self: full, others: []Node{node(2, 1)}, want: 1},
		{name: "the third of a burst", self: node(1, 0), others: []Node{idle}, sent: []Sent{{To: 1, Load: 1}, {To: 2, Load: 1}}, want: 1},
		{name: "the second of a burst", self: node(1, 0), others: []Node{idle}, sent: []Sent{{To: 1, Load: 1}}, want: 2},
		{name: "home lacks memory", self: node(1, 0), others: []Node{{ID: 2, Load: 3, CPUs: 1, Speed: 1, MemTotal: 4 << 30, MemFree: 4 << 30}}, bytes: 1 << 30, want: 2},
		{name: "all lack memory", self: node(1, 0), others: []Node{idle}, bytes: 1 << 30, want: 0},
		{name: "old news", self: full, others: []Node{{ID: 2, CPUs: 1, Speed: 1, MemTotal: 1 << 30, MemFree: 1 << 30, Age: time.Minute}}, want: 1},
	} {
		if got, why := Place(Cluster{Self: tc.self, Others: tc.others, Sent: tc.sent}, tc.bytes); got != tc.want {
			t.Errorf("%s: node %d (%s); want %d", tc.name, got, why, tc.want)
		}
	}
}

// Ten nodes that have all heard of an idle one at once send it one job each.
func TestAdmit(t *testing.T) {
	self := node(1, 0)
	var sent []Sent
	taken := 0
	for range 10 {
		if Admit(self, sent, 1, 3) == nil {
			taken++
			sent = append(sent, Sent{To: 1, Load: 1})
		}
	}
	if taken != 2 {
		t.Errorf("%d jobs of nodes with 3 each were taken; want 2: with a third it would be no better here", taken)
	}
	if err := Admit(node(1, 9), nil, 1, 0); err != nil {
		t.Errorf("a job that comes for memory, or from a node that is leaving: %v", err)
	}
}
