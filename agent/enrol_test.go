package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
)

func TestBackoffIsBounded(t *testing.T) {
	last := time.Duration(0)
	for n := range 100 {
		low, high := backoff(n, 0), backoff(n, 0.999)
		if low < firstRetry*3/4 || high > lastRetry*5/4 || low > high || low < last {
			t.Errorf("backoff(%d) = %v to %v", n, low, high)
		}
		last = low
	}
}

func TestJudge(t *testing.T) {
	for _, tc := range []struct {
		reply api.EnrolReply
		want  verdict
	}{
		{api.EnrolReply{State: api.Approved}, verdict{state: api.StateMember, in: true}},
		{api.EnrolReply{State: api.Pending, Reason: "r", RetryMillis: 2000}, verdict{state: api.StatePending, reason: "r", again: 2 * time.Second}},
		{api.EnrolReply{State: api.Pending}, verdict{state: api.StatePending, again: 200 * time.Millisecond}},
		{api.EnrolReply{State: api.Pending, RetryMillis: 1 << 30}, verdict{state: api.StatePending, again: slowRetry}},
		{api.EnrolReply{State: api.Pending, RetryMillis: -5}, verdict{state: api.StatePending, again: 200 * time.Millisecond}},
		{api.EnrolReply{State: api.Denied, Reason: "no"}, verdict{state: api.StateDenied, reason: "no", again: slowRetry}},
		{api.EnrolReply{State: api.Revoked}, verdict{state: api.StateDenied, reason: "the head says revoked", again: slowRetry}},
		{api.EnrolReply{State: "new word"}, verdict{state: api.StateDenied, reason: "the head says new word", again: slowRetry}},
	} {
		if got := judge(&tc.reply); got != tc.want {
			t.Errorf("judge(%+v) = %+v; want %+v", tc.reply, got, tc.want)
		}
	}
}

func TestJudgeError(t *testing.T) {
	for _, tc := range []struct {
		err   error
		state api.AgentState
		slow  bool
	}{
		{fault.New(fault.Unavailable, "ask", "u", "connection refused", ""), api.StateNoHead, false},
		{fault.New(fault.Unavailable, "ask", "u", fmt.Errorf("x: %w", identity.ErrPin), ""), api.StateNoHead, true},
		{fault.New(fault.Refused, "enrol", "m", "unknown boot nonce", ""), api.StateDenied, true},
		{fault.New(fault.Untrusted, "enrol", "m", "bad CSR", ""), api.StateDenied, true},
		{errors.New("x"), api.StateNoHead, false},
	} {
		got := judgeError(tc.err, 0, 0)
		if got.state != tc.state || (got.again == slowRetry) != tc.slow || got.reason == "" || got.in {
			t.Errorf("judgeError(%v) = %+v; want %s, slow %v", tc.err, got, tc.state, tc.slow)
		}
	}
}

func TestCheckHead(t *testing.T) {
	pin := "sha256:" + strings.Repeat("0a", 32)
	for _, tc := range []struct {
		head, ca string
		ok       bool
	}{
		{"https://10.77.0.1:4660", pin, true},
		{"https://10.77.0.1:4660/", pin, true},
		{"https://head:4660", pin, true},
		{"", pin, false},
		{"https://10.77.0.1:4660", "", false},
		{"http://10.77.0.1:4660", pin, false},
		{"https://10.77.0.1", pin, false},
		{"https://u:p@10.77.0.1:4660", pin, false},
		{"https://10.77.0.1:4660/x", pin, false},
		{"https://10.77.0.1:4660?x", pin, false},
		{"://", pin, false},
		{"https://10.77.0.1:4660", "sha256:00", false},
		{"https://10.77.0.1:4660", "md5:" + strings.Repeat("0a", 32), false},
		{"https://10.77.0.1:4660", "sha256:" + strings.Repeat("zz", 32), false},
	} {
		if err := checkHead(tc.head, tc.ca); (err == nil) != tc.ok {
			t.Errorf("checkHead(%q, %q) = %v; want ok %v", tc.head, tc.ca, err, tc.ok)
		}
	}
}

// Whoever can write the ticket decides which cluster this machine joins.
func TestTicketMustBeOursAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "join.json")
	if _, err := readTicket(path); err == nil || !strings.Contains(err.Error(), "waiting") {
		t.Errorf("no ticket yet: %v", err)
	}
	data, _ := json.Marshal(api.LocalTicket{Head: "h", CA: "c"})
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := readTicket(path); err != nil || got.Head != "h" {
		t.Errorf("readTicket = %+v, %v", got, err)
	}
	for _, mode := range []os.FileMode{0o622, 0o644, 0o660} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := readTicket(path); fault.KindOf(err) != fault.Refused {
			t.Errorf("mode %o: %v; want it refused", mode, err)
		}
	}
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	os.Chmod(path, 0o600)
	if _, err := readTicket(link); err == nil {
		t.Error("a symbolic link was followed")
	}
}

// world is a CA and what it gave to one node.
type world struct {
	ca   *identity.CA
	key  identity.Key
	cert []byte
	p    place
}

func newWorld(t *testing.T, now time.Time) world {
	t.Helper()
	ca, err := identity.NewCA("t")
	if err != nil {
		t.Fatal(err)
	}
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.IssueNode(key.Public(), 3, net.IPv4(10, 77, 0, 3), now)
	if err != nil {
		t.Fatal(err)
	}
	return world{ca, key, cert.Raw, place{head: "https://h:1", ca: identity.Pin(ca.Cert), mac: "m", address: "10.77.0.3", nonce: "secret"}}
}

// A head that is not ours, or a confused one, must not get a node to run
// under a certificate that others will refuse.
func TestCredentialsAreChecked(t *testing.T) {
	now := time.Now()
	w, other := newWorld(t, now), newWorld(t, now)
	good := func() (cert, ca []byte, p place, key identity.Key, node api.NodeID, at time.Time) {
		return w.cert, w.ca.Cert.Raw, w.p, w.key, 3, now
	}
	for _, tc := range []struct {
		name string
		want string
		do   func() error
	}{
		{"good", "", func() error {
			c, ca, p, k, n, at := good()
			_, err := newCredentials(c, ca, p, k, n, "n", api.ClusterView{}, at)
			return err
		}},
		{"other CA", "authority is not the one", func() error {
			_, _, p, k, n, at := good()
			_, err := newCredentials(other.cert, other.ca.Cert.Raw, p, k, n, "n", api.ClusterView{}, at)
			return err
		}},
		{"certificate of another CA", "unknown authority", func() error {
			_, ca, p, k, n, at := good()
			_, err := newCredentials(other.cert, ca, p, k, n, "n", api.ClusterView{}, at)
			return err
		}},
		{"another key", "another key", func() error {
			c, ca, p, _, n, at := good()
			_, err := newCredentials(c, ca, p, other.key, n, "n", api.ClusterView{}, at)
			return err
		}},
		{"another number", "node 3", func() error {
			c, ca, p, k, _, at := good()
			_, err := newCredentials(c, ca, p, k, 4, "n", api.ClusterView{}, at)
			return err
		}},
		{"expired", "expired", func() error {
			c, ca, p, k, n, at := good()
			_, err := newCredentials(c, ca, p, k, n, "n", api.ClusterView{}, at.Add(48*time.Hour))
			return err
		}},
		{"not yet valid", "expired or is not yet valid", func() error {
			c, ca, p, k, n, at := good()
			_, err := newCredentials(c, ca, p, k, n, "n", api.ClusterView{}, at.Add(-48*time.Hour))
			return err
		}},
		{"rubbish", "CA's certificate", func() error {
			c, _, p, k, n, at := good()
			_, err := newCredentials(c, []byte("x"), p, k, n, "n", api.ClusterView{}, at)
			return err
		}},
	} {
		err := tc.do()
		if (tc.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v; want %q", tc.name, err, tc.want)
		}
	}
}

// What a restart finds is used only where it was given; the nonce is not kept.
func TestSavedCredentials(t *testing.T) {
	now := time.Now()
	w := newWorld(t, now)
	dir := t.TempDir()
	view := api.ClusterView{Generation: 7, GossipKeys: [][]byte{{1}}, Revoked: []string{"ab"}, Peers: []api.Peer{{Node: 3, Name: "renamed"}}}
	c, err := newCredentials(w.cert, w.ca.Cert.Raw, w.p, w.key, 3, "node3", view, now)
	if err != nil {
		t.Fatal(err)
	}
	if c.name != "renamed" || !c.revoked["ab"] || c.selfRevoked() {
		t.Errorf("credentials = %+v", c)
	}
	if err := c.save(dir); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, memberFile))
	if err != nil || strings.Contains(string(data), w.p.nonce) {
		t.Errorf("saved: %v; the nonce must not be in it", err)
	}
	back, err := loadCredentials(dir, w.p, w.key, now)
	if err != nil || back.node != 3 || back.view.Generation != 7 || back.name != "renamed" {
		t.Errorf("loadCredentials = %+v, %v", back, err)
	}
	moved, cluster := w.p, w.p
	moved.address = "10.77.0.9"
	cluster.ca = "sha256:00"
	for name, p := range map[string]place{"another address": moved, "another cluster": cluster} {
		if _, err := loadCredentials(dir, p, w.key, now); err == nil {
			t.Errorf("%s: the old membership was used", name)
		}
	}
	if _, err := loadCredentials(dir, w.p, w.key, now.Add(30*time.Hour)); err == nil {
		t.Error("an expired certificate was used")
	}
	os.WriteFile(filepath.Join(dir, memberFile), []byte("{half"), 0o600)
	if _, err := loadCredentials(dir, w.p, w.key, now); err == nil {
		t.Error("half a file was used")
	}
}

func TestRenewAtHalfLife(t *testing.T) {
	now := time.Now()
	w := newWorld(t, now)
	c, err := newCredentials(w.cert, w.ca.Cert.Raw, w.p, w.key, 3, "n", api.ClusterView{}, now)
	if err != nil {
		t.Fatal(err)
	}
	if d := c.renewAt().Sub(now) - identity.CertLifetime/2; d.Abs() > identity.Backdate {
		t.Errorf("renewal is %v off half of the life", d)
	}
}

func TestDoubt(t *testing.T) {
	s := time.Second
	for _, tc := range []struct {
		l          api.Liveness
		self       bool
		heard      bool
		age, since time.Duration
		n          int
		want       api.Liveness
	}{
		{api.Alive, false, true, s, time.Hour, 3, api.Alive},
		{api.Alive, false, true, 5 * s, time.Hour, 3, api.Suspect},
		{api.Alive, false, true, 5 * s, time.Hour, 64, api.Alive}, // news takes longer to get round
		{api.Alive, false, false, 0, time.Hour, 3, api.Suspect},
		{api.Alive, false, false, 0, s, 3, api.Alive}, // it has just joined
		{api.Alive, true, true, time.Hour, time.Hour, 3, api.Alive},
		{api.Dead, false, true, s, time.Hour, 3, api.Dead},
		{api.Left, false, false, 0, time.Hour, 3, api.Left},
	} {
		if got := doubt(tc.l, tc.self, tc.heard, tc.age, tc.since, tc.n); got != tc.want {
			t.Errorf("doubt(%+v) = %s", tc, got)
		}
	}
}
