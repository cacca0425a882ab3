package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	"mosimg/agent/balance"
	"mosimg/agent/load"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

const (
	// decideEvery is how often the balancer decides, give or take a quarter: nodes
	// that have started together must not decide together.
	decideEvery = time.Second
	// moveLimit bounds a move that it has asked for: the largest memories take minutes.
	moveLimit = 15 * time.Minute
	// lookAgain is how long a job that could not be moved is taken not to be movable.
	lookAgain = 10 * time.Second
	// maxLoad is above the load of any job.
	maxLoad = 1 << 20
)

// ownLoad is this machine as it was last measured.
type ownLoad struct {
	api.LoadVector
	mean float64 // load.Mean
	full float64 // memory pressure
}

// balancer applies package balance to this node: it measures the jobs here,
// decides once a second, and asks the home of a job that is to go to move it.
type balancer struct {
	self     api.NodeID
	node     *migrate.Node
	client   migrate.Client
	service  homeService
	members  func() api.MemberTable
	own      func() (ownLoad, bool)
	mode     func() api.Mode
	brought  func() error // all of this home's jobs are here
	off      bool
	rootJobs bool
	log      *slog.Logger

	mu     sync.Mutex // guards the following
	ledger balance.Ledger
	jobs   map[migrate.JobID]*here
	busy   migrate.JobID // is being moved; "" if none is
	total  float64       // load of all jobs here, as last sampled
}

// homeService is what a balancer needs of this home.
type homeService interface {
	Propose(context.Context, migrate.JobID, migrate.Placement, migrate.Proposal) error
	BringHome(context.Context, migrate.JobID) error
	Away() []migrate.Record
}

// here is a job that runs on this node.
type here struct {
	copy  migrate.Copy
	group load.Group
	use   load.Use
	load  float64 // decayed, as MOSIX's of a process
	why   string  // it stays
}

// run decides until ctx ends.
func (b *balancer) run(ctx context.Context) {
	var moves sync.WaitGroup
	defer moves.Wait()
	for sleep(ctx, decideEvery*3/4+rand.N(decideEvery/2)) {
		b.measure(time.Now())
		b.decide(ctx, &moves)
		b.bring(ctx, &moves)
	}
}

// measure looks at the jobs that run here.
func (b *balancer) measure(now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	jobs := make(map[migrate.JobID]*here)
	b.total = 0
	for _, c := range b.node.Copies() {
		if c.Since.IsZero() {
			continue // it is still coming
		}
		h := b.jobs[c.Job]
		if h == nil || h.copy.Group != c.Group {
			h = &here{group: load.Group{Dir: c.Group}}
		}
		h.copy = c
		u, err := h.group.Sample(now)
		if err != nil {
			if !load.Gone(err) {
				b.log.Warn("a job is not measured", "job", c.Job, "err", err)
			}
			continue
		}
		h.use = u
		h.load = (5*h.load + 3*u.Load) / 8
		b.total += u.Load
		jobs[c.Job] = h
	}
	b.jobs = jobs
}

// runnable is the load of the jobs here.
func (b *balancer) runnable() float64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.total
}

// cluster is all that is known now; moving says that jobs are to be moved, and not
// to be started: then nodes without CRIU are none. mu is held.
func (b *balancer) cluster(now time.Time, moving bool) (balance.Cluster, bool) {
	own, ok := b.own()
	mode := b.mode()
	c := balance.Cluster{Self: nodeOf(own.LoadVector, 0), Sent: b.ledger.Sent(now), Seed: rand.Uint64()}
	c.Self.ID, c.Self.Load, c.Self.MemFull, c.Self.Leaving = b.self, own.mean, own.full, mode.Leaving
	switch {
	case b.off:
		c.Stay = "balancing is off (mosagent agent --balance=off)"
	case mode.Stay:
		c.Stay = "jobs stay on this node (mosctl stay)"
	}
	if mode.LocalStay {
		c.LocalStay = keepsAll
	}
	for _, m := range b.members().Members {
		if m.Self || m.Node == b.self {
			if moving && !m.Migration {
				c.Stay = "CRIU does not work on this node"
			}
			continue
		}
		n := balance.Node{ID: m.Node}
		if m.Load != nil {
			n = nodeOf(*m.Load, time.Duration(m.AgeMillis)*time.Millisecond)
		}
		switch {
		case m.Liveness != api.Alive:
			n.Away = fmt.Sprintf("it is %s", m.Liveness)
		case moving && !m.Migration:
			n.Away = "CRIU does not work there"
		case m.Load == nil:
			n.Away = "nothing was heard of its load yet"
		}
		c.Others = append(c.Others, n)
	}
	return c, ok
}

// keepsAll is why the jobs of this home do not leave it.
const keepsAll = "this home's jobs stay at home (mosctl lstay)"

func nodeOf(v api.LoadVector, age time.Duration) balance.Node {
	return balance.Node{
		ID: v.Node, Load: v.Load, CPUs: v.CPUs, Speed: v.Speed, MemTotal: v.MemTotal, MemFree: v.MemFree,
		Blocked: v.Blocked, Leaving: v.Leaving, Age: age,
	}
}

// policyJobs are the jobs here as package balance sees them; mu is held.
func (b *balancer) policyJobs(c balance.Cluster, now time.Time) []balance.Job {
	var out []balance.Job
	for _, h := range b.jobs {
		j := balance.Job{
			ID: string(h.copy.Job), Home: h.copy.Home, Load: h.load, CPU: h.use.CPU, Bytes: h.use.Bytes,
			Moves: h.copy.Moves, Here: now.Sub(h.copy.Since), Locked: h.copy.Locked,
		}
		if !h.use.Counted && c.Self.CPUs > 0 {
			// What it was given, and not what it wants.
			j.Load *= max(1, c.Self.Load/float64(c.Self.CPUs))
		}
		if h.copy.Owner.UID == 0 && !b.rootJobs {
			j.Pinned = "root's jobs stay at home"
		}
		b.ledger.Judge(&j, now)
		out = append(out, j)
	}
	b.ledger.Keep(out)
	return out
}

// decide makes a decision and begins to carry it out.
func (b *balancer) decide(ctx context.Context, moves *sync.WaitGroup) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	c, ok := b.cluster(now, true)
	if !ok {
		for _, h := range b.jobs {
			h.why = "this machine is not a member of the cluster"
		}
		return
	}
	c.Jobs = b.policyJobs(c, now)
	d := balance.Decide(c)
	for id, h := range b.jobs {
		h.why = d.Why[string(id)]
		if id == b.busy {
			h.why = "it is being moved"
		}
	}
	m := d.Move
	if m == nil || b.busy != "" {
		if m != nil && migrate.JobID(m.Job) != b.busy {
			b.jobs[migrate.JobID(m.Job)].why = "another job goes first"
		}
		return
	}
	h := b.jobs[migrate.JobID(m.Job)]
	h.why = "it is being moved: " + m.Reason
	b.busy = h.copy.Job
	moves.Go(func() {
		b.send(ctx, h.copy, h.use.Bytes, *m, c.Self.Leaving)
		b.mu.Lock()
		b.busy = ""
		b.mu.Unlock()
	})
}

// send has a job moved by its home.
func (b *balancer) send(ctx context.Context, cp migrate.Copy, bytes int64, m balance.Move, must bool) {
	ctx, cancel := context.WithTimeout(ctx, moveLimit)
	defer cancel()
	log := b.log.With("job", cp.Job, "to", m.To)
	at := migrate.Placement{Node: b.self, Epoch: cp.Epoch}
	// What holds it here is seen by a look at all its processes, which is for once a move and not for each second.
	if f, err := b.node.Inspect(ctx, migrate.Order{Job: cp.Job, Home: cp.Home, Epoch: cp.Epoch}); err == nil && f.Use.Pinned != "" {
		log.Debug("a job would go, but cannot", "why", f.Use.Pinned)
		b.note(func(l *balance.Ledger, now time.Time) { l.Pinned(m.Job, f.Use.Pinned, lookAgain, now) })
		return
	}
	log.Info("a job is to go", "why", m.Reason, "gain", fmt.Sprintf("%.2f", m.Gain), "load", fmt.Sprintf("%.2f", m.Load))
	move := migrate.Proposal{To: m.To, Bid: migrate.Bid{Load: m.Load, Limit: m.Limit}, Must: must, Reason: m.Reason}
	propose := b.service.Propose
	if cp.Home != b.self {
		propose = func(ctx context.Context, job migrate.JobID, at migrate.Placement, move migrate.Proposal) error {
			return b.client.Propose(ctx, cp.Home, job, at, move)
		}
	}
	err := propose(ctx, cp.Job, at, move)
	switch {
	case err == nil || errors.Is(err, migrate.ErrUnfinished):
		b.note(func(l *balance.Ledger, now time.Time) { l.Went(m.Job, m.To, m.Load, bytes, now) })
	case ctx.Err() != nil: // the agent ends
	default:
		log.Info("a job does not go", "why", err)
		b.note(func(l *balance.Ledger, now time.Time) { l.Failed(m.Job, m.To, err.Error(), now) })
	}
}

func (b *balancer) note(f func(*balance.Ledger, time.Time)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f(&b.ledger, time.Now())
}

// bring fetches one of this home's jobs, if that is wanted.
func (b *balancer) bring(ctx context.Context, moves *sync.WaitGroup) {
	if !b.mode().Bringing {
		return
	}
	away := b.service.Away()
	if len(away) == 0 {
		if err := b.brought(); err != nil {
			b.log.Warn("bring", "err", err)
		}
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.busy != "" {
		return
	}
	now := time.Now()
	for _, rec := range away {
		j := balance.Job{ID: string(rec.Job)}
		if b.ledger.Judge(&j, now); j.Wait > 0 || j.Refused[b.self] != "" || rec.Next != nil {
			continue
		}
		b.busy = rec.Job
		moves.Go(func() {
			err := b.service.BringHome(ctx, rec.Job)
			b.mu.Lock()
			defer b.mu.Unlock()
			b.busy = ""
			if err != nil && ctx.Err() == nil {
				b.log.Info("a job does not come home", "job", rec.Job, "why", err)
				b.ledger.Failed(string(rec.Job), b.self, err.Error(), time.Now())
			}
		})
		return
	}
}

// admit says whether a job may come here: a migrate.NodeConfig.Admit.
func (b *balancer) admit(o migrate.Order) error {
	mode := b.mode()
	switch {
	case o.Home == b.self:
		return nil // it is no guest
	case mode.Leaving:
		return fault.New(fault.Unavailable, "come to", fmt.Sprintf("node %d", b.self), "it is leaving", "")
	case mode.Blocked:
		return fault.New(fault.Unavailable, "come to", fmt.Sprintf("node %d", b.self), "it takes no guests (mosctl block)", "")
	case o.Bid == migrate.Bid{}:
		return nil // somebody wants it here
	case !(o.Bid.Load >= 0 && o.Bid.Load < maxLoad && o.Bid.Limit >= 0): // true for NaN too
		return fault.New(fault.Usage, "come to", fmt.Sprintf("node %d", b.self), fmt.Sprintf("an impossible bid %+v", o.Bid), "")
	}
	own, _ := b.own()
	self := nodeOf(own.LoadVector, 0)
	self.ID, self.Load = b.self, own.mean
	var came []balance.Sent
	for _, c := range b.node.Copies() {
		s := balance.Sent{To: b.self, Load: c.Load, Bytes: c.Bytes}
		if !c.Since.IsZero() {
			s.Ago = max(0, time.Since(c.Since))
		}
		came = append(came, s)
	}
	if err := balance.Admit(self, came, o.Bid.Load, o.Bid.Limit); err != nil {
		return fault.New(fault.Refused, "come to", fmt.Sprintf("node %d", b.self), err, "")
	}
	return nil
}

// Place implements jobs.Balance.
func (b *balancer) Place(job migrate.JobID, bytes int64) (api.NodeID, string) {
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	c, ok := b.cluster(now, false)
	if !ok {
		return b.self, "this machine is not a member of the cluster"
	}
	node, why := balance.Place(c, bytes)
	if node != 0 {
		b.ledger.Went(string(job), node, 1, bytes, now)
	}
	return node, why
}

// Gone implements jobs.Balance.
func (b *balancer) Gone(job migrate.JobID) {
	b.note(func(l *balance.Ledger, _ time.Time) { l.Gone(string(job)) })
}

// Keeps implements jobs.Balance.
func (b *balancer) Keeps() string {
	if b.mode().LocalStay {
		return keepsAll
	}
	return ""
}

// whyOf is why the jobs of a home stay on this node.
func (b *balancer) whyOf(home api.NodeID) map[migrate.JobID]string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make(map[migrate.JobID]string)
	for id, h := range b.jobs {
		if h.copy.Home == home {
			out[id] = h.why
		}
	}
	return out
}

// Stays implements jobs.Balance: each node is asked once, all at the same time.
func (b *balancer) Stays(ctx context.Context, recs []migrate.Record) map[migrate.JobID]string {
	out := b.whyOf(b.self)
	nodes := make(map[api.NodeID]bool)
	for _, rec := range recs {
		if rec.At.Node != b.self {
			nodes[rec.At.Node] = true
		}
	}
	var mu sync.Mutex
	var asking sync.WaitGroup
	for n := range nodes {
		asking.Go(func() {
			c := b.client
			c.Node = n
			why, err := c.Why(ctx, b.self)
			if err != nil {
				b.log.Debug("a node does not tell why jobs stay", "node", n, "err", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			maps.Copy(out, why)
		})
	}
	asking.Wait()
	return out
}

// pending is how far the node is with what its mode asks for.
func (b *balancer) pending(mode api.Mode) (guests, away int, why map[string]string) {
	for _, c := range b.node.Copies() {
		if c.Home != b.self {
			guests++
		}
	}
	recs := b.service.Away()
	away = len(recs)
	why = make(map[string]string)
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, h := range b.jobs {
		if mode.Leaving && h.copy.Home != b.self {
			why[string(id)] = h.why
		}
	}
	if mode.Bringing {
		now := time.Now()
		for _, rec := range recs {
			j := balance.Job{ID: string(rec.Job)}
			b.ledger.Judge(&j, now)
			why[string(rec.Job)] = j.Refused[b.self]
		}
	}
	return guests, away, why
}
