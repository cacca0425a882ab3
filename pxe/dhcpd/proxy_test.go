package dhcpd

import (
	"net/netip"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
)

func proxyWire(t *testing.T) *wire {
	w := newWire(t, nil)
	w.Mode = func() decision.Mode { return decision.Proxy }
	return w
}

// Beside another DHCP server nobody is given an address, whatever they send,
// and nobody who does not netboot hears of us.
func TestProxyLeasesNothing(t *testing.T) {
	w := proxyWire(t)
	for _, typ := range []dhcpv4.MessageType{dhcpv4.MessageTypeDiscover, dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeInform, dhcpv4.MessageTypeDecline, dhcpv4.MessageTypeRelease} {
		for _, mods := range [][]dhcpv4.Modifier{nil, {wish("10.77.0.100")}, {ciaddr("10.77.0.100")}, {wish("10.77.0.100"), serverID("10.77.0.1")}} {
			w.want(msg(1, typ, mods...), "")
		}
	}
	netboot := []dhcpv4.Modifier{class("PXEClient:Arch:00000:UNDI:002001"), archs(0, 0)}
	w.want(msg(1, dhcpv4.MessageTypeDiscover, netboot...), "OFFER 0.0.0.0 -> 255.255.255.255:68")
	w.want(msg(1, dhcpv4.MessageTypeRequest, append(netboot, wish("10.77.0.100"))...), "")
	if len(w.saved) != 0 {
		t.Errorf("leases were stored: %v", w.saved)
	}
	// A relay of a network that the head has no address in.
	w.want(msg(1, dhcpv4.MessageTypeDiscover, append(netboot, giaddr("192.168.5.1"))...), "OFFER 0.0.0.0 -> 192.168.5.1:67")
	if !w.Served(mac(1)) || w.Served(mac(2)) {
		t.Error("Served does not tell who was answered")
	}
}

// A head that stepped down takes no address away from a machine that works,
// but gives out none.
func TestStepDown(t *testing.T) {
	w := newWire(t, nil)
	w.lease(1, "10.77.0.100")
	w.Mode = func() decision.Mode { return decision.Proxy }
	w.want(msg(1, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.100")), "ACK 10.77.0.100 -> 10.77.0.100:68")
	w.want(msg(2, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.100")), "")
	w.want(msg(1, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.101")), "")
	w.want(msg(1, dhcpv4.MessageTypeRequest, wish("10.77.0.100")), "")
	w.want(msg(1, dhcpv4.MessageTypeDiscover), "")
	w.now = t0.Add(3 * time.Hour)
	w.want(msg(1, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.100")), "")
}

// Port 4011 answers those who come, wherever they send from, and no others.
func TestPort4011(t *testing.T) {
	at := netip.MustParseAddrPort
	netboot := []dhcpv4.Modifier{class("PXEClient:Arch:00007:UNDI:003016"), archs(0, 7)}
	for _, tt := range []struct {
		name string
		m    *dhcpv4.DHCPv4
		from string
		want string // destination; "" for silence
	}{
		{"UEFI", msg(1, dhcpv4.MessageTypeRequest, netboot...), "10.77.0.50:68", "10.77.0.50:68"},
		{"from port 4011", msg(1, dhcpv4.MessageTypeRequest, netboot...), "10.77.0.50:4011", "10.77.0.50:4011"},
		{"BIOS by INFORM", msg(1, dhcpv4.MessageTypeInform, class("PXEClient"), archs(0, 0)), "10.77.0.50:68", "10.77.0.50:68"},
		{"naming the other server", msg(1, dhcpv4.MessageTypeRequest, append(netboot, serverID("10.77.0.254"))...), "10.77.0.50:68", "10.77.0.50:68"},
		{"without an address", msg(1, dhcpv4.MessageTypeRequest, netboot...), "0.0.0.0:68", "255.255.255.255:68"},
		{"not a netboot", msg(1, dhcpv4.MessageTypeRequest), "10.77.0.50:68", ""},
		{"DISCOVER", msg(1, dhcpv4.MessageTypeDiscover, netboot...), "10.77.0.50:68", ""},
		{"arm64", msg(1, dhcpv4.MessageTypeRequest, class("PXEClient"), archs(0, 11)), "10.77.0.50:68", ""},
	} {
		for _, w := range []*wire{newWire(t, nil), proxyWire(t)} {
			reply, to := w.HandleBoot(tt.m, at(tt.from))
			switch {
			case tt.want == "" && reply != nil, tt.want != "" && (reply == nil || to.String() != tt.want):
				t.Errorf("%s: %v to %v; want to %q", tt.name, reply, to, tt.want)
			case reply != nil && (reply.ClassIdentifier() != "PXEClient" || reply.BootFileName == "" || isSet(addrOf(reply.YourIPAddr))):
				t.Errorf("%s: %v", tt.name, reply.Summary())
			}
		}
	}
}

// A client that takes another server's offer is how a rival is noticed first.
func TestRivalIsTold(t *testing.T) {
	w := newWire(t, nil)
	var heard []string
	w.Rival = func(a netip.Addr) { heard = append(heard, a.String()) }
	w.lease(1, "10.77.0.100")
	w.want(msg(2, dhcpv4.MessageTypeRequest, wish("10.77.0.7"), serverID("10.77.0.254")), "")
	if len(heard) != 1 || heard[0] != "10.77.0.254" {
		t.Errorf("heard of %v; want 10.77.0.254", heard)
	}
}

func FuzzProxy(f *testing.F) {
	for _, m := range machines {
		f.Add(m.packet(dhcpv4.MessageTypeDiscover, ""), false)
		f.Add(m.packet(dhcpv4.MessageTypeRequest, "10.77.0.50"), true)
	}
	f.Fuzz(func(t *testing.T, b []byte, boot bool) {
		req, err := parse(b)
		if err != nil {
			return
		}
		w := proxyWire(t)
		reply, to := w.Handle(t0, req)
		if boot {
			reply, to = w.HandleBoot(req, netip.MustParseAddrPort("10.77.0.50:68"))
		}
		if reply == nil {
			return
		}
		again, err := dhcpv4.FromBytes(reply.ToBytes())
		if err != nil {
			t.Fatalf("reply to %x does not parse: %v", b, err)
		}
		if !to.IsValid() || again.BootFileName == "" || isSet(addrOf(again.YourIPAddr)) {
			t.Errorf("reply to %x: %v to %v", b, again.Summary(), to)
		}
	})
}
