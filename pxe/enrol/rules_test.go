package enrol

import (
	"strings"
	"testing"
	"time"

	"mosimg/internal/api"
	"mosimg/pxe/registry"
)

// Each row is a rule; its name says what would go wrong without it.
func TestJudge(t *testing.T) {
	now := time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	const mac, src = "52:54:00:00:00:01", "10.77.0.130"
	mine, other := []byte("key one"), []byte("key two")
	nonce := func(f func(*registry.Nonce)) *registry.Nonce {
		n := &registry.Nonce{Value: "n1", MAC: mac, Source: src, Expires: now.Add(time.Minute)}
		if f != nil {
			f(n)
		}
		return n
	}
	rec := func(state api.NodeState, key []byte, f func(*registry.Node)) *registry.Node {
		r := &registry.Node{NodeRecord: api.NodeRecord{MAC: mac, State: state, Node: 3}, Key: key}
		if f != nil {
			f(r)
		}
		return r
	}
	fresh := nonce(nil)
	local := nonce(func(n *registry.Nonce) { n.Local, n.Expires = true, time.Time{} })
	for _, tt := range []struct {
		name   string
		f      facts
		want   verdict // Reason and alert: a part of the text, "" for none
		reason string
		alert  string
	}{
		// The nonce.
		{"a machine that did not boot from us is refused", facts{}, verdict{act: refuse}, "unknown boot nonce", ""},
		{"a nonce read off another machine's console is refused", facts{nonce: nonce(func(n *registry.Nonce) { n.MAC = "52:54:00:00:00:99" })},
			verdict{act: refuse}, "another machine", "for MAC " + mac},
		{"a nonce sniffed from the wire and used from another address is refused", facts{nonce: nonce(func(n *registry.Nonce) { n.Source = "10.77.0.99" }), checkSource: true},
			verdict{act: refuse}, "another address", "came from " + src},
		{"the address does not matter when another DHCP server leases", facts{nonce: nonce(func(n *registry.Nonce) { n.Source = "10.77.0.99" })},
			verdict{act: wait, take: true}, "", ""},
		{"an old nonce is refused", facts{nonce: nonce(func(n *registry.Nonce) { n.Expires = now })}, verdict{act: refuse}, "expired", ""},
		{"a replayed nonce is refused and the operator told", facts{nonce: nonce(func(n *registry.Nonce) { n.Key = other }), rec: rec(api.Pending, other, nil)},
			verdict{act: refuse}, "used before", "used again with another key"},
		{"a machine may wait for its approval longer than a nonce lives", facts{nonce: nonce(func(n *registry.Nonce) { n.Key, n.Expires = mine, now.Add(-time.Hour) }), rec: rec(api.Pending, mine, func(r *registry.Node) { r.Nonce = "n1" })},
			verdict{act: wait, take: true}, "", ""},
		{"an old nonce is not good for a record that has another", facts{nonce: nonce(func(n *registry.Nonce) { n.Key, n.Expires = mine, now.Add(-time.Hour) }), rec: rec(api.Pending, mine, func(r *registry.Node) { r.Nonce = "n2" })},
			verdict{act: refuse}, "expired", ""},

		// New machines.
		{"a new machine waits", facts{nonce: fresh}, verdict{act: wait, take: true}, "", ""},
		{"a new machine in an adoption window is let in and counted", facts{nonce: fresh, window: true}, verdict{act: admit, take: true, adopt: true}, "", ""},
		{"a machine in cluster.yaml is let in and not counted", facts{nonce: fresh, listed: true, window: true}, verdict{act: admit, take: true}, "", ""},
		{"a flood of invented machines does not fill the registry", facts{nonce: fresh, full: true}, verdict{act: refuse, busy: true}, "too many machines", ""},

		// Pending machines.
		{"a pending machine that was switched off and on goes on waiting", facts{nonce: fresh, rec: rec(api.Pending, other, nil)}, verdict{act: wait, take: true}, "", ""},
		{"a newcomer does not push out the pending machine that is there", facts{nonce: fresh, rec: rec(api.Pending, other, nil), rival: true}, verdict{act: wait}, "another machine with this MAC", ""},
		{"two pending machines with one MAC are told to the operator", facts{nonce: fresh, rec: rec(api.Pending, mine, nil), contested: true}, verdict{act: wait, take: true}, "", "two machines"},
		{"a window opened later lets a pending machine in", facts{nonce: fresh, rec: rec(api.Pending, mine, nil), window: true}, verdict{act: admit, take: true, adopt: true}, "", ""},
		{"a pending machine under suspicion is not adopted", facts{nonce: fresh, rec: rec(api.Pending, mine, func(r *registry.Node) { r.Alert = "clone" }), window: true}, verdict{act: wait, take: true}, "", ""},

		// Decided machines.
		{"a denied machine is turned away, window or not", facts{nonce: fresh, rec: rec(api.Denied, other, nil), window: true, listed: true}, verdict{act: turnAway}, "denied", ""},
		{"a revoked machine is turned away with a new key too", facts{nonce: fresh, rec: rec(api.Revoked, other, nil), window: true}, verdict{act: turnAway}, "revoked", ""},
		{"a member gets a certificate again for its key", facts{nonce: fresh, rec: rec(api.Approved, mine, nil)}, verdict{act: admit, take: true}, "", ""},
		{"a machine approved before it ever enrolled is let in", facts{nonce: fresh, rec: rec(api.Approved, nil, nil)}, verdict{act: admit, take: true}, "", ""},
		{"another key for a member is not judged without a probe", facts{nonce: fresh, rec: rec(api.Approved, other, nil)}, verdict{act: ask}, "", ""},
		{"a cloned MAC does not replace a living member", facts{nonce: fresh, rec: rec(api.Approved, other, nil), probed: alive}, verdict{act: refuse}, "is alive", "while this one was alive"},
		{"a member that was switched off and on is let in, its old certificate void", facts{nonce: fresh, rec: rec(api.Approved, other, nil), probed: dead}, verdict{act: admit, take: true, reboot: true}, "", ""},
		{"a clone does not slip in while a new member starts its API", facts{nonce: fresh, rec: rec(api.Approved, other, nil), probed: dead, rival: true}, verdict{act: wait}, "another machine", ""},

		// The head's own machine.
		{"root on the head's machine is let in at once", facts{nonce: local}, verdict{act: admit, take: true}, "", ""},
		{"the head's agent may come with a new key", facts{nonce: local, rec: rec(api.Approved, other, nil)}, verdict{act: admit, take: true, reboot: true}, "", ""},
		{"a used ticket is not good for another key", facts{nonce: nonce(func(n *registry.Nonce) { n.Local, n.Key = true, other })}, verdict{act: refuse}, "used before", "used again"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := tt.f
			f.now, f.mac, f.key, f.source = now, mac, mine, src
			got := judge(f)
			if !strings.Contains(got.reason, tt.reason) || (tt.reason == "") != (got.reason == "") {
				t.Errorf("reason = %q; want %q", got.reason, tt.reason)
			}
			if !strings.Contains(got.alert, tt.alert) || (tt.alert == "") != (got.alert == "") {
				t.Errorf("alert = %q; want %q", got.alert, tt.alert)
			}
			got.reason, got.alert = "", ""
			if got != tt.want {
				t.Errorf("judge = %+v; want %+v", got, tt.want)
			}
		})
	}
}
