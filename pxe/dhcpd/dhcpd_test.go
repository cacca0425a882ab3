package dhcpd

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
)

var (
	t0     = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)
	server = netip.MustParseAddr("10.77.0.1")
)

// wire is a handler with a memory of what was stored.
type wire struct {
	*Handler
	t     *testing.T
	now   time.Time
	saved map[string]Lease
	full  bool // the disk
}

func newWire(t *testing.T, change func(*Network)) *wire {
	n := Network{
		Server: server, Subnet: netip.MustParsePrefix("10.77.0.0/24"),
		First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.103"),
		Reserved: map[string]netip.Addr{mac(9): netip.MustParseAddr("10.77.0.9")},
	}
	if change != nil {
		change(&n)
	}
	w := &wire{t: t, now: t0, saved: map[string]Lease{}}
	w.Handler = &Handler{
		Table: NewTable(n, nil),
		Decide: func(mac string, f decision.Facts, m decision.Mode) decision.Answer {
			return decision.Decide(f, decision.Head{
				Mode: m,
				Boot: map[string]bool{"undionly.kpxe": true, "snponly.efi": true, "ipxe.pxe": true},
				URL:  "http://10.77.0.1", Script: "http://10.77.0.1/ipxe/" + mac,
			})
		},
		Save: func(l Lease) error {
			if w.full {
				return errors.New("no space left on device")
			}
			w.saved[l.MAC] = l
			return nil
		},
	}
	return w
}

// Handle is Handler.Handle in this test's time.
func (w *wire) Handle(now time.Time, m *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, netip.AddrPort) {
	return w.Handler.Handle(w.t.Context(), now, m)
}

func mac(i int) string { return fmt.Sprintf("52:54:00:00:00:%02x", i) }

// msg makes a client's message.
func msg(i int, t dhcpv4.MessageType, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	hw, _ := net.ParseMAC(mac(i))
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{dhcpv4.WithHwAddr(hw), dhcpv4.WithMessageType(t)}, mods...)...)
	if err != nil {
		panic(err)
	}
	return m
}

func wish(a string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(net.ParseIP(a)))
}
func serverID(a string) dhcpv4.Modifier {
	return dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.ParseIP(a)))
}
func ciaddr(a string) dhcpv4.Modifier { return dhcpv4.WithClientIP(net.ParseIP(a)) }
func giaddr(a string) dhcpv4.Modifier { return dhcpv4.WithGatewayIP(net.ParseIP(a)) }
func class(s string) dhcpv4.Modifier  { return dhcpv4.WithOption(dhcpv4.OptClassIdentifier(s)) }
func archs(a ...byte) dhcpv4.Modifier {
	return dhcpv4.WithGeneric(dhcpv4.OptionClientSystemArchitectureType, a)
}
func userClass(s string) dhcpv4.Modifier {
	return dhcpv4.WithGeneric(dhcpv4.OptionUserClassInformation, []byte(s))
}

// send gives the reply in short: "OFFER 10.77.0.100 -> 255.255.255.255:68".
func (w *wire) send(m *dhcpv4.DHCPv4) string {
	w.t.Helper()
	reply, to := w.Handle(w.now, m)
	if reply == nil {
		return ""
	}
	// What goes over the wire must come back the same.
	if _, err := dhcpv4.FromBytes(reply.ToBytes()); err != nil {
		w.t.Errorf("reply does not parse: %v", err)
	}
	if got := addrOf(reply.ServerIdentifier()); got != server {
		w.t.Errorf("server id = %v", got)
	}
	if reply.TransactionID != m.TransactionID || reply.ClientHWAddr.String() != m.ClientHWAddr.String() {
		w.t.Errorf("reply is not for this request")
	}
	return fmt.Sprintf("%s %s -> %s", reply.MessageType(), reply.YourIPAddr, to)
}

func (w *wire) want(m *dhcpv4.DHCPv4, want string) {
	w.t.Helper()
	if got := w.send(m); got != want {
		w.t.Errorf("%s = %q; want %q", m.MessageType(), got, want)
	}
}

// lease runs DISCOVER and REQUEST.
func (w *wire) lease(i int, addr string) {
	w.t.Helper()
	w.want(msg(i, dhcpv4.MessageTypeDiscover), "OFFER "+addr+" -> 255.255.255.255:68")
	w.want(msg(i, dhcpv4.MessageTypeRequest, wish(addr), serverID("10.77.0.1")), "ACK "+addr+" -> 255.255.255.255:68")
	if got := w.saved[mac(i)].Addr.String(); got != addr {
		w.t.Errorf("stored lease of %s = %s; want %s before the answer", mac(i), got, addr)
	}
}

func TestLease(t *testing.T) {
	w := newWire(t, nil)
	w.lease(1, "10.77.0.100")
	w.lease(2, "10.77.0.101")
	w.lease(9, "10.77.0.9") // reserved
	w.lease(1, "10.77.0.100")
	// After its expiry the address stays the machine's while it is free.
	w.now = t0.Add(48 * time.Hour)
	w.lease(3, "10.77.0.102")
	w.lease(1, "10.77.0.100")
}

func TestSameAddressAfterRestart(t *testing.T) {
	w := newWire(t, nil)
	w.lease(1, "10.77.0.100")
	w.lease(2, "10.77.0.101")
	var known []Lease
	for _, l := range w.saved {
		known = append(known, l)
	}
	again := newWire(t, nil)
	again.Table = NewTable(w.Table.Network(), known)
	again.lease(3, "10.77.0.102")
	again.lease(2, "10.77.0.101")
	again.want(msg(1, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.100")), "ACK 10.77.0.100 -> 10.77.0.100:68")
}

func TestRenewAndReboot(t *testing.T) {
	w := newWire(t, nil)
	w.lease(1, "10.77.0.100")
	// Renewal by unicast goes back by unicast.
	w.want(msg(1, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.100")), "ACK 10.77.0.100 -> 10.77.0.100:68")
	// INIT-REBOOT.
	w.want(msg(1, dhcpv4.MessageTypeRequest, wish("10.77.0.100")), "ACK 10.77.0.100 -> 255.255.255.255:68")
	// Wrong address, wrong network, another machine's address.
	w.want(msg(1, dhcpv4.MessageTypeRequest, wish("10.77.0.102")), "NAK 0.0.0.0 -> 255.255.255.255:68")
	w.want(msg(1, dhcpv4.MessageTypeRequest, wish("192.168.1.7")), "NAK 0.0.0.0 -> 255.255.255.255:68")
	w.want(msg(2, dhcpv4.MessageTypeRequest, wish("10.77.0.100")), "NAK 0.0.0.0 -> 255.255.255.255:68")
	w.want(msg(2, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.100")), "NAK 0.0.0.0 -> 255.255.255.255:68")
	w.want(msg(2, dhcpv4.MessageTypeRequest, wish("10.77.0.9")), "NAK 0.0.0.0 -> 255.255.255.255:68")
	w.want(msg(2, dhcpv4.MessageTypeRequest, wish("10.77.0.1")), "NAK 0.0.0.0 -> 255.255.255.255:68")
	// A head that lost its leases takes over what clients say they have.
	w.want(msg(3, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.103")), "ACK 10.77.0.103 -> 10.77.0.103:68")
}

// In a network with a second server we keep silent when it is chosen.
func TestOtherServer(t *testing.T) {
	w := newWire(t, nil)
	w.want(msg(1, dhcpv4.MessageTypeDiscover), "OFFER 10.77.0.100 -> 255.255.255.255:68")
	w.want(msg(1, dhcpv4.MessageTypeRequest, wish("10.77.0.100"), serverID("10.77.0.2")), "")
	w.want(msg(1, dhcpv4.MessageTypeRelease, ciaddr("10.77.0.100"), serverID("10.77.0.2")), "")
	w.lease(2, "10.77.0.100") // the offer is withdrawn
}

func TestExhaustion(t *testing.T) {
	w := newWire(t, nil)
	for i := 1; i <= 4; i++ {
		w.lease(i, fmt.Sprintf("10.77.0.%d", 99+i))
	}
	w.want(msg(5, dhcpv4.MessageTypeDiscover), "")
	_, _, err := w.Table.Offer(w.now, mac(5), netip.Addr{})
	if err == nil || err.Error() != "no free address: the pool has 4 addresses: 4 leased, 0 offered, 0 in quarantine" {
		t.Errorf("Offer = %v; want the counts of the pool", err)
	}
	w.lease(9, "10.77.0.9") // reservations are not touched
	// The address that was unused for longest is taken first.
	w.now = t0.Add(30 * time.Minute)
	w.want(msg(2, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.101")), "ACK 10.77.0.101 -> 10.77.0.101:68")
	w.now = t0.Add(DefaultLeaseTime)
	w.lease(5, "10.77.0.100")
	// Its former owner gets another one, without a conflict.
	w.want(msg(1, dhcpv4.MessageTypeRequest, ciaddr("10.77.0.100")), "NAK 0.0.0.0 -> 255.255.255.255:68")
	w.lease(1, "10.77.0.102")
}

// Machines that discover and vanish hold the pool for a minute, not for ever.
func TestOffersEnd(t *testing.T) {
	w := newWire(t, nil)
	for i := 1; i <= 4; i++ {
		w.want(msg(i, dhcpv4.MessageTypeDiscover), fmt.Sprintf("OFFER 10.77.0.%d -> 255.255.255.255:68", 99+i))
	}
	w.want(msg(5, dhcpv4.MessageTypeDiscover), "")
	w.now = t0.Add(offerHold)
	w.lease(5, "10.77.0.100")
}

func TestDecline(t *testing.T) {
	w := newWire(t, nil)
	w.lease(1, "10.77.0.100")
	w.want(msg(2, dhcpv4.MessageTypeDecline, wish("10.77.0.100")), "") // not its own: not believed
	w.lease(1, "10.77.0.100")
	w.want(msg(1, dhcpv4.MessageTypeDecline, wish("10.77.0.100"), serverID("10.77.0.1")), "")
	w.lease(1, "10.77.0.101")
	if c := w.Table.Counts(w.now); c.Quarantined != 1 {
		t.Errorf("counts = %v; want 1 in quarantine", c)
	}
	w.now = t0.Add(quarantine)
	w.lease(2, "10.77.0.100")
}

func TestRelease(t *testing.T) {
	w := newWire(t, nil)
	for i := 1; i <= 4; i++ {
		w.lease(i, fmt.Sprintf("10.77.0.%d", 99+i))
	}
	w.want(msg(3, dhcpv4.MessageTypeRelease, ciaddr("10.77.0.102")), "")
	if w.Table.Holder(w.now, netip.MustParseAddr("10.77.0.102")) != "" {
		t.Error("a released address still has a holder")
	}
	w.lease(5, "10.77.0.102")
}

func TestInform(t *testing.T) {
	w := newWire(t, nil)
	reply, to := w.Handle(w.now, msg(1, dhcpv4.MessageTypeInform, ciaddr("10.77.0.50")))
	if reply == nil || reply.MessageType() != dhcpv4.MessageTypeAck || !reply.YourIPAddr.IsUnspecified() || reply.IPAddressLeaseTime(0) != 0 {
		t.Fatalf("INFORM = %v; want an ACK without address and lease time", reply)
	}
	if to.String() != "10.77.0.50:68" {
		t.Errorf("sent to %v", to)
	}
}

func TestRelay(t *testing.T) {
	w := newWire(t, nil)
	w.want(msg(1, dhcpv4.MessageTypeDiscover, giaddr("10.77.0.250")), "OFFER 10.77.0.100 -> 10.77.0.250:67")
	w.want(msg(1, dhcpv4.MessageTypeRequest, giaddr("10.77.0.250"), wish("10.77.0.102")), "ACK 10.77.0.102 -> 10.77.0.250:67")
	w.want(msg(1, dhcpv4.MessageTypeDiscover, giaddr("192.168.5.1")), "")
	nak, to := w.Handle(w.now, msg(1, dhcpv4.MessageTypeRequest, giaddr("10.77.0.250"), wish("1.2.3.4")))
	if !nak.IsBroadcast() || to.String() != "10.77.0.250:67" {
		t.Errorf("NAK to %v, broadcast %t; want by the relay, which must broadcast it", to, nak.IsBroadcast())
	}
}

// A client is told nothing that is not on disk.
func TestFullDisk(t *testing.T) {
	w := newWire(t, nil)
	w.full = true
	w.want(msg(1, dhcpv4.MessageTypeDiscover), "OFFER 10.77.0.100 -> 255.255.255.255:68")
	w.want(msg(1, dhcpv4.MessageTypeRequest, wish("10.77.0.100"), serverID("10.77.0.1")), "")
	w.full = false
	w.lease(1, "10.77.0.100")
}

func TestSilence(t *testing.T) {
	w := newWire(t, nil)
	hw, _ := net.ParseMAC("52:54:00:00:00:01:02:03")
	for name, m := range map[string]*dhcpv4.DHCPv4{
		"a reply": func() *dhcpv4.DHCPv4 {
			m := msg(1, dhcpv4.MessageTypeOffer)
			m.OpCode = dhcpv4.OpcodeBootReply
			return m
		}(),
		"BOOTP":                 func() *dhcpv4.DHCPv4 { m := msg(1, 0); m.Options.Del(dhcpv4.OptionDHCPMessageType); return m }(),
		"not Ethernet":          msg(1, dhcpv4.MessageTypeDiscover, dhcpv4.WithHwAddr(hw)),
		"no address":            msg(1, dhcpv4.MessageTypeDiscover, dhcpv4.WithHwAddr(make(net.HardwareAddr, 6))),
		"a multicast address":   msg(1, dhcpv4.MessageTypeDiscover, dhcpv4.WithHwAddr(net.HardwareAddr{1, 0, 0x5e, 0, 0, 1})),
		"a request for nothing": msg(1, dhcpv4.MessageTypeRequest),
		"inform of nobody":      msg(1, dhcpv4.MessageTypeInform),
		"an unknown type":       msg(1, 99),
	} {
		if got := w.send(m); got != "" {
			t.Errorf("%s was answered with %q", name, got)
		}
	}
}

// bootOf is all of a reply that firmware looks at when it boots.
type bootOf struct{ Siaddr, File, Opt66, Opt67, Opt60, Opt43, Opt175 string }

func boot(r *dhcpv4.DHCPv4) bootOf {
	opt := func(c uint8) string { return string(r.Options.Get(dhcpv4.GenericOptionCode(c))) }
	return bootOf{r.ServerIPAddr.String(), r.BootFileName, opt(66), opt(67), opt(60), opt(43), opt(175)}
}

func TestBootOptions(t *testing.T) {
	const script = "http://10.77.0.1/ipxe/52:54:00:00:00:01"
	const id = "\x000123456789abcdef"
	for _, tt := range []struct {
		name string
		mods []dhcpv4.Modifier
		want bootOf
	}{
		{"no netboot", nil, bootOf{Siaddr: "0.0.0.0"}},
		{"BIOS: no option 60 and 43, or it looks for a boot server menu",
			[]dhcpv4.Modifier{class("PXEClient:Arch:00000:UNDI:002001"), archs(0, 0)},
			bootOf{Siaddr: "10.77.0.1", File: "undionly.kpxe", Opt66: "10.77.0.1\x00", Opt67: "undionly.kpxe\x00"}},
		{"UEFI: no option 60, or it asks port 4011 and hangs",
			[]dhcpv4.Modifier{class("PXEClient:Arch:00007:UNDI:003016"), archs(0, 7)},
			bootOf{Siaddr: "10.77.0.1", File: "snponly.efi", Opt66: "10.77.0.1\x00", Opt67: "snponly.efi\x00"}},
		{"UEFI HTTP boot: option 60, or it ignores the offer",
			[]dhcpv4.Modifier{class("HTTPClient:Arch:00016:UNDI:003001"), archs(0, 16)},
			bootOf{Siaddr: "10.77.0.1", File: "http://10.77.0.1/boot/snponly.efi", Opt66: "10.77.0.1\x00", Opt67: "http://10.77.0.1/boot/snponly.efi\x00", Opt60: "HTTPClient"}},
		{"iPXE: no-pxedhcp, or it waits 2 s",
			[]dhcpv4.Modifier{class("PXEClient:Arch:00000:UNDI:002001"), archs(0, 0), userClass("iPXE"), dhcpv4.WithGeneric(dhcpv4.GenericOptionCode(175), []byte{0x13, 1, 1, 0x18, 1, 1, 0xff})},
			bootOf{Siaddr: "10.77.0.1", File: script, Opt66: "10.77.0.1\x00", Opt67: script + "\x00", Opt175: "\xb0\x01\x01"}},
		{"32-bit UEFI gets an address and nothing to boot",
			[]dhcpv4.Modifier{class("PXEClient:Arch:00006"), archs(0, 6)}, bootOf{Siaddr: "0.0.0.0"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWire(t, nil)
			mods := append([]dhcpv4.Modifier{dhcpv4.WithGeneric(dhcpv4.OptionClientMachineIdentifier, []byte(id))}, tt.mods...)
			offer, _ := w.Handle(w.now, msg(1, dhcpv4.MessageTypeDiscover, mods...))
			ack, _ := w.Handle(w.now, msg(1, dhcpv4.MessageTypeRequest, append(mods, wish("10.77.0.100"))...))
			for _, r := range []*dhcpv4.DHCPv4{offer, ack} {
				// As the client reads it.
				r, err := dhcpv4.FromBytes(r.ToBytes())
				if err != nil {
					t.Fatal(err)
				}
				if d := cmp.Diff(tt.want, boot(r)); d != "" {
					t.Errorf("%s (-want +got):\n%s", r.MessageType(), d)
				}
				if got := string(r.Options.Get(dhcpv4.OptionClientMachineIdentifier)); got != id {
					t.Errorf("%s: machine id %q; want it echoed", r.MessageType(), got)
				}
				if m := r.SubnetMask().String(); m != "ffffff00" {
					t.Errorf("%s: mask %s", r.MessageType(), m)
				}
				if l := r.IPAddressLeaseTime(0); l != DefaultLeaseTime {
					t.Errorf("%s: lease time %v", r.MessageType(), l)
				}
			}
		})
	}
}

func TestFeatures(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want string
	}{
		{"\x13\x01\x01\x18\x01\x01", "\x13\x18"},
		{"\x00\x13\x01\x01\xff\x18\x01\x01", "\x13"},
		{"\xb0\x01\x01\x24\x01\x01", "\x24"},
		{"\x13", ""}, {"\x13\x05\x01", ""}, {"", ""},
	} {
		if got := string(features([]byte(tt.in))); got != tt.want {
			t.Errorf("features(%q) = %q; want %q", tt.in, got, tt.want)
		}
	}
}

// Addresses that a changed configuration no longer allows are not kept.
func TestTableDropsWhatNoLongerFits(t *testing.T) {
	n := newWire(t, nil).Table.Network()
	at := func(a string) netip.Addr { return netip.MustParseAddr(a) }
	tb := NewTable(n, []Lease{
		{mac(1), at("10.77.0.100"), t0.Add(time.Hour)},
		{mac(2), at("10.77.0.200"), t0.Add(time.Hour)}, // outside the pool
		{mac(9), at("10.77.0.101"), t0.Add(time.Hour)}, // reserved another one since
		{mac(3), at("10.77.0.9"), t0.Add(time.Hour)},   // another machine's reservation
		{mac(4), at("10.77.0.100"), t0},                // older claim to the same
	})
	for a, want := range map[string]string{"10.77.0.100": mac(1), "10.77.0.200": "", "10.77.0.101": "", "10.77.0.9": ""} {
		if got := tb.Holder(t0, at(a)); got != want {
			t.Errorf("Holder(%s) = %q; want %q", a, got, want)
		}
	}
}

// A head without a battery leased until 2040; now its clock is right.
func TestClockWasWrong(t *testing.T) {
	w := newWire(t, nil)
	w.now = t0.AddDate(14, 0, 0)
	for i := 1; i <= 4; i++ {
		w.lease(i, fmt.Sprintf("10.77.0.%d", 99+i))
	}
	w.now = t0
	w.lease(1, "10.77.0.100")
	w.lease(5, "10.77.0.101")
}

// Whatever happens on the wire, no address has two live holders.
func TestNoAddressTwice(t *testing.T) {
	w := newWire(t, nil)
	types := []dhcpv4.MessageType{dhcpv4.MessageTypeDiscover, dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeRelease, dhcpv4.MessageTypeDecline}
	seed := uint32(1)
	rnd := func(n int) int { seed = seed*1664525 + 1013904223; return int(seed>>16) % n }
	holder := map[string]string{} // as the clients believe
	until := map[string]time.Time{}
	for range 20_000 {
		w.now = w.now.Add(time.Duration(rnd(120)) * time.Second)
		i, a := 1+rnd(8), fmt.Sprintf("10.77.0.%d", 99+rnd(6))
		m := msg(i, types[rnd(len(types))], wish(a))
		if rnd(2) == 0 {
			m = msg(i, m.MessageType(), ciaddr(a))
		}
		reply, _ := w.Handle(w.now, m)
		if reply == nil {
			if m.MessageType() == dhcpv4.MessageTypeRelease && holder[a] == mac(i) {
				delete(holder, a)
			}
			if m.MessageType() == dhcpv4.MessageTypeDecline && holder[a] == mac(i) {
				delete(holder, a)
			}
			continue
		}
		if reply.MessageType() != dhcpv4.MessageTypeAck {
			continue
		}
		got := reply.YourIPAddr.String()
		if h := holder[got]; h != "" && h != mac(i) && w.now.Before(until[got]) {
			t.Fatalf("%s is given to %s while %s has it", got, mac(i), h)
		}
		holder[got], until[got] = mac(i), w.now.Add(reply.IPAddressLeaseTime(0))
	}
}

func FuzzHandle(f *testing.F) {
	f.Add(msg(1, dhcpv4.MessageTypeDiscover, class("PXEClient"), archs(0, 7)).ToBytes())
	f.Add(msg(1, dhcpv4.MessageTypeRequest, wish("10.77.0.100"), userClass("iPXE")).ToBytes())
	f.Add(msg(1, dhcpv4.MessageTypeDecline, wish("10.77.0.100")).ToBytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := parse(b)
		if err != nil {
			if strings.HasPrefix(err.Error(), "parse:") {
				t.Fatalf("the library panics on %x: %v", b, err)
			}
			return
		}
		w := newWire(t, nil)
		reply, to := w.Handle(t0, req)
		if reply == nil {
			return
		}
		if _, err := dhcpv4.FromBytes(reply.ToBytes()); err != nil {
			t.Errorf("reply to %x does not parse: %v", b, err)
		}
		if !to.IsValid() || to.Port() != 67 && to.Port() != 68 {
			t.Errorf("reply to %x goes to %v", b, to)
		}
	})
}
