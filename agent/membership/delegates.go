package membership

import (
	"encoding/json"
	"fmt"
	"net"
	"time"

	"github.com/hashicorp/memberlist"

	"mosimg/internal/api"
)

// Meta is what every member knows of a node beside its address. It travels
// as JSON with short names; memberlist gives it 512 bytes.
type Meta struct {
	Node        api.NodeID `json:"n"`
	APIPort     int        `json:"p"`
	Migration   bool       `json:"m,omitempty"` // CRIU usable
	Fingerprint string     `json:"f"`
	// Leaving is set just before a goodbye: memberlist tells its users of a
	// node that left and of one that died in the same words.
	Leaving bool `json:"l,omitempty"`
}

func parseMeta(data []byte) (Meta, error) {
	var m Meta
	if err := json.Unmarshal(data, &m); err != nil {
		return Meta{}, fmt.Errorf("node meta: %w", err)
	}
	return m, nil
}

// delegate exchanges our own data over memberlist.
type delegate struct{ g *Group }

func (d delegate) NodeMeta(limit int) []byte {
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	data, err := json.Marshal(d.g.meta)
	if err != nil || len(data) > limit {
		panic(fmt.Sprintf("node meta of %d bytes, limit %d: %v", len(data), limit, err)) // fixed fields only
	}
	return data
}

func (d delegate) NotifyMsg(msg []byte) {
	if d.g.cfg.Receive != nil && !d.g.ended.Load() {
		d.g.cfg.Receive(msg)
	}
}

func (delegate) GetBroadcasts(_, _ int) [][]byte   { return nil }
func (delegate) LocalState(bool) []byte            { return nil }
func (delegate) MergeRemoteState(_ []byte, _ bool) {}

// aliveGate lets in only those whom the head named, at the address it named.
type aliveGate struct{ g *Group }

func (a aliveGate) NotifyAlive(n *memberlist.Node) error {
	id, ok := nodeOf(n.Name)
	if !ok {
		return fmt.Errorf("%q is no node's name", n.Name)
	}
	if id == a.g.cfg.Node && n.Addr.Equal(net.ParseIP(a.g.cfg.Address)) {
		return nil
	}
	a.g.mu.Lock()
	defer a.g.mu.Unlock()
	p, ok := a.g.peers[id]
	switch {
	case !ok:
		return fmt.Errorf("node %d is not a peer", id)
	case !n.Addr.Equal(net.ParseIP(p.Address)) || int(n.Port) != a.g.cfg.Port:
		return fmt.Errorf("node %d has address %s:%d, but the head says %s:%d", id, n.Addr, n.Port, p.Address, a.g.cfg.Port)
	}
	return nil
}

// events records what memberlist finds out.
type events struct{ g *Group }

func (e events) NotifyJoin(n *memberlist.Node)   { e.g.note(n, api.Alive) }
func (e events) NotifyUpdate(n *memberlist.Node) { e.g.note(n, api.Alive) }
func (e events) NotifyLeave(n *memberlist.Node)  { e.g.note(n, api.Dead) }

func (g *Group) note(n *memberlist.Node, l api.Liveness) {
	id, ok := nodeOf(n.Name)
	if !ok || g.ended.Load() {
		return
	}
	meta, err := parseMeta(n.Meta)
	if err != nil {
		g.log.Warn("member with unreadable meta", "node", id, "why", err)
	}
	g.mu.Lock()
	r := g.met[id]
	if r == nil {
		r = new(record)
		g.met[id] = r
	}
	if l == api.Dead && meta.Leaving {
		l = api.Left
	}
	changed := r.liveness != l
	if changed {
		r.liveness, r.since = l, time.Now()
	}
	r.meta = meta
	g.mu.Unlock()
	if !changed {
		return
	}
	if id != g.cfg.Node {
		g.log.Info("membership", "node", id, "is", l)
	}
	if g.cfg.Changed != nil {
		g.cfg.Changed(id, l)
	}
}
