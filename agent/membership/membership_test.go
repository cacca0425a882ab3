package membership

import (
	"bytes"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/memberlist"

	"mosimg/internal/api"
)

func key(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

// The three phases of a rotation, and what a node that slept through some of
// them makes of the last.
func TestApplyKeys(t *testing.T) {
	old, fresh := key(1), key(2)
	for _, tc := range []struct {
		name  string
		steps [][][]byte
	}{
		{"all phases", [][][]byte{{old, fresh}, {fresh, old}, {fresh}}},
		{"first phase missed", [][][]byte{{fresh, old}, {fresh}}},
		{"all but the last missed", [][][]byte{{fresh}}},
		{"two rotations missed", [][][]byte{{key(3), key(4)}, {fresh}}},
		{"repeated", [][][]byte{{fresh}, {fresh}}},
	} {
		ring, err := memberlist.NewKeyring(nil, old)
		if err != nil {
			t.Fatal(err)
		}
		for i, want := range tc.steps {
			if err := applyKeys(ring, want); err != nil {
				t.Errorf("%s, step %d: %v", tc.name, i, err)
			}
			got := ring.GetKeys()
			if !bytes.Equal(ring.GetPrimaryKey(), want[0]) || len(got) != len(want) {
				t.Errorf("%s, step %d: keys %x; want %x, the first encrypting", tc.name, i, got, want)
			}
		}
	}
}

// Rubbish from the head must leave the node with the keys that work.
func TestApplyKeysRefuses(t *testing.T) {
	for _, want := range [][][]byte{nil, {[]byte("short")}, {{}}} {
		ring, err := memberlist.NewKeyring(nil, key(1))
		if err != nil {
			t.Fatal(err)
		}
		if err := applyKeys(ring, want); err == nil {
			t.Errorf("applyKeys(%x) = no error", want)
		}
		if !bytes.Equal(ring.GetPrimaryKey(), key(1)) {
			t.Errorf("applyKeys(%x) changed the key in use", want)
		}
	}
}

func TestNodeNames(t *testing.T) {
	for name, want := range map[string]api.NodeID{
		"node1": 1, "node70000": 70000,
		"node0": 0, "node-1": 0, "node01": 0, "node1x": 0, "head": 0, "": 0, "node": 0, "node99999999999999999999": 0,
	} {
		if got, _ := nodeOf(name); got != want {
			t.Errorf("nodeOf(%q) = %d; want %d", name, got, want)
		}
	}
}

// A member that knows the key may still not pose as another node.
func TestAliveGate(t *testing.T) {
	g := &Group{cfg: Config{Node: 1, Address: "10.77.0.1", Port: 4662}}
	g.allow([]api.Peer{{Node: 1, Address: "10.77.0.1"}, {Node: 2, Address: "10.77.0.2"}})
	for _, tc := range []struct {
		name, addr string
		port       uint16
		ok         bool
	}{
		{"node1", "10.77.0.1", 4662, true},
		{"node2", "10.77.0.2", 4662, true},
		{"node2", "10.77.0.3", 4662, false}, // somebody else's number
		{"node2", "10.77.0.2", 1, false},
		{"node3", "10.77.0.2", 4662, false}, // not a peer
		{"node1", "10.77.0.9", 4662, false}, // our own number
		{"head", "10.77.0.1", 4662, false},
	} {
		err := aliveGate{g}.NotifyAlive(&memberlist.Node{Name: tc.name, Addr: net.ParseIP(tc.addr), Port: tc.port})
		if (err == nil) != tc.ok {
			t.Errorf("%s at %s:%d: %v; want let in: %v", tc.name, tc.addr, tc.port, err, tc.ok)
		}
	}
}

func TestLogLines(t *testing.T) {
	for line, want := range map[string]slog.Level{
		"[ERR] memberlist: Decrypt packet failed: x from=1.2.3.4": slog.LevelWarn,
		"[WARN] memberlist: Refuting a suspect message":           slog.LevelDebug,
		"[DEBUG] memberlist: Stream connection":                   slog.LevelDebug,
		"no tag":                                                  slog.LevelDebug,
		"[":                                                       slog.LevelDebug,
	} {
		if got, text := parseLine(line); got != want || strings.Contains(text, "memberlist: ") {
			t.Errorf("parseLine(%q) = %v, %q; want %v", line, got, text, want)
		}
	}
}

// Anybody on the LAN can send rubbish to the gossip port: it must not flood
// the console of every node.
func TestLogIsHeldBack(t *testing.T) {
	a := &adapter{seen: make(map[string]*seen)}
	now := time.Unix(1000, 0)
	shown := 0
	for i := range 1000 {
		if _, ok := a.admit(kindOf(fmt.Sprintf("Decrypt packet failed: from=10.0.0.%d", i)), now.Add(time.Duration(i)*time.Millisecond)); ok {
			shown++
		}
	}
	if shown != 1 {
		t.Errorf("%d of 1000 equal complaints shown; want 1", shown)
	}
	if held, ok := a.admit(kindOf("Decrypt packet failed: x"), now.Add(2*repeatAfter)); !ok || held != 999 {
		t.Errorf("after a while: shown %v with %d held back; want 999", ok, held)
	}
	for i := range 10 * maxKinds {
		a.admit(strings.Repeat("k", i), now)
	}
	if len(a.seen) > maxKinds {
		t.Errorf("%d kinds remembered; want at most %d", len(a.seen), maxKinds)
	}
}

func FuzzMeta(f *testing.F) {
	f.Add([]byte(`{"n":1,"p":4661,"f":"x"}`))
	f.Fuzz(func(_ *testing.T, b []byte) { parseMeta(b) })
}

// start makes a group on an address of its own.
func start(t *testing.T, id api.NodeID, port int, view api.ClusterView, receive func([]byte)) *Group {
	t.Helper()
	g, err := Start(Config{
		Node: id, Address: fmt.Sprintf("127.0.9.%d", id), Port: port,
		Meta: Meta{Node: id, APIPort: 1, Fingerprint: "f"}, Receive: receive,
	}, view)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Stop)
	return g
}

// freePort is below those that the kernel gives to connections, which the groups of
// other tests make from the same addresses, and never the same twice.
func freePort(t *testing.T) int {
	t.Helper()
	for range 100 {
		port := 20000 + (os.Getpid()*31+int(ports.Add(1)))%12000
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.9.1:%d", port)); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

var ports atomic.Int32

// patience is how long a test waits for what should come in a few seconds: the
// machine that runs it may be busy with something else.
const patience = 45 * time.Second

func await(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

func livenessOf(g *Group, id api.NodeID) api.Liveness {
	for _, m := range g.Members() {
		if m.Node == id {
			return m.Liveness
		}
	}
	return ""
}

// inbox collects messages.
type inbox struct {
	mu   sync.Mutex
	msgs []string
}

func (b *inbox) receive(m []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.msgs = append(b.msgs, string(m))
}

func (b *inbox) has(m string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Contains(b.msgs, m)
}

// After a rotation a node that only knows the old key hears nothing and is
// not heard, whatever it sends.
func TestOldKeyIsDeafAndMute(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	view := api.ClusterView{Generation: 1, Name: "c", GossipKeys: [][]byte{key(1)}}
	for i := api.NodeID(1); i <= 3; i++ {
		view.Peers = append(view.Peers, api.Peer{Node: i, Address: fmt.Sprintf("127.0.9.%d", i)})
	}
	var in [4]inbox
	var g [4]*Group
	for i := api.NodeID(1); i <= 3; i++ {
		g[i] = start(t, i, port, view, in[i].receive)
	}
	for i := 1; i <= 3; i++ {
		for j := api.NodeID(1); j <= 3; j++ {
			await(t, patience, "all alive", func() bool { return livenessOf(g[i], j) == api.Alive })
		}
	}
	g[1].Send(9, []byte("before"))
	await(t, patience, "a message under the common key", func() bool { return in[2].has("before") && in[3].has("before") })

	// Node 3 is revoked: 1 and 2 get the new key in three phases.
	after := view
	after.Peers = view.Peers[:2]
	for _, keys := range [][][]byte{{key(1), key(2)}, {key(2), key(1)}, {key(2)}} {
		after.GossipKeys = keys
		for i := 1; i <= 2; i++ {
			if err := g[i].SetView(after); err != nil {
				t.Fatal(err)
			}
		}
	}
	if livenessOf(g[1], 3) != "" {
		t.Error("the revoked node is still in the table")
	}
	g[3].Send(9, []byte("from the revoked"))
	// Even sent to its address on purpose it cannot be read.
	if err := g[1].ml.SendToAddress(memberlist.Address{Addr: fmt.Sprintf("127.0.9.3:%d", port), Name: "node3"}, []byte("secret")); err != nil {
		t.Fatal(err)
	}
	g[1].Send(9, []byte("after"))
	await(t, patience, "the others go on", func() bool { return in[2].has("after") })
	if in[1].has("from the revoked") || in[2].has("from the revoked") {
		t.Error("the revoked node is heard")
	}
	if in[3].has("after") || in[3].has("secret") {
		t.Error("the revoked node hears")
	}
	await(t, patience, "the revoked node sees nobody", func() bool { return livenessOf(g[3], 1) == api.Dead && livenessOf(g[3], 2) == api.Dead })
	if livenessOf(g[1], 2) != api.Alive {
		t.Error("the members lost each other")
	}
}

// A node says goodbye: it is shown as left, not as dead. It comes back at
// another address, which the head vouches for.
func TestLeaveAndReturnElsewhere(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	peer := func(id, at int) api.Peer {
		return api.Peer{Node: api.NodeID(id), Address: fmt.Sprintf("127.0.9.%d", at)}
	}
	view := api.ClusterView{Name: "c", GossipKeys: [][]byte{key(1)}, Peers: []api.Peer{peer(11, 11), peer(12, 12)}}
	a := start(t, 11, port, view, nil)
	b := start(t, 12, port, view, nil)
	await(t, patience, "both alive", func() bool { return livenessOf(a, 12) == api.Alive && livenessOf(b, 11) == api.Alive })
	b.Leave()
	await(t, patience, "left", func() bool { return livenessOf(a, 12) == api.Left })
	moved := view
	moved.Peers = []api.Peer{peer(11, 11), peer(12, 13)}
	if err := a.SetView(moved); err != nil {
		t.Fatal(err)
	}
	back, err := Start(Config{Node: 12, Address: "127.0.9.13", Port: port, Meta: Meta{Node: 12, Migration: true}}, moved)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(back.Stop)
	await(t, patience, "alive at the new address", func() bool { return livenessOf(a, 12) == api.Alive })
	for _, m := range a.Members() {
		if m.Node == 12 && (!m.Migration || m.Address != "127.0.9.13") {
			t.Errorf("after its return: %+v", m)
		}
	}
}

func TestStartRefuses(t *testing.T) {
	for name, keys := range map[string][][]byte{"no key": nil, "short key": {[]byte("x")}} {
		if _, err := Start(Config{Node: 1, Address: "127.0.9.99", Port: freePort(t)}, api.ClusterView{GossipKeys: keys}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := Start(Config{Node: 1, Address: "192.0.2.1", Port: 4662}, api.ClusterView{GossipKeys: [][]byte{key(1)}}); err == nil {
		t.Error("an address that is not ours: no error")
	}
}

// A peer that was never met is in doubt at first and dead after a while.
func TestPeerNeverMet(t *testing.T) {
	g := &Group{cfg: Config{Node: 1}, met: make(map[api.NodeID]*record)}
	g.peers = map[api.NodeID]peer{
		2: {api.Peer{Node: 2}, time.Now()},
		3: {api.Peer{Node: 3}, time.Now().Add(-time.Minute)},
	}
	var got []api.Liveness
	for _, m := range g.Members() {
		got = append(got, m.Liveness)
	}
	if d := cmp.Diff([]api.Liveness{api.Suspect, api.Dead}, got); d != "" {
		t.Error(d)
	}
	g.allow([]api.Peer{{Node: 2}, {Node: 3}})
	if livenessOf(g, 3) != api.Dead {
		t.Error("a new view made a dead peer young")
	}
}
