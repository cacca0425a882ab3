package agent

import (
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mosimg/agent/capsule/control"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// What an operator has said of a node must hold after its agent was restarted: a
// node that was emptied to be taken apart would fill up again.
func TestModeSurvivesTheAgent(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may change the mode")
	}
	n := newNode(t, startHead(t)).start()
	n.awaitState(api.StateMember, "")
	yes, no := true, false
	var st api.ModeStatus
	for _, c := range []api.ModeChange{{Blocked: &yes, Leaving: &yes}, {LocalStay: &yes}, {Leaving: &no}} {
		st = api.ModeStatus{}
		if err := n.client.Post(t.Context(), api.PathMode, c, &st); err != nil {
			t.Fatal(err)
		}
	}
	want := api.ModeStatus{Mode: api.Mode{Blocked: true, LocalStay: true}}
	if d := cmp.Diff(want, st); d != "" {
		t.Errorf("after three changes (-want +got):\n%s", d)
	}
	n.stop()
	n.start()
	n.awaitState(api.StateMember, "")
	st = api.ModeStatus{}
	if err := n.client.Get(t.Context(), api.PathMode, &st); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, st); d != "" {
		t.Errorf("after a restart (-want +got):\n%s", d)
	}
}

// A mode file that is broken must not keep the agent, and with it all jobs, down.
func TestBrokenMode(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, modeFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	k, err := openMode(dir)
	if err == nil || k.get() != (api.Mode{}) {
		t.Errorf("openMode = %+v, %v; want an error and the mode of a new node", k.get(), err)
	}
	k.drain(true)
	if !k.get().Leaving || !k.isDrained() {
		t.Error("a drained node is not leaving")
	}
}

// testBalancer is that of node 1, without jobs; node 2 is idle.
func testBalancer(t *testing.T, own ownLoad, mode api.Mode) *balancer {
	t.Helper()
	n, err := migrate.OpenNode(migrate.NodeConfig{Self: 1, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	return &balancer{
		self: 1, node: n, log: slog.New(slog.DiscardHandler),
		own:  func() (ownLoad, bool) { return own, own.CPUs > 0 },
		mode: func() api.Mode { return mode },
		members: func() api.MemberTable {
			idle := &api.LoadVector{Node: 2, CPUs: 1, Speed: 10000, MemTotal: 1 << 30, MemFree: 1 << 29}
			return api.MemberTable{Self: 1, Members: []api.Member{
				{Node: 1, Self: true, Liveness: api.Alive, Migration: true},
				{Node: 2, Liveness: api.Alive, Load: idle},
				{Node: 3, Liveness: api.Dead, Load: &api.LoadVector{Node: 3, CPUs: 9, Speed: 90000, MemTotal: 1 << 40, MemFree: 1 << 40}},
				{Node: 4, Liveness: api.Alive},
			}}
		},
	}
}

func machineWith(load float64) ownLoad {
	return ownLoad{LoadVector: api.LoadVector{Node: 1, CPUs: 1, Speed: 10000, MemTotal: 1 << 30, MemFree: 1 << 29}, mean: load}
}

// A node decides itself what comes: what it was told not to take, and what others
// have sent because of old news.
func TestAdmitted(t *testing.T) {
	bid := migrate.Bid{Load: 1, Limit: 2}
	for _, tc := range []struct {
		name string
		load float64
		mode api.Mode
		o    migrate.Order
		want string
	}{
		{"a guest", 9, api.Mode{}, migrate.Order{Home: 2}, ""},
		{"blocked", 0, api.Mode{Blocked: true}, migrate.Order{Home: 2}, "mosctl block"},
		{"leaving", 0, api.Mode{Leaving: true}, migrate.Order{Home: 2}, "it is leaving"},
		{"its own job", 9, api.Mode{Blocked: true, Leaving: true}, migrate.Order{Home: 1, Bid: bid}, ""},
		{"a good bid", 0, api.Mode{}, migrate.Order{Home: 2, Bid: bid}, ""},
		{"a bid that is too late", 2, api.Mode{}, migrate.Order{Home: 2, Bid: bid}, "others were quicker"},
		{"a bid that cannot be", 0, api.Mode{}, migrate.Order{Home: 2, Bid: migrate.Bid{Load: math.NaN(), Limit: 2}}, "impossible"},
		{"from a node that is leaving", 9, api.Mode{}, migrate.Order{Home: 2, Bid: migrate.Bid{Load: 1}}, ""},
	} {
		err := testBalancer(t, machineWith(tc.load), tc.mode).admit(tc.o)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v; want %q", tc.name, err, tc.want)
		}
	}
	// mosrun -b goes home when a node says that it takes none, and does not
	// when the program is not there.
	err := testBalancer(t, machineWith(0), api.Mode{Blocked: true}).admit(migrate.Order{Home: 2, Owner: control.Owner{UID: 1}})
	if fault.KindOf(err) != fault.Unavailable {
		t.Errorf("a blocked node refuses with kind %d; want %d", fault.KindOf(err), fault.Unavailable)
	}
}

// Where a program starts follows from what was heard, and from what was just started.
func TestBurstIsPlaced(t *testing.T) {
	b := testBalancer(t, machineWith(0), api.Mode{})
	var got []api.NodeID
	for _, job := range []migrate.JobID{"a", "b", "c", "d"} {
		n, why := b.Place(job, 0)
		if why == "" {
			t.Error("nobody tells why")
		}
		got = append(got, n)
	}
	if d := cmp.Diff([]api.NodeID{1, 2, 1, 2}, got); d != "" {
		t.Errorf("four programs of a loop (-want +got):\n%s", d)
	}
	// One after the other is no burst: each finds home idle again.
	b = testBalancer(t, machineWith(0), api.Mode{})
	for range 5 {
		n, _ := b.Place("a", 0)
		b.Gone("a")
		if n != 1 {
			t.Errorf("a short program starts on node %d though home is idle", n)
		}
	}
	for name, b := range map[string]*balancer{
		"no member": testBalancer(t, ownLoad{}, api.Mode{}),
		"stay":      testBalancer(t, machineWith(9), api.Mode{Stay: true}),
	} {
		if n, why := b.Place("a", 0); n != 1 || why == "" {
			t.Errorf("%s: node %d, %q; want home, with a reason", name, n, why)
		}
	}
	off := testBalancer(t, machineWith(9), api.Mode{})
	off.off = true
	if n, why := off.Place("a", 0); n != 1 || !strings.Contains(why, "--balance=off") {
		t.Errorf("balancing is off: node %d, %q", n, why)
	}
}
