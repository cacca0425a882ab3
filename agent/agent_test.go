package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/unixhttp"
)

// patience is how long a test waits for what should come in a second or five:
// the machine that runs it may be busy with something else.
const patience = 45 * time.Second

// node is an agent in this process, on an address of its own in 127/8.
type node struct {
	t      *testing.T
	cfg    Config
	cancel context.CancelFunc
	done   chan error
	client *unixhttp.Client
}

var (
	lastAddress atomic.Int32
	portsOnce   sync.Once
	apiPort     int
	gossipPort  int
)

// ports are two that nobody listens on; all agents use them, each on its own address.
func ports(t *testing.T) (int, int) {
	portsOnce.Do(func() {
		for _, p := range []*int{&apiPort, &gossipPort} {
			l, err := net.Listen("tcp", "0.0.0.0:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			*p = l.Addr().(*net.TCPAddr).Port
		}
	})
	return apiPort, gossipPort
}

func newNode(t *testing.T, h *testHead) *node {
	t.Helper()
	i := lastAddress.Add(1)
	a, g := ports(t)
	dir := t.TempDir()
	return &node{t: t, cfg: Config{
		Head: h.url, CA: identity.Pin(h.ca.Cert), Nonce: "n",
		MAC: fmt.Sprintf("52:54:00:00:00:%02x", i), Address: fmt.Sprintf("127.0.7.%d", i),
		StateDir: filepath.Join(dir, "state"), Socket: filepath.Join(dir, "s"),
		NoCRIU: "not in this test", APIPort: a, GossipPort: g,
		Log:      slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("on", i),
		setClock: func(time.Time) error { return errors.New("no clock here") },
	}}
}

func (n *node) start() *node {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel, n.done = cancel, make(chan error, 1)
	n.client = unixhttp.New(n.cfg.Socket, "agent")
	done := n.done
	go func() { done <- Run(ctx, n.cfg) }()
	n.t.Cleanup(n.stop)
	return n
}

func (n *node) stop() {
	n.cancel()
	select {
	case err := <-n.done:
		if err != nil {
			n.t.Errorf("agent %s: %v", n.cfg.Address, err)
		}
		n.done <- nil
	case <-time.After(20 * time.Second):
		n.t.Errorf("agent %s does not end", n.cfg.Address)
	}
}

func (n *node) status() (api.AgentStatus, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	var s api.AgentStatus
	return s, n.client.Get(ctx, api.PathStatus, &s)
}

func (n *node) table() api.MemberTable {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	var t api.MemberTable
	n.client.Get(ctx, api.PathMembers, &t)
	return t
}

func (n *node) awaitState(want api.AgentState, reason string) api.AgentStatus {
	n.t.Helper()
	var s api.AgentStatus
	var err error
	await(n.t, patience, func() string {
		if s, err = n.status(); err == nil && s.State == want && strings.Contains(s.Reason, reason) {
			return ""
		}
		return fmt.Sprintf("%s is %q (%s), %v; want %q (%s)", n.cfg.Address, s.State, s.Reason, err, want, reason)
	})
	return s
}

// sees waits until n sees the member as it should be.
func (n *node) sees(id api.NodeID, limit time.Duration, want func(api.Member) bool, what string) time.Duration {
	n.t.Helper()
	began := time.Now()
	await(n.t, limit, func() string {
		t := n.table()
		for _, m := range t.Members {
			if m.Node == id {
				if want(m) {
					return ""
				}
				return fmt.Sprintf("%s sees %+v; want %s", n.cfg.Address, m, what)
			}
		}
		if want(api.Member{}) {
			return ""
		}
		return fmt.Sprintf("%s does not see node %d in %+v; want %s", n.cfg.Address, id, t, what)
	})
	return time.Since(began)
}

func alive(m api.Member) bool {
	return m.Liveness == api.Alive && m.Load != nil && m.Load.MemTotal > 0 && m.AgeMillis < 3000
}
func dead(m api.Member) bool { return m.Liveness == api.Dead }
func gone(m api.Member) bool { return m.Node == 0 }

func await(t *testing.T, limit time.Duration, check func() string) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		text := check()
		if text == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %s", limit, text)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// Three machines are approved: each sees all three with their loads, and
// those of the others keep arriving.
func TestMembersSeeEachOther(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	nodes := []*node{newNode(t, h).start(), newNode(t, h).start(), newNode(t, h).start()}
	var ids []api.NodeID
	for _, n := range nodes {
		s := n.awaitState(api.StateMember, "")
		ids = append(ids, s.Node)
	}
	for _, n := range nodes {
		for _, id := range ids {
			n.sees(id, patience, alive, "alive with a load")
		}
	}
	var seq uint64
	for _, m := range nodes[0].table().Members {
		if m.Node == ids[1] {
			seq = m.Load.Seq
		}
	}
	nodes[0].sees(ids[1], patience, func(m api.Member) bool { return m.Load.Seq >= seq+2 }, "newer loads")
}

func TestPendingUntilApproved(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	h.approve = false
	n := newNode(t, h).start()
	s := n.awaitState(api.StatePending, "")
	if s.Fingerprint == "" || s.Address != n.cfg.Address {
		t.Errorf("status while pending = %+v; want fingerprint and address", s)
	}
	if m := n.table(); len(m.Members) != 0 {
		t.Errorf("a pending machine has members: %+v", m)
	}
	if c, err := net.DialTimeout("tcp", net.JoinHostPort(n.cfg.Address, fmt.Sprint(n.cfg.APIPort)), time.Second); err == nil {
		c.Close()
		t.Error("a pending machine serves members")
	}
	began := time.Now()
	h.admit(n.cfg.MAC)
	n.awaitState(api.StateMember, "")
	if took := time.Since(began); took > pollWait/2 {
		t.Errorf("approval took %v to arrive; want at once", took)
	}
}

func TestDeniedSaysWhy(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	n := newNode(t, h)
	h.nodes[n.cfg.MAC] = &testNode{id: 9, state: api.Denied}
	n.start().awaitState(api.StateDenied, "an operator said no")
}

// Another cluster's head answers at the head's address: nothing is told to it.
func TestForeignHeadIsRefused(t *testing.T) {
	t.Parallel()
	h, other := startHead(t), startHead(t)
	n := newNode(t, h)
	n.cfg.Head = other.url
	n.start().awaitState(api.StateNoHead, identity.ErrPin.Error())
	other.mu.Lock()
	defer other.mu.Unlock()
	if other.enrols > 0 {
		t.Error("the agent enrolled at a foreign head")
	}
}

func TestNoHeadThenHead(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	h.stop()
	n := newNode(t, h).start()
	n.awaitState(api.StateNoHead, "connection refused")
	h.restart()
	n.awaitState(api.StateMember, "")
}

func TestNotToldWhereTheHeadIs(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	n := newNode(t, h)
	n.cfg.Head, n.cfg.CA = "", ""
	n.start().awaitState(api.StateNoHead, "was not told where its head is")
}

func TestWrongClock(t *testing.T) {
	t.Parallel()
	t.Run("host", func(t *testing.T) {
		h := startHead(t)
		h.skew = -48 * time.Hour
		h.restartWithSkew()
		n := newNode(t, h).start()
		n.awaitState(api.StateDenied, "clock is 48h0m0s ahead of the head's")
	})
	t.Run("own machine", func(t *testing.T) {
		h := startHead(t)
		h.skew = 72 * time.Hour
		h.restartWithSkew()
		n := newNode(t, h)
		n.cfg.OwnMachine = true
		got := make(chan time.Time, 10)
		n.cfg.setClock = func(at time.Time) error {
			select {
			case got <- at:
			default:
			}
			return errors.New("stop here") // this process's clock stays
		}
		n.start()
		select {
		case at := <-got:
			if off := time.Until(at) - h.skew; off.Abs() > 5*time.Second {
				t.Errorf("clock set %v off the head's", off)
			}
		case <-time.After(patience):
			t.Fatal("clock not set")
		}
	})
}

// restartWithSkew serves again with a certificate of the skewed time.
func (h *testHead) restartWithSkew() { h.stop(); h.restart() }

// A certificate past half of its life is renewed without a question.
func TestRenew(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	h.issued = identity.CertLifetime * 3 / 4
	n := newNode(t, h).start()
	n.awaitState(api.StateMember, "")
	await(t, patience, func() string {
		if s, _ := n.status(); time.Until(s.CertExpires) > identity.CertLifetime*9/10 {
			return ""
		}
		return "the certificate was not renewed"
	})
}

// The agent is restarted: same key, same number, no new approval, and it
// gets in even while the head is down.
func TestRestartKeepsIdentity(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	n, peer := newNode(t, h).start(), newNode(t, h).start()
	before := n.awaitState(api.StateMember, "")
	p := peer.awaitState(api.StateMember, "")
	n.sees(p.Node, patience, alive, "alive")
	peer.sees(before.Node, patience, alive, "alive")
	n.stop()
	peer.sees(before.Node, patience, func(m api.Member) bool { return m.Liveness == api.Left }, "left, not dead")
	h.mu.Lock()
	enrols := h.enrols
	h.mu.Unlock()
	h.stop()
	n.start()
	after := n.awaitState(api.StateMember, "")
	if after.Fingerprint != before.Fingerprint || after.Node != before.Node {
		t.Errorf("after the restart %+v; before it %+v", after, before)
	}
	peer.sees(before.Node, patience, alive, "alive again")
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.enrols != enrols {
		t.Errorf("the restart enrolled %d times", h.enrols-enrols)
	}
}

// A member is revoked: it does not hear the others any more nor they it, its
// open connections end, and it says why.
func TestRevoked(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	a, b, bad := newNode(t, h).start(), newNode(t, h).start(), newNode(t, h).start()
	sa, sb, sx := a.awaitState(api.StateMember, ""), b.awaitState(api.StateMember, ""), bad.awaitState(api.StateMember, "")
	for _, n := range []*node{a, b} {
		n.sees(sx.Node, patience, alive, "alive")
	}
	// The bad node holds a connection to a member.
	key, err := loadKey(bad.cfg.StateDir)
	if err != nil {
		t.Fatal(err)
	}
	cred, err := loadCredentials(bad.cfg.StateDir, place{ca: bad.cfg.CA, mac: bad.cfg.MAC, address: bad.cfg.Address}, key, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	own := func() (*tls.Certificate, error) { return cred.tls(key), nil }
	cfg := identity.ClientToNode(own, h.ca.Cert, sa.Node, nil)
	conn, err := tls.Dial("tcp", net.JoinHostPort(a.cfg.Address, fmt.Sprint(a.cfg.APIPort)), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", api.PathStatus)
	if n, err := conn.Read(make([]byte, 10)); err != nil || n == 0 {
		t.Fatalf("a member's call: %v", err)
	}

	h.revoke(bad.cfg.MAC)
	conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	for buf := make([]byte, 4096); ; {
		if _, err := conn.Read(buf); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the revoked node's open connection lives on")
			}
			break
		}
	}
	// A new one is refused in the handshake.
	if c, err := tls.Dial("tcp", net.JoinHostPort(a.cfg.Address, fmt.Sprint(a.cfg.APIPort)), cfg); err == nil {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("a revoked node's new connection: %v; want its certificate refused", err)
		}
		c.Close()
	}
	a.sees(sx.Node, patience, gone, "gone")
	b.sees(sx.Node, patience, gone, "gone")
	bad.awaitState(api.StateDenied, "an operator said no")
	a.sees(sb.Node, patience, alive, "still alive")
	if m := bad.table(); len(m.Members) != 0 {
		t.Errorf("the revoked node still has members: %+v", m)
	}
}

// A machine is killed: the others show it dead within seconds; it comes back
// under its number.
func TestDeathIsSeen(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	a, b, c := newNode(t, h).start(), newNode(t, h).start(), newNode(t, h)
	sa, sb := a.awaitState(api.StateMember, ""), b.awaitState(api.StateMember, "")
	// The victim's gossip is cut without a goodbye: its address disappears.
	victim := startVictim(t, c)
	id := victim.awaitState(api.StateMember, "").Node
	for _, n := range []*node{a, b} {
		n.sees(id, patience, alive, "alive")
	}
	victim.kill()
	for _, n := range []*node{a, b} {
		took := n.sees(id, patience, dead, "dead")
		t.Logf("dead after %v", took.Round(100*time.Millisecond))
	}
	a.sees(sb.Node, patience, alive, "alive")
	b.sees(sa.Node, patience, alive, "alive")
	back := newNode(t, h)
	back.cfg.MAC, back.cfg.Address = c.cfg.MAC, c.cfg.Address
	back.start()
	if got := back.awaitState(api.StateMember, "").Node; got != id {
		t.Errorf("it came back as node %d; want %d", got, id)
	}
	a.sees(id, patience, alive, "alive again")
}

// Local users are told who the agent thinks they are by nobody: the kernel says it.
func TestUnknownPathIsAProblem(t *testing.T) {
	t.Parallel()
	h := startHead(t)
	n := newNode(t, h).start()
	n.awaitState(api.StateMember, "")
	err := n.client.Get(context.Background(), "/v1/nothing", nil)
	if fault.KindOf(err) != fault.NotFound {
		t.Errorf("unknown path: %v; want a fault of kind NotFound", err)
	}
	if fi, err := os.Stat(n.cfg.Socket); err != nil || fi.Mode().Perm() != 0o666 {
		t.Errorf("socket: %v, %v; want mode 0666 for all local users", fi, err)
	}
	for _, f := range []string{keyFile, memberFile} {
		if fi, err := os.Stat(filepath.Join(n.cfg.StateDir, f)); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v; want mode 0600", f, fi, err)
		}
	}
}
