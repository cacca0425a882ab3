package enrol

import (
	"context"
	"crypto/x509"
	"log/slog"
	"reflect"
	"sync"
	"time"

	"mosimg/internal/api"
	"mosimg/pxe/registry"
	"mosimg/pxe/trace"
)

const (
	// activeFor is how long after its last poll a node is waited for in a
	// rotation of the gossip keys.
	activeFor = 10 * time.Second
	// phaseLimit bounds a phase: a node that is gone must not keep a
	// revoked one inside. A live node that misses it gets the whole view
	// at its next poll.
	phaseLimit = 5 * time.Second
	// housekeeping is how often times of last sight go to disk and old
	// records are dropped.
	housekeeping = 5 * time.Minute
)

// polls remembers who asked for the cluster view, and which one they have.
type polls struct {
	// mu guards the following.
	mu    sync.Mutex
	nodes map[api.NodeID]poller
	acked chan struct{} // closed when a node acknowledged a generation
}

type poller struct {
	last     time.Time
	have     uint64
	inFlight int // long polls that wait here
	member   bool
}

// update changes what is known of a node, under the lock.
func (p *polls) update(id api.NodeID, f func(*poller)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.nodes == nil {
		p.nodes = map[api.NodeID]poller{}
	}
	n := p.nodes[id]
	had := n.have
	f(&n)
	p.nodes[id] = n
	if n.have != had && p.acked != nil {
		close(p.acked)
		p.acked = nil
	}
}

// begin notes that a node asks and has a generation; first tells whether it
// did not since it was let in.
func (p *polls) begin(id api.NodeID, have uint64, now time.Time) (first bool) {
	p.update(id, func(n *poller) {
		first = !n.member
		n.last, n.have, n.member = now, have, true
		n.inFlight++
	})
	return first
}

// end notes that a node got its answer.
func (p *polls) end(id api.NodeID, now time.Time) {
	p.update(id, func(n *poller) { n.last = now; n.inFlight-- })
}

// expect makes a node one that is waited for although it has not polled: after
// a restart of the head all members are.
func (p *polls) expect(id api.NodeID, now time.Time) {
	p.update(id, func(n *poller) { n.last = now })
}

// admitted makes the next poll of a node its first.
func (p *polls) admitted(id api.NodeID) {
	p.update(id, func(n *poller) { n.member = false })
}

// allHave tells whether every active one of the members has the generation,
// and gives a channel that is closed when that may have changed.
func (p *polls) allHave(members map[api.NodeID]bool, gen uint64, now time.Time) (bool, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.acked == nil {
		p.acked = make(chan struct{})
	}
	for id, n := range p.nodes {
		if members[id] && (n.inFlight > 0 || now.Sub(n.last) < activeFor) && n.have < gen {
			return false, p.acked
		}
	}
	return true, p.acked
}

// viewCache saves making the same view for each of a thousand pollers.
type viewCache struct {
	// mu guards the following.
	mu   sync.Mutex
	view *api.ClusterView
}

func (c *viewCache) get(tx *registry.Tx) *api.ClusterView {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.view == nil || c.view.Generation != tx.Generation() {
		c.view = tx.View()
	}
	return c.view
}

// Cluster is the view for a member that has generation have: at once if there
// is a newer one, else when there is or after wait. The view is shared: do not
// change it.
func (s *Service) Cluster(ctx context.Context, peer *x509.Certificate, have uint64, wait time.Duration) (*api.ClusterView, error) {
	s.init()
	deadline := s.now().Add(min(wait, maxWait))
	timeout := time.NewTimer(min(wait, maxWait))
	defer timeout.Stop()
	node := api.NodeID(0)
	for {
		changed := s.Store.Changed()
		var view *api.ClusterView
		var n *registry.Node
		err := s.Store.View(func(tx *registry.Tx) (err error) {
			if n, err = member(tx, peer); err == nil {
				view = s.views.get(tx)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		if have > view.Generation {
			// The head's state was put back from a copy: what the member
			// has is of no use.
			have = 0
		}
		if node == 0 {
			node = n.Node
			s.notePoll(n, have)
			defer func() { s.polls.end(node, s.now()) }()
		}
		if view.Generation != have || !s.now().Before(deadline) {
			return view, nil
		}
		select {
		case <-changed:
		case <-timeout.C:
		case <-ctx.Done():
			return view, nil
		}
	}
}

func (s *Service) notePoll(n *registry.Node, have uint64) {
	now := s.now()
	s.seen.touch(n.MAC, now)
	if s.polls.begin(n.Node, have, now) {
		trace.Event(s.log(), trace.Member, n.MAC, "address", n.Address, "node", int(n.Node), "name", n.Name)
	}
}

// Run drives what happens by itself: rotations of the gossip key and
// housekeeping. It returns when ctx ends.
func (s *Service) Run(ctx context.Context) error {
	s.init()
	if err := s.expectMembers(); err != nil {
		return err
	}
	go func() {
		tick := time.NewTicker(housekeeping)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				if err := s.flushSeen(); err != nil {
					s.log().Error("housekeeping", "error", err.Error())
				}
			}
		}
	}()
	s.rotate(ctx)
	return s.flushSeen()
}

// expectMembers makes a head that was restarted in the middle of a rotation
// wait for all members: which of them are alive it does not know yet.
func (s *Service) expectMembers() error {
	return s.Store.View(func(tx *registry.Tx) error {
		for _, p := range tx.View().Peers {
			s.polls.expect(p.Node, s.now())
		}
		return nil
	})
}

// rotate moves a rotation of the gossip keys on: to the next phase when all
// that are alive have heard of this one, or its time is up.
func (s *Service) rotate(ctx context.Context) {
	var phase registry.Rotation // the one that gen and began are of
	var gen uint64
	var began time.Time
	for ctx.Err() == nil {
		changed := s.Store.Changed()
		var r registry.Rotation
		var now uint64
		members := map[api.NodeID]bool{}
		err := s.Store.View(func(tx *registry.Tx) error {
			r = tx.Rotation()
			v := s.views.get(tx)
			now = v.Generation
			for _, p := range v.Peers {
				members[p.Node] = true
			}
			return nil
		})
		if err != nil {
			s.log().Error("rotate gossip key", "error", err.Error())
		}
		if err != nil || r.Phase == registry.Steady {
			phase = registry.Rotation{}
			select {
			case <-changed:
			case <-ctx.Done():
			}
			continue
		}
		if !reflect.DeepEqual(r, phase) {
			phase, began, gen = r, s.now(), now
		}
		done, acked := s.polls.allHave(members, gen, s.now())
		left := phaseLimit - s.now().Sub(began)
		if done || left <= 0 {
			err := s.Store.Update(func(tx *registry.Tx) error { tx.AdvanceRotation(); return nil })
			if err == nil {
				s.log().Info("gossip key", slog.Int("phase", r.Phase), slog.Bool("all_heard", done), slog.Duration("after", s.now().Sub(began).Round(time.Millisecond)))
				continue
			}
			s.log().Error("rotate gossip key", "error", err.Error())
		}
		timer := time.NewTimer(max(left, 100*time.Millisecond))
		select {
		case <-changed:
		case <-acked:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}
