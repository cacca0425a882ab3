package enrol

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/version"
	"mosimg/pxe/registry"
)

// site is a head's membership service with its registry on disk.
type site struct {
	*Service
	t       *testing.T
	dir     string
	members map[string]bool // addresses that answer a probe
}

func (s *site) Alive(_ context.Context, addr string, _ []byte) bool { return s.members[addr] }

func newSite(t *testing.T) *site {
	s := &site{t: t, dir: t.TempDir(), members: map[string]bool{}}
	s.start()
	t.Cleanup(func() { s.Store.Close() })
	return s
}

// start opens the registry and makes a service, as a head's start does.
func (s *site) start() {
	s.t.Helper()
	store, err := registry.Open(s.dir, registry.Options{Cluster: "lab"})
	if err != nil {
		s.t.Fatal(err)
	}
	s.Service = &Service{Store: store, Prober: s, CheckSource: true}
}

// machine is a diskless box that enrols.
type machine struct {
	s    *site
	key  identity.Key
	req  api.EnrolRequest
	addr netip.Addr
	cert *x509.Certificate // once it has one
}

// boot fetches a script's nonce and makes a key, as a machine does that is
// switched on.
func (s *site) boot(mac, addr string) *machine {
	s.t.Helper()
	from := netip.MustParseAddr(addr)
	nonce, err := s.IssueNonce(mac, from)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.machine(mac, nonce, from)
}

func (s *site) machine(mac, nonce string, from netip.Addr) *machine {
	s.t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		s.t.Fatal(err)
	}
	csr, err := identity.NewCSR(key)
	if err != nil {
		s.t.Fatal(err)
	}
	return &machine{s: s, key: key, addr: from, req: api.EnrolRequest{
		Protocol: version.Protocol, CSR: csr, Nonce: nonce, MAC: mac, Image: "abc",
		Inventory: api.Inventory{Arch: "amd64", CPUs: 2, MemoryBytes: 1 << 30},
	}}
}

func (m *machine) enrol() (*api.EnrolReply, error) {
	r, err := m.s.Enrol(m.s.t.Context(), &m.req, m.addr)
	if err == nil && r.State == api.Approved {
		if m.cert, err = x509.ParseCertificate(r.Certificate); err != nil {
			m.s.t.Fatal(err)
		}
	}
	return r, err
}

// want enrols and checks the state of the reply.
func (m *machine) want(state api.NodeState) *api.EnrolReply {
	m.s.t.Helper()
	r, err := m.enrol()
	if err != nil {
		m.s.t.Fatalf("enrol %s: %v; want %s", m.req.MAC, err, state)
	}
	if r.State != state {
		m.s.t.Fatalf("enrol %s = %s (%s); want %s", m.req.MAC, r.State, r.Reason, state)
	}
	return r
}

func (m *machine) wantRefused(kind fault.Kind, text string) {
	m.s.t.Helper()
	r, err := m.enrol()
	if err == nil {
		m.s.t.Fatalf("enrol %s = %s; want a refusal that says %q", m.req.MAC, r.State, text)
	}
	if fault.KindOf(err) != kind || !strings.Contains(err.Error(), text) {
		m.s.t.Fatalf("enrol %s: %v (kind %d); want kind %d and %q", m.req.MAC, err, fault.KindOf(err), kind, text)
	}
}

func (s *site) act(action, node string) api.NodeRecord {
	s.t.Helper()
	r, err := s.Act(api.NodeAct{Action: action, Node: node})
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

func (s *site) record(mac string) *registry.Node {
	s.t.Helper()
	var n *registry.Node
	if err := s.Store.View(func(tx *registry.Tx) error { n = tx.Node(mac); return nil }); err != nil {
		s.t.Fatal(err)
	}
	return n
}

const (
	mac1, addr1 = "52:54:00:00:00:01", "10.77.0.131"
	mac2, addr2 = "52:54:00:00:00:02", "10.77.0.132"
	mac3, addr3 = "52:54:00:00:00:03", "10.77.0.133"
)

func TestApproval(t *testing.T) {
	s := newSite(t)
	m := s.boot(mac1, addr1)
	r := m.want(api.Pending)
	if r.Node != 0 || r.Certificate != nil || r.Cluster != nil || r.HeadTime.IsZero() {
		t.Errorf("a pending machine was told %+v", r)
	}
	rec := s.act("approve", strings.ReplaceAll(s.record(mac1).Fingerprint, "-", "")[:6])
	if rec.Node != 1 || rec.Name != "node1" {
		t.Errorf("approved as %d %q; want 1 node1", rec.Node, rec.Name)
	}
	r = m.want(api.Approved)
	if got := identity.Serial(m.cert); !identity.SameKey(m.cert.PublicKey, m.key.Public()) || got == "" {
		t.Error("the certificate is not for the machine's key")
	}
	if id, err := identity.NodeOf(m.cert); err != nil || id != 1 {
		t.Errorf("NodeOf = %d, %v; want 1", id, err)
	}
	want := []api.Peer{{Node: 1, Name: "node1", Address: addr1, MAC: mac1}}
	if d := cmp.Diff(want, r.Cluster.Peers); d != "" {
		t.Errorf("peers (-want +got):\n%s", d)
	}
	view, err := s.Cluster(t.Context(), m.cert, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(r.Cluster, view); d != "" {
		t.Errorf("the view with the certificate is not the one that is published (-reply +poll):\n%s", d)
	}
	// An agent that asks again, and again, is not a reason to fill the disk.
	for range 50 {
		m.want(api.Approved)
	}
	if n := len(s.record(mac1).Certs); n != 1 {
		t.Errorf("%d certificates issued for 51 requests; want 1", n)
	}
}

// An operator sees a machine join the moment it is approved.
func TestApprovalEndsLongPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		m := s.boot(mac1, addr1)
		m.req.WaitMillis = 30_000
		start := time.Now()
		got := make(chan api.NodeState)
		go func() {
			r, err := m.enrol()
			if err != nil {
				t.Error(err)
			}
			got <- r.State
		}()
		time.Sleep(7 * time.Second)
		s.act("approve", mac1)
		if st := <-got; st != api.Approved || time.Since(start) > 8*time.Second {
			t.Errorf("reply %s after %v; want approved after 7 s", st, time.Since(start))
		}
		// And without a decision the poll ends by itself.
		m2 := s.boot(mac2, addr2)
		m2.req.WaitMillis = 3_600_000
		start = time.Now()
		m2.want(api.Pending)
		if d := time.Since(start); d != maxWait {
			t.Errorf("a long poll took %v; want %v", d, maxWait)
		}
	})
}

func TestEnrolRefusals(t *testing.T) {
	s := newSite(t)
	m := s.boot(mac1, addr1)

	bad := *m
	bad.req.Protocol = version.Protocol + 1
	bad.wantRefused(fault.Refused, "protocol")
	bad = *m
	bad.req.MAC = "01:00:5e:00:00:01x"
	bad.wantRefused(fault.Usage, "Ethernet")
	bad = *m
	bad.req.CSR = append([]byte(nil), m.req.CSR...)
	bad.req.CSR[len(bad.req.CSR)-1] ^= 1
	bad.wantRefused(fault.Untrusted, "certificate request")
	bad = *m
	bad.req.CSR = nil
	bad.wantRefused(fault.Untrusted, "certificate request")
	bad = *m
	bad.req.Nonce = "invented"
	bad.wantRefused(fault.Refused, "unknown boot nonce")
	bad = *m
	bad.req.MAC = mac2
	bad.wantRefused(fault.Refused, "another machine")
	bad = *m
	bad.addr = netip.MustParseAddr(addr2)
	bad.wantRefused(fault.Refused, "another address")

	// None of that used the nonce up or left a record.
	if n := s.record(mac1); n != nil {
		t.Errorf("refused requests left %+v", n)
	}
	m.want(api.Pending)
}

func TestReplay(t *testing.T) {
	s := newSite(t)
	m := s.boot(mac1, addr1)
	m.want(api.Pending)
	thief := s.machine(mac1, m.req.Nonce, m.addr)
	thief.wantRefused(fault.Refused, "used before")
	if a := s.record(mac1).Alert; !strings.Contains(a, "another key") {
		t.Errorf("alert = %q; want one about another key", a)
	}
	m.want(api.Pending) // the machine itself is not harmed
	s.act("approve", mac1)
	if a := s.record(mac1).Alert; a != "" {
		t.Errorf("approval left the alert %q", a)
	}
	m.want(api.Approved)
}

func TestNonceExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		late, waiting := s.boot(mac1, addr1), s.boot(mac2, addr2)
		waiting.want(api.Pending)
		time.Sleep(NonceLife)
		late.wantRefused(fault.Refused, "expired")
		// A machine that waits for its approval over the weekend gets in.
		time.Sleep(60 * time.Hour)
		s.boot(mac3, addr3) // prunes
		waiting.want(api.Pending)
		s.act("approve", mac2)
		waiting.want(api.Approved)
	})
}

func TestAdoptionWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		early := s.boot(mac3, addr3)
		early.want(api.Pending)
		if err := s.Adopt(api.Adopt{For: time.Minute, Next: 2}); err != nil {
			t.Fatal(err)
		}
		m1, m2 := s.boot(mac1, addr1), s.boot(mac2, addr2)
		m1.want(api.Approved)
		for range 3 {
			m1.want(api.Approved) // asks again: not counted again
		}
		m2.want(api.Approved)
		early.want(api.Pending) // the window let two in
		if err := s.Adopt(api.Adopt{For: time.Minute}); err != nil {
			t.Fatal(err)
		}
		early.want(api.Approved)
		time.Sleep(time.Minute)
		s.boot("52:54:00:00:00:04", "10.77.0.134").want(api.Pending)
		// A clock that is set back does not open it again.
		if err := s.Adopt(api.Adopt{For: time.Hour}); err != nil {
			t.Fatal(err)
		}
		if err := s.Store.View(func(tx *registry.Tx) error {
			if a := tx.Adoption(); !a.Open(time.Now()) || a.Open(time.Now().AddDate(-1, 0, 0)) {
				t.Error("the window is closed now, or open a year earlier")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := s.Adopt(api.Adopt{For: -1}); fault.KindOf(err) != fault.Usage {
			t.Errorf("Adopt(-1) = %v; want a usage fault", err)
		}
	})
}

func TestReboot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		m := s.boot(mac1, addr1)
		m.want(api.Pending)
		s.act("approve", mac1)
		m.want(api.Approved)
		old := m.cert
		time.Sleep(time.Minute)

		again := s.boot(mac1, addr1)
		r := again.want(api.Approved)
		if r.Node != 1 || r.Name != "node1" {
			t.Errorf("came back as %d %s; want 1 node1", r.Node, r.Name)
		}
		if d := cmp.Diff([]string{identity.Serial(old)}, r.Cluster.Revoked); d != "" {
			t.Errorf("revoked (-want +got):\n%s", d)
		}
		if _, err := s.Cluster(t.Context(), old, 0, 0); fault.KindOf(err) != fault.Refused {
			t.Errorf("poll with the certificate from before the reboot: %v; want refused", err)
		}
		if _, err := s.Cluster(t.Context(), again.cert, 0, 0); err != nil {
			t.Error(err)
		}
		// The list of void certificates does not grow for ever.
		time.Sleep(identity.CertLifetime + time.Hour)
		if err := s.flushSeen(); err != nil {
			t.Fatal(err)
		}
		s.Store.View(func(tx *registry.Tx) error {
			if r := tx.View().Revoked; len(r) != 0 {
				t.Errorf("revoked after they expired: %v", r)
			}
			return nil
		})
	})
}

// A box with a copied MAC must not take a living member's place.
func TestClonedMAC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.Listed = map[string]bool{mac1: true}
		m := s.boot(mac1, addr1)
		m.want(api.Approved)
		s.members[addr1] = true
		time.Sleep(time.Minute)
		clone := s.boot(mac1, addr1)
		clone.wantRefused(fault.Refused, "alive")
		if a := s.record(mac1).Alert; a == "" {
			t.Error("no alert for the operator")
		}
		if _, err := s.Cluster(t.Context(), m.cert, 0, 0); err != nil {
			t.Errorf("the living member was harmed: %v", err)
		}
		// The member is switched off: now it is a reboot.
		s.members[addr1] = false
		clone.want(api.Approved)
	})
}

// Two machines with one MAC wait for approval. The operator approves what the
// first one's console shows; the second must not profit from that, not even
// in the moment before the first one's API answers.
func TestCloneWaitsBesidePending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		m, clone := s.boot(mac1, addr1), s.boot(mac1, addr1)
		for range 3 {
			m.want(api.Pending)
			if r := clone.want(api.Pending); r.Reason == "" {
				t.Error("the clone is not told why it waits")
			}
			time.Sleep(2 * time.Second)
		}
		if n := s.record(mac1); n.Fingerprint != identity.Fingerprint(m.key.Public()) || n.Alert == "" {
			t.Errorf("fingerprint %s, alert %q; want that of the first, and an alert", n.Fingerprint, n.Alert)
		}
		s.act("approve", mac1)
		clone.want(api.Pending)
		m.want(api.Approved)
		clone.want(api.Pending)
		s.members[addr1] = true
		time.Sleep(20 * time.Second)
		clone.wantRefused(fault.Refused, "alive")
	})
}

// A pending machine that is switched off and on gets its place back soon, and
// that is no reason for an alarm.
func TestPendingReboot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.boot(mac1, addr1).want(api.Pending)
		time.Sleep(10 * time.Second)
		m := s.boot(mac1, addr1)
		m.want(api.Pending)
		time.Sleep(rivalWindow)
		m.want(api.Pending)
		n := s.record(mac1)
		if n.Fingerprint != identity.Fingerprint(m.key.Public()) || n.Alert != "" {
			t.Errorf("fingerprint %s, alert %q; want the new one and no alert", n.Fingerprint, n.Alert)
		}
	})
}

func TestDenyRevokeRemove(t *testing.T) {
	s := newSite(t)
	m1, m2 := s.boot(mac1, addr1), s.boot(mac2, addr2)
	m1.want(api.Pending)
	if r := s.act("deny", mac1); r.State != api.Denied {
		t.Errorf("a denied pending machine is %s", r.State)
	}
	if r := m1.want(api.Denied); r.Reason == "" || r.Certificate != nil {
		t.Errorf("denied with %+v; want a reason and no certificate", r)
	}
	if why, err := s.Denied(mac1); why == "" || err != nil {
		t.Errorf("Denied = %q, %v; want a reason: its script boots the local disk", why, err)
	}

	m2.want(api.Pending)
	s.act("approve", mac2)
	m2.want(api.Approved)
	key := s.keys()
	if r := s.act("deny", mac2); r.State != api.Revoked {
		t.Errorf("a denied member is %s; want revoked", r.State)
	}
	if _, err := s.Cluster(t.Context(), m2.cert, 0, 0); fault.KindOf(err) != fault.Refused {
		t.Errorf("poll of a revoked node: %v; want refused", err)
	}
	if _, err := s.Renew(m2.cert, &api.RenewRequest{CSR: m2.req.CSR}); fault.KindOf(err) != fault.Refused {
		t.Errorf("renewal of a revoked node: %v; want refused", err)
	}
	m2.want(api.Denied)
	s.boot(mac2, addr2).want(api.Denied) // a new key is no way around
	if cmp.Equal(key, s.keys()) {
		t.Error("the gossip key that the revoked node knows is still the only one")
	}

	// Approved again it has its old number.
	s.act("approve", mac2)
	if r := m2.want(api.Approved); r.Node != 1 {
		t.Errorf("approved again as node %d; want 1", r.Node)
	}
	s.act("rm", mac2)
	if s.record(mac2) != nil {
		t.Error("a removed machine is still there")
	}
	if _, err := s.Cluster(t.Context(), m2.cert, 0, 0); fault.KindOf(err) != fault.Refused {
		t.Errorf("poll of a removed node: %v; want refused", err)
	}
	m2.wantRefused(fault.Refused, "boot")
	// Its number is given to nobody while its certificate could be shown.
	s.act("approve", mac1)
	if n := s.record(mac1); n.Node != 2 {
		t.Errorf("the next machine got number %d; want 2", n.Node)
	}
}

func (s *site) keys() (keys [][]byte) {
	s.Store.View(func(tx *registry.Tx) error { keys = tx.View().GossipKeys; return nil })
	return keys
}

func TestLocalTicket(t *testing.T) {
	s := newSite(t)
	written := 0
	var ticket string
	issue := func() {
		written++
		var err error
		if ticket, err = s.IssueTicket(mac1, netip.MustParseAddr("10.77.0.1")); err != nil {
			t.Fatal(err)
		}
	}
	s.TicketUsed = issue
	issue()
	head := s.machine(mac1, ticket, netip.MustParseAddr("10.77.0.1"))
	r := head.want(api.Approved)
	if r.Node != 1 || r.Name != "head" || s.record(mac1).Role != RoleHead {
		t.Errorf("the head's machine is node %d %q; want 1 head", r.Node, r.Name)
	}
	if written != 2 {
		t.Errorf("ticket written %d times; want anew after its use", written)
	}
	head.want(api.Approved) // repeats its request: the same ticket
	if written != 2 {
		t.Errorf("a repeated request used another ticket")
	}
	// Restarted with a new key and the new ticket.
	again := s.machine(mac1, ticket, netip.MustParseAddr("10.77.0.1"))
	if r := again.want(api.Approved); r.Node != 1 || written != 3 {
		t.Errorf("node %d, %d tickets; want 1 and 3", r.Node, written)
	}
	for _, action := range []string{"deny", "rm"} {
		if _, err := s.Act(api.NodeAct{Action: action, Node: "head"}); fault.KindOf(err) != fault.Refused {
			t.Errorf("%s head = %v; want refused", action, err)
		}
	}
	// A new network card: the same machine.
	if ticket, err := s.IssueTicket(mac2, netip.MustParseAddr("10.77.0.1")); err != nil {
		t.Fatal(err)
	} else if r := s.machine(mac2, ticket, netip.MustParseAddr("10.77.0.1")).want(api.Approved); r.Node != 1 || s.record(mac1) != nil {
		t.Errorf("with a new card the head is node %d; want 1, and no record of the old card", r.Node)
	}
	// A ticket is for this machine only.
	ticket, _ = s.IssueTicket(mac2, netip.MustParseAddr("10.77.0.1"))
	s.machine(mac2, ticket, netip.MustParseAddr(addr3)).wantRefused(fault.Refused, "another address")
}

func TestRenew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t)
		s.Listed = map[string]bool{mac1: true}
		m := s.boot(mac1, addr1)
		m.want(api.Approved)
		time.Sleep(12 * time.Hour)
		r, err := s.Renew(m.cert, &api.RenewRequest{CSR: m.req.CSR})
		if err != nil {
			t.Fatal(err)
		}
		fresh, err := x509.ParseCertificate(r.Certificate)
		if err != nil {
			t.Fatal(err)
		}
		if !fresh.NotAfter.After(m.cert.NotAfter) {
			t.Error("the renewed certificate is not good for longer")
		}
		for _, c := range []*x509.Certificate{m.cert, fresh} {
			if _, err := s.Cluster(t.Context(), c, 0, 0); err != nil {
				t.Errorf("a node that renewed is not served: %v", err)
			}
		}
		if _, err := s.Renew(nil, &api.RenewRequest{CSR: m.req.CSR}); fault.KindOf(err) != fault.Refused {
			t.Errorf("renewal without a certificate: %v; want refused", err)
		}
		// Revoking makes all of them void.
		s.act("deny", mac1)
		for _, c := range []*x509.Certificate{m.cert, fresh} {
			if _, err := s.Cluster(t.Context(), c, 0, 0); fault.KindOf(err) != fault.Refused {
				t.Errorf("poll after revocation: %v; want refused", err)
			}
		}
	})
}

// poller polls as an agent does and remembers the phases that it saw.
type pollingAgent struct {
	m     *machine
	seen  [][][]byte
	have  uint64
	stuck bool // has a view, but never comes back for the next
}

// run polls until ctx ends. The head may be replaced while it runs.
func (p *pollingAgent) run(ctx context.Context, svc func() *Service) {
	for ctx.Err() == nil {
		v, err := svc().Cluster(ctx, p.m.cert, p.have, maxWait)
		if err != nil {
			if ctx.Err() == nil && fault.KindOf(err) == fault.Refused {
				return
			}
			time.Sleep(100 * time.Millisecond)
			continue
		}
		if v.Generation != p.have {
			p.have = v.Generation
			if len(p.seen) == 0 || !cmp.Equal(p.seen[len(p.seen)-1], v.GossipKeys) {
				p.seen = append(p.seen, v.GossipKeys)
			}
		}
		time.Sleep(10 * time.Millisecond)
		if p.stuck {
			<-ctx.Done()
		}
	}
}

// The gossip key changes without a node that lives ever hearing from another
// in a key that it does not have: no phase begins before all have the last.
func TestKeyRotation(t *testing.T) {
	for _, tt := range []struct {
		name    string
		stuck   bool // one member hangs
		restart bool // the head is restarted in the middle
		atMost  time.Duration
	}{
		{name: "all answer", atMost: time.Second},
		{name: "one member hangs", stuck: true, atMost: 11 * time.Second},
		{name: "the head is restarted in the middle", restart: true, atMost: 2 * time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSite(t)
				s.Listed = map[string]bool{mac1: true, mac2: true, mac3: true}
				var ps []*pollingAgent
				for i, mac := range []string{mac1, mac2, mac3} {
					m := s.boot(mac, []string{addr1, addr2, addr3}[i])
					m.want(api.Approved)
					ps = append(ps, &pollingAgent{m: m, stuck: i == 1 && tt.stuck})
				}
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				defer wg.Wait()
				defer cancel()
				headCtx, stopHead := context.WithCancel(ctx)
				var now atomic.Pointer[Service]
				now.Store(s.Service)
				svc := s.Service
				stopped := make(chan struct{})
				wg.Go(func() { svc.Run(headCtx); close(stopped) })
				for _, p := range ps {
					wg.Go(func() { p.run(ctx, now.Load) })
				}
				time.Sleep(time.Second)
				old := s.keys()
				s.act("deny", mac3)
				start := time.Now()
				if tt.restart {
					stopHead()
					<-stopped
					if n := len(s.keys()); n != 2 {
						t.Fatalf("stopped in a phase with %d keys; want 2", n)
					}
					s.Store.Close()
					s.Listed = nil
					s.start()
					svc := s.Service
					now.Store(svc)
					wg.Go(func() { svc.Run(ctx) })
				}
				for len(s.keys()) != 1 || cmp.Equal(s.keys(), old) {
					time.Sleep(20 * time.Millisecond)
					if time.Since(start) > time.Minute {
						t.Fatalf("the rotation does not end: %x", s.keys())
					}
				}
				if d := time.Since(start); d > tt.atMost {
					t.Errorf("took %v; want at most %v", d, tt.atMost)
				}
				time.Sleep(time.Second)
				cancel()
				stopHead()
				wg.Wait()
				fresh := s.keys()[0]
				want := [][][]byte{{old[0]}, {old[0], fresh}, {fresh, old[0]}, {fresh}}
				if d := cmp.Diff(want, ps[0].seen); d != "" {
					t.Errorf("phases seen by a member (-want +got):\n%s", d)
				}
				if n := len(ps[2].seen); n != 1 {
					t.Errorf("the revoked node heard of %d key sets; want only the first", n)
				}
			})
		})
	}
}

// Two nodes are revoked one after the other: the second has heard of the key
// that was to come, so another one must.
func TestKeyRotationTwice(t *testing.T) {
	s := newSite(t)
	s.Listed = map[string]bool{mac1: true, mac2: true}
	m1, m2 := s.boot(mac1, addr1), s.boot(mac2, addr2)
	m1.want(api.Approved)
	m2.want(api.Approved)
	s.act("deny", mac1)
	announced := s.keys()[1]
	s.act("deny", mac2)
	for len(s.keys()) > 1 {
		if err := s.Store.Update(func(tx *registry.Tx) error { tx.AdvanceRotation(); return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if cmp.Equal(s.keys()[0], announced) {
		t.Error("the second revoked node knows the key")
	}
}

func TestRename(t *testing.T) {
	s := newSite(t)
	s.Listed = map[string]bool{mac1: true, mac2: true}
	s.Names = map[string]string{mac2: "render"}
	s.boot(mac1, addr1).want(api.Approved)
	if r := s.boot(mac2, addr2).want(api.Approved); r.Name != "render" {
		t.Errorf("name %q; want that of cluster.yaml", r.Name)
	}
	for _, bad := range []string{"", "Node", "a_b", "-a", "a-", "7", "render", "node2", "head", strings.Repeat("a", 64), "a.b", "ä"} {
		if _, err := s.Act(api.NodeAct{Action: "rename", Node: "1", Name: bad}); fault.KindOf(err) != fault.Usage {
			t.Errorf("rename to %q = %v; want a usage fault", bad, err)
		}
	}
	for _, good := range []string{"attic-pc", "node1", "a"} {
		if _, err := s.Act(api.NodeAct{Action: "rename", Node: "1", Name: good}); err != nil {
			t.Errorf("rename to %q: %v", good, err)
		}
	}
}

func TestFind(t *testing.T) {
	recs := []api.NodeRecord{
		{Node: 1, Name: "head", MAC: mac1, Fingerprint: "aaaa-bbbb-cccc-0001"},
		{Node: 2, Name: "beef", MAC: mac2, Fingerprint: "aaaa-bbbb-cccc-0002"},
		{MAC: mac3, Fingerprint: "beef-0000-0000-0000"},
	}
	for _, tt := range []struct {
		what string
		want int
		kind fault.Kind
	}{
		{"1", 0, 0}, {"head", 0, 0}, {"HEAD", 0, 0}, {mac2, 1, 0}, {strings.ToUpper(mac2), 1, 0},
		{"beef", 1, 0}, {"beef-0", 2, 0}, {"BEEF00", 2, 0}, {"aaaabbbbcccc0002", 1, 0},
		{"aaaa", 0, fault.Usage}, {"aaa", 0, fault.NotFound}, {"0", 0, fault.NotFound}, {"", 0, fault.NotFound}, {"3", 0, fault.NotFound},
	} {
		got, err := Find(recs, tt.what)
		if tt.kind != 0 {
			if fault.KindOf(err) != tt.kind {
				t.Errorf("Find(%q) = %d, %v; want kind %d", tt.what, got, err, tt.kind)
			}
		} else if err != nil || got != tt.want {
			t.Errorf("Find(%q) = %d, %v; want %d", tt.what, got, err, tt.want)
		}
	}
}

// Text of machines is shown on operators' terminals.
func TestInventoryIsClean(t *testing.T) {
	s := newSite(t)
	m := s.boot(mac1, addr1)
	m.req.Image = "\x1b[2Jevil"
	m.req.Inventory.CPUModel = strings.Repeat("x", 10_000) + "\x07"
	m.req.Inventory.CPUs = -5
	for range 1000 {
		m.req.Inventory.NICs = append(m.req.Inventory.NICs, api.NIC{Name: "a\nb"})
	}
	m.want(api.Pending)
	n := s.record(mac1)
	if strings.ContainsAny(n.Image, "\x1b") || len(n.Inventory.CPUModel) > maxText || len(n.Inventory.NICs) > maxNICs ||
		n.Inventory.NICs[0].Name != "ab" || n.Inventory.CPUs != 0 {
		t.Errorf("stored %q, %d NICs, %d CPUs", n.Image, len(n.Inventory.NICs), n.Inventory.CPUs)
	}
}

func TestNoncesAreBounded(t *testing.T) {
	s := newSite(t)
	first := s.boot(mac1, addr1)
	for range noncesPerMAC {
		s.boot(mac1, addr1)
	}
	first.wantRefused(fault.Refused, "unknown boot nonce")
	count := 0
	s.Store.View(func(tx *registry.Tx) error { count = len(tx.Nonces()); return nil })
	if count != noncesPerMAC {
		t.Errorf("%d nonces are kept for one machine; want %d", count, noncesPerMAC)
	}
}

// Bodies come from anyone on the boot network.
func FuzzEnrolBody(f *testing.F) {
	f.Add([]byte(`{"protocol":1,"csr":"AAAA","nonce":"x","mac":"52:54:00:00:00:01","wait_ms":0}`))
	f.Add([]byte(`{"protocol":1,"mac":"52:54:00:00:00:01","inventory":{"nics":[{}]},"wait_ms":-1}`))
	f.Add([]byte(`[]`))
	store, err := registry.Open(f.TempDir(), registry.Options{})
	if err != nil {
		f.Fatal(err)
	}
	defer store.Close()
	now := time.Now()
	s := &Service{Store: store, CheckSource: true, Now: func() time.Time { now = now.Add(time.Second); return now }}
	h := s.Handler()
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequest("POST", api.PathEnrol, bytes.NewReader(body))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		var p api.Problem
		if w.Code == 200 || json.Unmarshal(w.Body.Bytes(), &p) != nil || p.Error == "" {
			t.Errorf("%q: %d %s; want a problem", body, w.Code, w.Body)
		}
	})
}

func TestHTTPBounds(t *testing.T) {
	s := newSite(t)
	h := s.Handler()
	post := func(path, body string) (int, string) {
		r := httptest.NewRequest("POST", path, strings.NewReader(body))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code, w.Body.String()
	}
	if code, text := post(api.PathEnrol, `{"mac":"`+strings.Repeat("x", maxBody)+`"}`); code != 400 || !strings.Contains(text, "too large") {
		t.Errorf("a large body: %d %.100s", code, text)
	}
	if code, _ := post("/v1/other", "{}"); code != 404 {
		t.Errorf("an unknown call: %d", code)
	}
	if code, _ := post(api.PathRenew, "{}"); code != 401 && code != 403 {
		t.Errorf("renewal by a stranger: %d", code)
	}
	// One sender that asks in a loop is slowed down.
	last := 0
	for range 100 {
		last, _ = post(api.PathEnrol, "{}")
	}
	if last != 503 {
		t.Errorf("the 100th request in a row: %d; want 503", last)
	}
}

func TestFullDisk(t *testing.T) {
	s := newSite(t)
	m := s.boot(mac1, addr1)
	s.Store.Close()
	_, err := m.enrol()
	if fault.KindOf(err) != fault.Environment || errors.Is(err, context.Canceled) {
		t.Errorf("enrol without a registry: %v; want an environment fault, and no answer to the machine", err)
	}
}

// Members hear by the cluster view that they are to be empty, and it holds until
// it is taken back: over a restart of the head too.
func TestDrain(t *testing.T) {
	s := newSite(t)
	m := s.boot(mac1, addr1)
	m.want(api.Pending)
	if _, err := s.Act(api.NodeAct{Action: "drain", Node: mac1}); fault.KindOf(err) != fault.Refused {
		t.Errorf("a pending machine is drained: %v", err)
	}
	s.act("approve", mac1)
	reply := m.want(api.Approved)
	drained := func(v *api.ClusterView) bool {
		for _, p := range v.Peers {
			if p.MAC == mac1 {
				return p.Drain
			}
		}
		return false
	}
	if drained(reply.Cluster) {
		t.Error("a new member is drained")
	}
	before := reply.Cluster.Generation
	s.act("drain", mac1)
	s.Store.Close()
	s.start()
	reply = m.want(api.Approved)
	if !drained(reply.Cluster) || reply.Cluster.Generation <= before {
		t.Errorf("after drain: %+v; want it drained in a later generation than %d", reply.Cluster, before)
	}
	s.act("undrain", mac1)
	if reply = m.want(api.Approved); drained(reply.Cluster) {
		t.Error("still drained")
	}
}
