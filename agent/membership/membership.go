// Package membership says which nodes of the cluster are alive. It is
// hashicorp/memberlist (SWIM with Lifeguard), encrypted from the first packet
// with the keys that the head hands to approved nodes, and restricted to the
// peers that the head names: knowing a key is not enough to become a member
// under another node's number or address.
package membership

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// A dead node is detected in three steps, and their sum is what a user waits:
// until somebody probes it (up to one round of probes, each member being
// probed by some other about once in probeInterval), until that probe has
// failed (probeInterval), and the time in which it may refute (suspicionMult *
// probeInterval for up to ten members; memberlist scales it with the logarithm
// of their number). With these it is about 3 to 5 s.
//
// A machine that is emulated or swaps answers late: it has probeTimeout for
// an answer over UDP, the rest of the interval over TCP and by way of others,
// and then the whole suspicion time to refute. Lifeguard stretches these on a
// machine that notices that it is itself slow (awarenessMax).
const (
	probeInterval = 800 * time.Millisecond
	probeTimeout  = 400 * time.Millisecond
	suspicionMult = 4
	awarenessMax  = 8
	// pushPullInterval mends what gossip lost; a full exchange is small here.
	pushPullInterval = 15 * time.Second
	streamTimeout    = 3 * time.Second
	// reclaimAfter lets a machine that died come back under its number with
	// another address at once: the head vouches for the new address.
	reclaimAfter = time.Nanosecond
	// joinInterval is how often peers that are not members are called. It
	// brings back a node that restarted and heals a partition, which
	// memberlist by itself does not.
	joinInterval = 3 * time.Second
	joinAtOnce   = 4 // so many peers in one round
	// grace is how long a peer that we have not met yet counts as suspect
	// and not as dead.
	grace        = 6 * time.Second
	leaveTimeout = 2 * time.Second
)

// Config is what a node needs to become a member.
type Config struct {
	Node    api.NodeID
	Address string // own IP; gossip is bound to it
	Port    int    // of every member; 0: api.GossipPort
	Meta    Meta
	// Receive gets each message of Send. It must not block nor keep the bytes.
	Receive func(msg []byte)
	// Changed, if set, is called when a node's liveness changes. It must
	// not block nor call back.
	Changed func(node api.NodeID, l api.Liveness)
	Log     *slog.Logger // nil: silent
}

// Group is the membership of this node. Its methods may be called concurrently.
type Group struct {
	cfg  Config
	log  *slog.Logger
	ml   *memberlist.Memberlist
	ring *memberlist.Keyring
	wake chan struct{} // a peer may be missing: join now
	stop context.CancelFunc
	done sync.WaitGroup
	// ended stops callbacks and log: memberlist's goroutines outlive Stop.
	ended atomic.Bool

	viewMu sync.Mutex // serialises SetView

	mu sync.Mutex // guards the following; never held while memberlist is called
	// peers are the nodes that may be members, by number.
	peers map[api.NodeID]peer
	// met holds what memberlist said of each node that was ever a member.
	met  map[api.NodeID]*record
	meta Meta
}

type peer struct {
	api.Peer
	added time.Time
}

type record struct {
	liveness api.Liveness
	since    time.Time
	meta     Meta
}

// nodeName is a node's name in memberlist: it must not change when an
// operator renames the node.
func nodeName(n api.NodeID) string { return "node" + strconv.Itoa(int(n)) }

func nodeOf(name string) (api.NodeID, bool) {
	digits, ok := strings.CutPrefix(name, "node")
	n, err := strconv.Atoi(digits)
	if !ok || err != nil || n < 1 || nodeName(api.NodeID(n)) != name {
		return 0, false
	}
	return api.NodeID(n), true
}

// Start makes this node a member of the cluster that view describes. It
// returns once it listens; the others are met in the background.
func Start(cfg Config, view api.ClusterView) (*Group, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Port == 0 {
		cfg.Port = api.GossipPort
	}
	if len(view.GossipKeys) == 0 {
		return nil, fault.New(fault.Refused, "join", view.Name, "the head gave no gossip key", "is the head of the same version?")
	}
	ring, err := memberlist.NewKeyring(nil, view.GossipKeys[0])
	if err != nil {
		return nil, fault.New(fault.Refused, "join", view.Name, fmt.Errorf("gossip key: %w", err), "")
	}
	g := &Group{
		cfg: cfg, log: cfg.Log, ring: ring, meta: cfg.Meta,
		wake: make(chan struct{}, 1),
		met:  make(map[api.NodeID]*record),
	}
	g.allow(view.Peers)
	if err := applyKeys(ring, view.GossipKeys); err != nil {
		return nil, fault.New(fault.Refused, "join", view.Name, err, "")
	}

	mc := memberlist.DefaultLANConfig()
	mc.Name = nodeName(cfg.Node)
	mc.BindAddr, mc.BindPort = cfg.Address, cfg.Port
	mc.AdvertiseAddr, mc.AdvertisePort = cfg.Address, cfg.Port
	mc.ProbeInterval, mc.ProbeTimeout = probeInterval, probeTimeout
	mc.SuspicionMult, mc.AwarenessMaxMultiplier = suspicionMult, awarenessMax
	mc.PushPullInterval, mc.TCPTimeout = pushPullInterval, streamTimeout
	mc.DeadNodeReclaimTime = reclaimAfter
	mc.EnableCompression = false // packets are small and CPUs may be slow
	mc.Keyring = ring
	mc.Logger = newLogger(cfg.Log, &g.ended)
	mc.Delegate, mc.Events, mc.Alive = delegate{g}, events{g}, aliveGate{g}
	if g.ml, err = memberlist.Create(mc); err != nil {
		return nil, fault.New(fault.Environment, "listen for gossip on", net.JoinHostPort(cfg.Address, strconv.Itoa(cfg.Port)), err, "is another agent running here?")
	}
	ctx, cancel := context.WithCancel(context.Background())
	g.stop = cancel
	g.done.Go(func() { g.joinLoop(ctx) })
	return g, nil
}

// SetView takes over a changed view: who may be a member, and the keys.
func (g *Group) SetView(view api.ClusterView) error {
	g.viewMu.Lock()
	defer g.viewMu.Unlock()
	g.allow(view.Peers)
	select {
	case g.wake <- struct{}{}:
	default:
	}
	return applyKeys(g.ring, view.GossipKeys)
}

func (g *Group) allow(list []api.Peer) {
	g.mu.Lock()
	defer g.mu.Unlock()
	old := g.peers
	g.peers = make(map[api.NodeID]peer, len(list))
	for _, p := range list {
		added := time.Now()
		if o, ok := old[p.Node]; ok && o.Address == p.Address {
			added = o.added
		}
		g.peers[p.Node] = peer{p, added}
	}
}

// applyKeys makes the ring hold exactly the keys wanted, the first of them
// primary. New keys come first, so that no packet of a peer that is one phase
// ahead is lost; then the primary changes; then old keys go.
func applyKeys(ring *memberlist.Keyring, want [][]byte) error {
	if len(want) == 0 {
		return errors.New("the head sent no gossip keys; the old ones stay")
	}
	for _, k := range want {
		if err := ring.AddKey(k); err != nil {
			return fmt.Errorf("add gossip key: %w", err)
		}
	}
	if err := ring.UseKey(want[0]); err != nil {
		return fmt.Errorf("use gossip key: %w", err)
	}
	for _, have := range slices.Clone(ring.GetKeys()) {
		if !slices.ContainsFunc(want, func(k []byte) bool { return bytes.Equal(k, have) }) {
			if err := ring.RemoveKey(have); err != nil {
				return fmt.Errorf("remove gossip key: %w", err)
			}
		}
	}
	return nil
}

// Allowed reports whether a node may be a member.
func (g *Group) Allowed(n api.NodeID) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, ok := g.peers[n]
	return ok
}

// SetMeta changes what the others know of this node.
func (g *Group) SetMeta(m Meta) error {
	g.mu.Lock()
	same := g.meta == m
	g.meta = m
	g.mu.Unlock()
	if same {
		return nil
	}
	return g.ml.UpdateNode(leaveTimeout)
}

// Send gives msg to up to n random living members, one encrypted packet each.
func (g *Group) Send(n int, msg []byte) {
	g.mu.Lock()
	var to []memberlist.Address
	for id, p := range g.peers {
		if r := g.met[id]; id != g.cfg.Node && r != nil && r.liveness == api.Alive {
			to = append(to, memberlist.Address{Addr: net.JoinHostPort(p.Address, strconv.Itoa(g.cfg.Port)), Name: nodeName(id)})
		}
	}
	g.mu.Unlock()
	rand.Shuffle(len(to), func(i, j int) { to[i], to[j] = to[j], to[i] })
	for _, a := range to[:min(n, len(to))] {
		if err := g.ml.SendToAddress(a, msg); err != nil {
			g.log.Debug("message not sent", "to", a.Name, "why", err)
		}
	}
}

// Members are the peers with what is known of them, sorted by number, without
// loads.
func (g *Group) Members() []api.Member {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := make([]api.Member, 0, len(g.peers))
	for id, p := range g.peers {
		m := api.Member{Node: id, Name: p.Name, Address: p.Address, Self: id == g.cfg.Node}
		if r := g.met[id]; r != nil {
			m.Liveness, m.Since, m.Migration = r.liveness, r.since, r.meta.Migration
		} else {
			m.Liveness, m.Since = api.Suspect, p.added
			if time.Since(p.added) > grace {
				m.Liveness, m.Since = api.Dead, p.added.Add(grace)
			}
		}
		list = append(list, m)
	}
	slices.SortFunc(list, func(a, b api.Member) int { return int(a.Node - b.Node) })
	return list
}

// missing are the addresses of some peers that are not members, at random.
func (g *Group) missing() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	var addrs []string
	for id, p := range g.peers {
		if r := g.met[id]; id != g.cfg.Node && (r == nil || r.liveness != api.Alive) {
			addrs = append(addrs, net.JoinHostPort(p.Address, strconv.Itoa(g.cfg.Port)))
		}
	}
	rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
	return addrs[:min(joinAtOnce, len(addrs))]
}

func (g *Group) joinLoop(ctx context.Context) {
	for {
		var wg sync.WaitGroup
		for _, addr := range g.missing() {
			wg.Go(func() {
				if _, err := g.ml.Join([]string{addr}); err != nil {
					g.log.Debug("peer does not answer", "peer", addr, "why", err)
				}
			})
		}
		wg.Wait()
		// Jitter, so that nodes which booted together do not call together.
		pause := joinInterval + rand.N(joinInterval/4)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		case <-g.wake:
		}
	}
}

// Leave says goodbye, so that the others show this node as left and not as
// dead, and stops.
func (g *Group) Leave() {
	g.mu.Lock()
	m := g.meta
	g.mu.Unlock()
	m.Leaving = true
	if err := g.SetMeta(m); err != nil {
		g.log.Debug("goodbye not heard", "why", err)
	}
	if err := g.ml.Leave(leaveTimeout); err != nil {
		g.log.Debug("leave not confirmed", "why", err)
	}
	g.Stop()
}

// Stop ends membership without a goodbye.
func (g *Group) Stop() {
	g.stop()
	g.ended.Store(true)
	g.ml.Shutdown()
	g.done.Wait()
}
