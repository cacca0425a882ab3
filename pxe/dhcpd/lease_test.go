package dhcpd

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
)

// An address that somebody set by hand is not given to a second machine.
func TestOccupiedAddressIsSkipped(t *testing.T) {
	w := newWire(t, nil)
	squatter := netip.MustParseAddr("10.77.0.100")
	asked := map[netip.Addr]int{}
	w.InUse = func(_ context.Context, _ string, a netip.Addr) string {
		asked[a]++
		if a == squatter {
			return "00:11:22:33:44:55"
		}
		return ""
	}
	w.lease(1, "10.77.0.101")
	// Neither a repeated DISCOVER nor one by iPXE costs another look.
	w.lease(1, "10.77.0.101")
	w.want(msg(2, dhcpv4.MessageTypeDiscover), "OFFER 10.77.0.102 -> 255.255.255.255:68")
	w.want(msg(2, dhcpv4.MessageTypeDiscover), "OFFER 10.77.0.102 -> 255.255.255.255:68")
	w.lease(9, "10.77.0.9") // a reservation is the operator's word
	for a, n := range asked {
		if n != 1 {
			t.Errorf("%v was looked for %d times; want once", a, n)
		}
	}
	if len(asked) != 3 {
		t.Errorf("looked for %v; want the 3 dynamic addresses", asked)
	}
	// Its own lease ran out: somebody may have moved in.
	w.now = t0.Add(2 * time.Hour)
	w.want(msg(1, dhcpv4.MessageTypeDiscover), "OFFER 10.77.0.101 -> 255.255.255.255:68")
	if asked[netip.MustParseAddr("10.77.0.101")] != 2 {
		t.Error("an expired lease was offered without a look")
	}
}

// A thousand machines that ask at once wait for the look at the same time.
func TestLookDoesNotStallAStorm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWire(t, func(n *Network) {
			n.Subnet, n.Last = netip.MustParsePrefix("10.77.0.0/16"), netip.MustParseAddr("10.77.9.0")
		})
		w.InUse = func(context.Context, string, netip.Addr) string { time.Sleep(arpBudget); return "" }
		start := time.Now()
		var mu sync.Mutex
		got := map[string]bool{}
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() {
				m := msg(0, dhcpv4.MessageTypeDiscover)
				m.ClientHWAddr[3], m.ClientHWAddr[4] = byte(i>>8), byte(i)
				reply, _ := w.Handle(t0, m)
				mu.Lock()
				defer mu.Unlock()
				if reply != nil {
					got[reply.YourIPAddr.String()] = true
				}
			})
		}
		wg.Wait()
		if d := time.Since(start); len(got) != 1000 || d != arpBudget {
			t.Errorf("%d addresses after %v; want 1000 after %v", len(got), d, arpBudget)
		}
	})
}

// A machine behind a proxy ARP router declines all it gets. The others still
// find an address.
func TestDecliningForEver(t *testing.T) {
	w := newWire(t, func(n *Network) { n.Last = netip.MustParseAddr("10.77.0.109") })
	for range 50 {
		offer, _ := w.Handle(w.now, msg(1, dhcpv4.MessageTypeDiscover))
		if offer == nil {
			t.Fatal("the pool is used up")
		}
		a := offer.YourIPAddr.String()
		w.lease(1, a)
		w.want(msg(1, dhcpv4.MessageTypeDecline, wish(a), serverID("10.77.0.1")), "")
		if l := w.saved[mac(1)]; l.live(w.now) {
			t.Fatalf("a declined lease of %s stays stored until %v", a, l.Expires)
		}
		w.now = w.now.Add(time.Second)
	}
	if c := w.Table.Counts(w.now); c.Quarantined != declines {
		t.Errorf("counts %v; want %d in quarantine", c, declines)
	}
}

// Guests hold an address for minutes, members for as long as configured.
func TestStrangersGetShortLeases(t *testing.T) {
	w := newWire(t, nil)
	strangers := map[string]bool{mac(1): true, mac(9): true}
	w.Stranger = func(mac string) bool { return strangers[mac] }
	life := func(i int, typ dhcpv4.MessageType, mods ...dhcpv4.Modifier) time.Duration {
		t.Helper()
		reply, _ := w.Handle(w.now, msg(i, typ, mods...))
		if reply == nil {
			t.Fatalf("no reply to %v of %d", typ, i)
		}
		return reply.IPAddressLeaseTime(0)
	}
	for _, tt := range []struct {
		i    int
		want time.Duration
	}{{1, StrangerLeaseTime}, {2, DefaultLeaseTime}, {9, DefaultLeaseTime}} {
		if got := life(tt.i, dhcpv4.MessageTypeDiscover); got != tt.want {
			t.Errorf("machine %d is offered %v; want %v", tt.i, got, tt.want)
		}
	}
	if got := life(1, dhcpv4.MessageTypeRequest, wish("10.77.0.100"), serverID("10.77.0.1")); got != StrangerLeaseTime {
		t.Errorf("leased for %v", got)
	}
	if l := w.saved[mac(1)]; !l.Expires.Equal(t0.Add(StrangerLeaseTime)) {
		t.Errorf("stored until %v", l.Expires)
	}
	// Approved meanwhile: the next renewal is for long.
	delete(strangers, mac(1))
	if got := life(1, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.100")); got != DefaultLeaseTime {
		t.Errorf("renewed for %v", got)
	}
}

// Another server's client that shouts on our wire is not told that it is wrong.
func TestSilenceForStrangersElsewhere(t *testing.T) {
	w := newWire(t, nil)
	w.want(msg(5, dhcpv4.MessageTypeRequest, wish("10.77.0.50")), "")   // INIT-REBOOT
	w.want(msg(5, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.50")), "") // rebinding
	w.want(msg(5, dhcpv4.MessageTypeRequest, wish("10.77.0.50"), serverID("10.77.0.1")), "NAK 0.0.0.0 -> 255.255.255.255:68")
	w.lease(5, "10.77.0.100")
	w.want(msg(5, dhcpv4.MessageTypeRequest, wish("10.77.0.50")), "NAK 0.0.0.0 -> 255.255.255.255:68")
}

// The operator hears of a pool that runs out before a machine does.
func TestPoolIsReportedInTime(t *testing.T) {
	for _, size := range []int{4, 50} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			var log bytes.Buffer
			w := newWire(t, func(n *Network) { n.Last = netip.AddrFrom4([4]byte{10, 77, 0, byte(99 + size)}) })
			w.Log = slog.New(slog.NewTextHandler(&log, nil))
			const told = "nearly used up"
			reserve := max(1, size/10)
			for i := 1; i <= size; i++ {
				w.want(msg(10+i, dhcpv4.MessageTypeDiscover), fmt.Sprintf("OFFER 10.77.0.%d -> 255.255.255.255:68", 99+i))
				w.want(msg(10+i, dhcpv4.MessageTypeRequest, wish(fmt.Sprintf("10.77.0.%d", 99+i)), serverID("10.77.0.1")), fmt.Sprintf("ACK 10.77.0.%d -> 255.255.255.255:68", 99+i))
				if n := strings.Count(log.String(), told); n != 0 && i < size-reserve || n != 1 && i >= size-reserve {
					t.Fatalf("told %d times after %d of %d leases", n, i, size)
				}
			}
			if strings.Contains(log.String(), "no offer") {
				t.Error("a machine was turned away")
			}
		})
	}
}

// A flood of machines that do not exist costs neither memory nor disk.
func TestFlood(t *testing.T) {
	var log bytes.Buffer
	w := newWire(t, nil)
	w.Log = slog.New(slog.NewTextHandler(&log, nil))
	const flood = 100_000 // one of them has a reservation
	m := msg(0, dhcpv4.MessageTypeDiscover, class("PXEClient"), archs(0, 0))
	for _, mode := range modes {
		w.Mode = func() decision.Mode { return mode }
		w.Log = slog.New(slog.DiscardHandler)
		if mode == decision.Server {
			w.Log = slog.New(slog.NewTextHandler(&log, nil))
		}
		for i := range flood {
			m.ClientHWAddr[3], m.ClientHWAddr[4], m.ClientHWAddr[5] = byte(i>>16), byte(i>>8), byte(i)
			w.Handle(w.now, m)
		}
	}
	if c := w.Table.Counts(w.now); c.Offered != 4 || len(w.Table.offers) > 5 || len(w.Table.byMAC) != 0 || len(w.served.macs) > maxServed {
		t.Errorf("counts %v, %d offers, %d leases, %d served", c, len(w.Table.offers), len(w.Table.byMAC), len(w.served.macs))
	}
	if log.Len() > 8<<10 {
		t.Errorf("%d bytes of log:\n%.2000s", log.Len(), log.String())
	}
	// Those who were there before are served all the same.
	w.Mode = nil
	w.now = t0.Add(offerHold)
	w.lease(1, "10.77.0.100")
}

func FuzzARP(f *testing.F) {
	f.Add(arpProbe([]byte{2, 0, 0, 0, 0, 1}, netip.MustParseAddr("10.77.0.1")))
	f.Fuzz(func(t *testing.T, b []byte) {
		mac, a, ok := arpSender(b)
		if ok && (len(mac) != 6 || !a.Is4()) {
			t.Errorf("arpSender(%x) = %v, %v", b, mac, a)
		}
	})
}
