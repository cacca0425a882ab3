package native

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/vishvananda/netns"

	"mosimg/internal/api"
)

// ipxe makes a DHCP request that of iPXE on a BIOS machine.
func ipxe(d *dhcpv4.DHCPv4) {
	d.UpdateOption(dhcpv4.OptUserClass("iPXE"))
	d.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClassIdentifier, []byte("PXEClient:Arch:00000:UNDI:002001")))
	d.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientSystemArchitectureType, []byte{0, 0}))
}

func TestLifeOfACluster(t *testing.T) {
	w := newWorld(t)
	h := w.head("head", 1, "10.77.0.1/24")
	h.joinSelf()
	a, b := w.machine("a", 2), w.machine("b", 3)

	// The head's own machine is node 1, by the ticket on its disk.
	if r := h.record(h.mac, "a member", alive); r.Node != 1 || r.Role != "head" {
		t.Fatalf("the head's record is %+v; want node 1, role head", r)
	}

	// A machine that nobody knows waits, and learns nothing.
	a.boot(true)
	pending := h.record(a.mac, "pending", func(r api.NodeRecord) bool { return r.State == api.Pending })
	if pending.Fingerprint == "" || pending.Inventory == nil || pending.Inventory.MemoryBytes == 0 {
		t.Errorf("pending record %+v; want a fingerprint and an inventory", pending)
	}
	if table, err := a.members(); err == nil && len(table.Members) > 0 {
		t.Errorf("a pending machine sees the members %v", table.Members)
	}
	h.sees(1)

	// Approved by the fingerprint on its screen, it is in within seconds.
	h.mustNode("approve", pending.Fingerprint[:9])
	start := time.Now()
	recA := h.record(a.mac, "a member", alive)
	t.Logf("approved to member: %v", time.Since(start).Round(100*time.Millisecond))
	h.sees(1, 2)
	a.sees(1, 2)

	// One machine is let in without a question, a second one is not.
	h.mustNode("approve", "--next", "1", "--for", "1m")
	b.boot(true)
	recB := h.record(b.mac, "a member", alive)
	c := w.machine("c", 4)
	c.boot(true)
	h.record(c.mac, "pending", func(r api.NodeRecord) bool { return r.State == api.Pending })
	b.sees(1, 2, 3)

	// The agent's restart needs nobody: same node, same key.
	a.agent.kill()
	a.startAgent()
	a.sees(1, 2, 3)
	if r := h.record(a.mac, "a member", alive); r.Node != recA.Node || r.Fingerprint != recA.Fingerprint {
		t.Errorf("after its agent's restart a is node %d with key %s; want %d, %s", r.Node, r.Fingerprint, recA.Node, recA.Fingerprint)
	}

	// A machine that is switched off is dead within seconds for all, and
	// comes back with its number and address though its key is new.
	start = time.Now()
	b.agent.kill()
	h.record(b.mac, "dead", func(r api.NodeRecord) bool { return r.Liveness == api.Dead })
	t.Logf("killed to dead: %v", time.Since(start).Round(100*time.Millisecond))
	a.sees(1, 2)
	b.boot(true)
	r := h.record(b.mac, "a member again", alive)
	if r.Node != recB.Node || r.Address != recB.Address || r.Fingerprint == recB.Fingerprint {
		t.Errorf("after a reboot b is node %d at %s with key %s; want node %d at %s with a new key (old: %s)",
			r.Node, r.Address, r.Fingerprint, recB.Node, recB.Address, recB.Fingerprint)
	}
	a.sees(1, 2, 3)

	// A head that dies takes nothing with it.
	pin := a.args.CA
	h.daemon.kill()
	time.Sleep(time.Second)
	a.sees(1, 2, 3)
	h.startHead()
	for _, m := range []*machine{h.machine, a, b} {
		h.record(m.mac, "still a member", alive)
	}
	h.record(c.mac, "still pending", func(r api.NodeRecord) bool { return r.State == api.Pending })
	c.agent.kill()
	c.boot(true)
	if c.args.CA != pin {
		t.Errorf("after its restart the head's CA is %s; it was %s", c.args.CA, pin)
	}
	h.mustNode("approve", c.mac)
	if r := h.record(c.mac, "a member", alive); r.Node != 4 {
		t.Errorf("c is node %d; want 4", r.Node)
	}
	a.sees(1, 2, 3, 4)

	// Denied: out at once for everyone, and its old key opens nothing.
	key := gossipKeys(t, b)[0]
	h.mustNode("deny", fmt.Sprint(recB.Node))
	h.record(b.mac, "revoked", func(r api.NodeRecord) bool { return r.State == api.Revoked || r.State == api.Denied })
	a.sees(1, 2, 4)
	w.eventually(20*time.Second, "the members use another gossip key", func() error {
		if keys := gossipKeys(t, a); len(keys) != 1 || string(keys[0]) == string(key) {
			return fmt.Errorf("a has %d keys", len(keys))
		}
		return nil
	})
	b.agent.kill()
	if err := gossip(t, b, key, a); err == nil {
		t.Error("a revoked node joined the gossip with its old key")
	}
	// Booting again does not help it.
	if _, err := b.firmware(); err == nil {
		t.Error("a denied machine was given a kernel")
	}
	a.sees(1, 2, 4)
	if _, err := h.node("approve", "nosuchnode"); err == nil {
		t.Error("approving a node that does not exist succeeded")
	}

	// A member that says goodbye is gone, not dead.
	c.agent.terminate()
	h.record(c.mac, "left", func(r api.NodeRecord) bool { return r.Liveness == api.Left || r.Liveness == api.Dead })
}

// A machine that was booted by one head tells nothing to another one that has
// its address: its certificate authority is not the one of the boot.
func TestForeignHeadIsRefused(t *testing.T) {
	w := newWorld(t)
	ours := w.head("ours", 1, "10.77.0.1/24")
	m := w.machine("a", 2)
	m.boot(true)
	ours.record(m.mac, "pending", func(r api.NodeRecord) bool { return r.State == api.Pending })
	m.agent.kill()
	ours.cable("down")
	other := w.head("other", 3, "10.77.0.1/24")
	w.must("ip", "-n", w.prefix+m.name, "neigh", "flush", "all")
	m.startAgent()
	w.eventually(15*time.Second, "the agent says whom it does not trust", func() error {
		if !strings.Contains(m.agent.log.String(), "certificate authority is not the one") {
			return fmt.Errorf("its log: %s", m.agent.log.tail())
		}
		return nil
	})
	if records, err := other.nodes(); err != nil || len(records) != 0 {
		t.Errorf("the other head's records: %v, %v; want none", records, err)
	}
}

// gossipKeys are those that a member has stored.
func gossipKeys(t *testing.T, m *machine) [][]byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(m.dir, "agent", "member.json"))
	if err != nil {
		t.Fatal(err)
	}
	var saved struct{ View api.ClusterView }
	if err := json.Unmarshal(b, &saved); err != nil || len(saved.View.GossipKeys) == 0 {
		t.Fatalf("gossip keys of %s: %v in %s", m.name, err, b)
	}
	return saved.View.GossipKeys
}

// gossip tries to join the members from a machine's network with a key.
func gossip(t *testing.T, from *machine, key []byte, to *machine) error {
	t.Helper()
	conf := memberlist.DefaultLANConfig()
	conf.Name, conf.SecretKey = "node3", key
	conf.Logger = log.New(io.Discard, "", 0)
	conf.BindPort, conf.AdvertisePort = api.GossipPort, api.GossipPort
	var list *memberlist.Memberlist
	if err := inNamespace(from.w.prefix+from.name, func() (err error) {
		list, err = memberlist.Create(conf)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer list.Shutdown()
	table, err := to.members()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range table.Members {
		if m.Self {
			return inNamespace(from.w.prefix+from.name, func() error {
				n, err := list.Join([]string{fmt.Sprintf("%s:%d", m.Address, api.GossipPort)})
				if err == nil && n > 0 {
					return nil
				}
				return fmt.Errorf("joined %d: %w", n, err)
			})
		}
	}
	return fmt.Errorf("%s does not see itself", to.name)
}

// inNamespace runs f on a thread inside a network namespace. Sockets that f
// makes stay in it.
func inNamespace(name string, f func() error) error {
	errc := make(chan error)
	go func() {
		// The thread is not unlocked: it dies with this goroutine and is
		// never used outside the namespace.
		runtime.LockOSThread()
		ns, err := netns.GetFromName(name)
		if err != nil {
			errc <- err
			return
		}
		defer ns.Close()
		if err := netns.Set(ns); err != nil {
			errc <- err
			return
		}
		errc <- f()
	}()
	return <-errc
}
