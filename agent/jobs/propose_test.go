package jobs_test

import (
	"context"
	"strings"
	"testing"

	"mosimg/agent/capsule/control"
	"mosimg/agent/jobs"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// balancer is a jobs.Balance that says what it is told to.
type balancer struct {
	node  api.NodeID
	why   string
	keeps string
	gone  chan migrate.JobID
	bytes int64
}

func (b *balancer) Place(_ migrate.JobID, bytes int64) (api.NodeID, string) {
	b.bytes = bytes
	return b.node, b.why
}
func (b *balancer) Gone(id migrate.JobID) { b.gone <- id }
func (b *balancer) Keeps() string         { return b.keeps }
func (b *balancer) Stays(_ context.Context, recs []migrate.Record) map[migrate.JobID]string {
	out := map[migrate.JobID]string{}
	for _, r := range recs {
		out[r.Job] = "no node is better"
	}
	return out
}

// balancedHome is a home with that balancer.
func balancedHome(t *testing.T, f *fleet) (*home, *balancer) {
	t.Helper()
	b := &balancer{node: 1, gone: make(chan migrate.JobID, 100)}
	h := &home{t: t, f: f, dir: openDir(t), peer: func(id api.NodeID) migrate.Peer { return node{f, id} }}
	h.socket = h.dir + "/agent.sock"
	h.conf = func(c *jobs.Config) { c.Balance = b }
	h.start()
	t.Cleanup(h.stop)
	return h, b
}

// A node's balancer knows nothing of what a job's user and home want: the home
// must refuse for them, or a locked job wanders, and a proposal that was long on its way moves a job twice.
func TestProposals(t *testing.T) {
	f := newFleet(t)
	h, b := balancedHome(t, f)
	id := h.run(request())
	req := request()
	req.Locked = true
	locked := h.run(req)
	at := migrate.Placement{Node: 1, Epoch: 1}
	to := func(n api.NodeID) migrate.Proposal { return migrate.Proposal{To: n} }
	for _, tc := range []struct {
		name  string
		job   string
		from  migrate.Placement
		move  migrate.Proposal
		keeps string
		kind  fault.Kind
		want  string
	}{
		{"no such job", "1-2-abc", at, to(2), "", fault.NotFound, "there is none"},
		{"an old copy", id, migrate.Placement{Node: 2, Epoch: 1}, to(3), "", fault.Refused, "does not have it any more"},
		{"an old epoch", id, migrate.Placement{Node: 1, Epoch: 7}, to(3), "", fault.Refused, "does not have it any more"},
		{"locked", locked, at, to(2), "", fault.Refused, "mosrun -L"},
		{"lstay", id, at, to(2), "mosctl lstay", fault.Refused, "mosctl lstay"},
		{"down", id, at, to(4), "", fault.Unavailable, "it is down"},
		{"no CRIU there", id, at, to(5), "", fault.Refused, "CRIU does not work there"},
		{"nobody", id, at, to(9), "", fault.NotFound, "not a member"},
	} {
		b.keeps = tc.keeps
		err := h.service.Propose(t.Context(), migrate.JobID(tc.job), tc.from, tc.move)
		if fault.KindOf(err) != tc.kind || err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v; want kind %d and %q", tc.name, err, tc.kind, tc.want)
		}
	}
	b.keeps = ""
	if err := h.service.Propose(t.Context(), migrate.JobID(id), at, to(2)); err != nil {
		t.Error(err)
	}
	// A node that is leaving is stronger than a lock, and than a home that keeps its jobs.
	b.keeps = "mosctl lstay"
	if err := h.service.Propose(t.Context(), migrate.JobID(locked), at, migrate.Proposal{To: 3, Must: true}); err != nil {
		t.Error(err)
	}
	list, err := h.agent().List(t.Context())
	if err != nil || len(list.Jobs) != 2 {
		t.Fatalf("%+v, %v", list, err)
	}
	for i, want := range []api.NodeID{2, 3} {
		if j := list.Jobs[i]; j.Node != want || j.Stays != "no node is better" {
			t.Errorf("job %d is on node %d and stays because %q; want node %d and a reason", i, j.Node, j.Stays, want)
		}
	}
	if away := h.service.Away(); len(away) != 2 {
		t.Errorf("away: %+v; want both", away)
	}
	// bring takes home locked jobs too.
	for _, job := range []string{id, locked} {
		if err := h.service.BringHome(t.Context(), migrate.JobID(job)); err != nil {
			t.Error(err)
		}
	}
	if away := h.service.Away(); len(away) != 0 {
		t.Errorf("away: %+v; want none", away)
	}
	for _, id := range []string{id, locked} {
		if err := h.agent().Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

// unreachable is a node on which nothing can be started.
type unreachable struct {
	node
	why *error
}

func (u unreachable) Start(context.Context, migrate.Order, control.Spec) error { return *u.why }

// mosrun -b: the agent chooses. A node that cannot be reached is no reason not to run the program.
func TestBestNode(t *testing.T) {
	f := newFleet(t)
	h, b := balancedHome(t, f)
	h.stop()
	var failure error = fault.New(fault.Unavailable, "connect to", "node 3", "no route to host", "")
	h.peer = func(id api.NodeID) migrate.Peer {
		if id == 3 {
			return unreachable{node{f, id}, &failure}
		}
		return node{f, id}
	}
	h.start()
	start := func() (string, error) {
		req := request()
		req.Best, req.Bytes = true, 5<<20
		return h.agent().Start(t.Context(), req)
	}
	for _, tc := range []struct {
		name   string
		chosen api.NodeID
		want   api.NodeID
	}{{"home", 1, 1}, {"another", 2, 2}, {"one that does not answer", 3, 1}} {
		b.node = tc.chosen
		id, err := start()
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if at := f.only(id).at.Node; at != tc.want {
			t.Errorf("%s: it runs on node %d; want %d", tc.name, at, tc.want)
		}
		if b.bytes != 5<<20 {
			t.Errorf("%s: asked for a place with %d bytes", tc.name, b.bytes)
		}
		if err := h.agent().Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	// It may have begun it: at home it would run a second time.
	b.node, failure = 3, fault.New(fault.Unavailable, "start", "job", migrate.ErrNoAnswer, "")
	if _, err := start(); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("a node that has been asked and does not answer: %v", err)
	}
	b.node, b.why = 0, "no node has the memory"
	if _, err := start(); fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), "no node has the memory") {
		t.Errorf("without a place: %v", err)
	}
}
