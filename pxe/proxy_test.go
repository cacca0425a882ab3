package pxe

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"

	"mosimg/internal/api"
	"mosimg/internal/bootargs"
	"mosimg/internal/fault"
	"mosimg/pxe/decision"
	"mosimg/pxe/dhcpd"
)

// A rival is somebody else's DHCP server on the same wire.

// dnsmasq serves addresses inside a machine, as a home router or libvirt does.
func (b *box) dnsmasq(more ...string) {
	b.t.Helper()
	program := need(b.t, "dnsmasq")
	ctx, cancel := context.WithCancel(context.Background())
	out := new(logBuffer)
	args := append([]string{"--no-daemon", "--conf-file=/dev/null", "--port=0", "--interface=" + b.nic, "--bind-interfaces",
		"--dhcp-range=10.77.0.70,10.77.0.80,1h", "--dhcp-leasefile=" + filepath.Join(b.t.TempDir(), "leases"), "--user=root", "--log-dhcp", "--no-ping"}, more...)
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr = out, out
	b.in(func() {
		if err := cmd.Start(); err != nil {
			b.t.Error(err)
		}
	})
	if cmd.Process == nil {
		b.t.FailNow()
	}
	b.t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
		if b.t.Failed() {
			b.t.Logf("dnsmasq:\n%s", out.String())
		}
	})
	wait(b.t, func() bool { return strings.Contains(out.String(), "DHCP, IP range") }, "dnsmasq does not start")
}

// rival serves addresses inside a machine until stop.
func (b *box) rival() (stop func()) {
	b.t.Helper()
	at := netip.MustParseAddr
	ctx, stop := context.WithCancel(b.t.Context())
	srv := &dhcpd.Server{Handler: &dhcpd.Handler{
		Table:  dhcpd.NewTable(dhcpd.Network{Server: at("10.77.0.66"), Subnet: netip.MustParsePrefix("10.77.0.0/24"), First: at("10.77.0.70"), Last: at("10.77.0.80")}, nil),
		Decide: func(string, decision.Facts, decision.Mode) decision.Answer { return decision.Answer{} },
		Save:   func(dhcpd.Lease) error { return nil },
	}}
	b.in(func() {
		conn, err := dhcpd.Listen(ctx, b.nic, 67)
		if err != nil {
			b.t.Error(err)
			return
		}
		go srv.Serve(ctx, conn)
	})
	return stop
}

func wait(t *testing.T, ready func() bool, otherwise string) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ready(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(otherwise)
		}
	}
}

// offers are all that a machine is offered, until it has heard the servers.
func (b *box) offers(servers []string, mods ...dhcpv4.Modifier) map[string]*dhcpv4.DHCPv4 {
	b.t.Helper()
	heard := map[string]*dhcpv4.DHCPv4{}
	b.in(func() {
		c, err := nclient4.New(b.nic, nclient4.WithTimeout(2*time.Second), nclient4.WithRetry(4))
		if err != nil {
			b.t.Error(err)
			return
		}
		defer c.Close()
		discover, err := dhcpv4.NewDiscovery(c.InterfaceAddr(), mods...)
		if err != nil {
			b.t.Error(err)
			return
		}
		_, err = c.SendAndRead(b.t.Context(), nclient4.DefaultServers, discover, func(m *dhcpv4.DHCPv4) bool {
			heard[m.ServerIdentifier().String()] = m
			for _, s := range servers {
				if heard[s] == nil {
					return false
				}
			}
			return true
		})
		if err != nil {
			b.t.Errorf("offers of %v: %v; heard %v", servers, err, heard)
		}
	})
	if b.t.Failed() {
		b.t.FailNow()
	}
	return heard
}

// accept takes one of several offers: a client that speaks PXE takes one with an
// address.
func (b *box) accept(offer *dhcpv4.DHCPv4, mods ...dhcpv4.Modifier) (ack *dhcpv4.DHCPv4) {
	b.t.Helper()
	b.in(func() {
		c, err := nclient4.New(b.nic, nclient4.WithTimeout(2*time.Second), nclient4.WithRetry(4))
		if err != nil {
			b.t.Error(err)
			return
		}
		defer c.Close()
		l, err := c.RequestFromOffer(b.t.Context(), offer, mods...)
		if err != nil {
			b.t.Error(err)
			return
		}
		ack = l.ACK
	})
	if ack == nil {
		b.t.FailNow()
	}
	return ack
}

// ask4011 is UEFI's second request, after it configured its address.
func (b *box) ask4011(to string, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	b.t.Helper()
	var reply *dhcpv4.DHCPv4
	b.in(func() {
		conn, err := net.ListenPacket("udp4", ":68")
		if err != nil {
			b.t.Error(err)
			return
		}
		defer conn.Close()
		hw, _ := net.ParseMAC(b.mac())
		req, err := dhcpv4.New(append(mods, dhcpv4.WithHwAddr(hw), dhcpv4.WithMessageType(dhcpv4.MessageTypeRequest))...)
		if err != nil {
			b.t.Error(err)
			return
		}
		buf := make([]byte, 1500)
		for range 5 {
			if _, err := conn.WriteTo(req.ToBytes(), &net.UDPAddr{IP: net.ParseIP(to), Port: 4011}); err != nil {
				b.t.Error(err)
				return
			}
			_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
			if n, from, err := conn.ReadFrom(buf); err == nil && from.String() == to+":4011" {
				if reply, err = dhcpv4.FromBytes(buf[:n]); err != nil {
					b.t.Error(err)
				}
				return
			}
		}
		b.t.Error("port 4011 does not answer")
	})
	if reply == nil {
		b.t.FailNow()
	}
	return reply
}

// Plugged into an office with a router, the head helps machines to boot and
// leaves everything else to the router.
func TestProxyBesideDnsmasq(t *testing.T) {
	needNetwork(t)
	_, boxes := lan(t, "h0", "10.77.0.1/24", "router", "pc")
	router, pc := boxes[0], boxes[1]
	router.configure("10.77.0.66/24")
	router.dnsmasq("--dhcp-authoritative")
	cfg := config(t, "h0")
	cfg.DHCP = DHCPAuto
	r := start(t, cfg)
	if r.info.DHCP != DHCPProxy || !strings.Contains(r.info.Networks[0], "proxy") {
		t.Fatalf("info %+v; want proxy mode", r.info)
	}
	both := []string{"10.77.0.66", "10.77.0.1"}

	// 1. A BIOS ROM: the address from the router, the file from us.
	bios := []dhcpv4.Modifier{class("PXEClient:Arch:00000:UNDI:002001"), arch(0)}
	o := pc.offers(both, bios...)
	ours, theirs := o["10.77.0.1"], o["10.77.0.66"]
	if ours.BootFileName != "undionly.kpxe" || !ours.YourIPAddr.IsUnspecified() || ours.ClassIdentifier() != "PXEClient" {
		t.Errorf("our offer: %s", ours.Summary())
	}
	ack := pc.accept(theirs, bios...)
	if !ack.YourIPAddr.Equal(theirs.YourIPAddr) || ack.ServerIdentifier().String() != "10.77.0.66" {
		t.Errorf("leased %v by %v; want %v by the router", ack.YourIPAddr, ack.ServerIdentifier(), theirs.YourIPAddr)
	}
	pc.configure(ack.YourIPAddr.String() + "/24")
	pc.tftp("10.77.0.1", "undionly.kpxe")

	// 2. UEFI asks port 4011 as well.
	uefi := []dhcpv4.Modifier{class("PXEClient:Arch:00007:UNDI:003016"), arch(7), dhcpv4.WithClientIP(ack.YourIPAddr)}
	if got := pc.ask4011("10.77.0.1", uefi...); got.BootFileName != "snponly.efi" || got.MessageType() != dhcpv4.MessageTypeAck {
		t.Errorf("port 4011: %s", got.Summary())
	}

	// 3. iPXE of a PC that nobody wants: its own disk.
	ipxe := append(bios, ipxeClass())
	url := pc.offers(both, ipxe...)["10.77.0.1"].BootFileName
	if script := pc.get(url); !strings.Contains(script, "sleep 3\nexit 1") || strings.Contains(script, "kernel") {
		t.Errorf("script of an unknown machine:\n%s", script)
	}
	var recs []api.NodeRecord
	if err := r.admin().Get(t.Context(), api.PathNodes, &recs); err != nil || len(recs) != 0 {
		t.Errorf("records %v, %v; want none", recs, err)
	}
	// Another machine's script is not for it.
	resp, err := pc.http().Get("http://10.77.0.1/ipxe/52:54:00:00:00:99")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("another machine's script: %s; want 403", resp.Status)
	}

	// 4. With an adoption window it joins, and boots without one from then on.
	if err := r.admin().Post(t.Context(), api.PathAdopt, api.Adopt{For: time.Minute}, nil); err != nil {
		t.Fatal(err)
	}
	script := pc.get(url)
	args := bootargs.Parse(script)
	if args.Nonce == "" {
		t.Fatalf("script in the window:\n%s", script)
	}
	reply, err := pc.agent(args).enrol(t.Context(), 0)
	if err != nil || reply.State != api.Approved {
		t.Fatalf("enrol = %+v, %v", reply, err)
	}
	if err := r.admin().Post(t.Context(), api.PathAdopt, api.Adopt{}, nil); err != nil {
		t.Fatal(err)
	}
	if script := pc.get(url); !strings.Contains(script, "kernel ") {
		t.Errorf("script of a member:\n%s", script)
	}
	// 5. The boot trace knows the machine although another server leases.
	if !strings.Contains(r.log.String(), "stage=tftp mac="+pc.mac()) {
		t.Error("no stage tftp with the machine's MAC in the log")
	}
}

// A router that is plugged in later: the head notices, says so, and gives out
// no address any more, but does not take away what it gave.
func TestRivalAppears(t *testing.T) {
	needNetwork(t)
	_, boxes := lan(t, "h0", "10.77.0.1/24", "router", "old", "new")
	router, old, fresh := boxes[0], boxes[1], boxes[2]
	router.configure("10.77.0.66/24")
	cfg := config(t, "h0")
	cfg.DHCP, cfg.Reprobe = DHCPAuto, 300*time.Millisecond
	r := start(t, cfg)
	if r.info.DHCP != DHCPServer {
		t.Fatalf("info %+v; want server mode on a wire without another server", r.info)
	}
	_, ack := old.lease()
	stop := router.rival()
	wait(t, func() bool { return strings.Contains(r.log.String(), "ANOTHER DHCP SERVER APPEARED") }, "the rival is not noticed")
	if !strings.Contains(r.log.String(), "server=10.77.0.66") {
		t.Error("the rival is not named")
	}
	for range 3 {
		if _, ack := fresh.lease(); ack.ServerIdentifier().String() != "10.77.0.66" {
			t.Errorf("a new machine got %v from %v", ack.YourIPAddr, ack.ServerIdentifier())
		}
	}
	if got := old.renew(ack); got == nil || !got.YourIPAddr.Equal(ack.YourIPAddr) || got.MessageType() != dhcpv4.MessageTypeAck {
		t.Errorf("renewal of a lease from before: %v", got)
	}
	// It is gone again: that may be a restart, so the head only tells.
	stop()
	wait(t, func() bool { return strings.Contains(r.log.String(), "does not answer any more") }, "nobody says that there is no DHCP server left")
	o := fresh.offers([]string{"10.77.0.1"}, class("PXEClient:Arch:00000:UNDI:002001"), arch(0))
	if a := o["10.77.0.1"].YourIPAddr; !a.IsUnspecified() {
		t.Errorf("the head gives out %v again", a)
	}
}

// renew asks the server of a lease, by unicast.
func (b *box) renew(ack *dhcpv4.DHCPv4) (reply *dhcpv4.DHCPv4) {
	b.t.Helper()
	b.configure(ack.YourIPAddr.String() + "/24")
	b.in(func() {
		conn, err := net.ListenPacket("udp4", ":68")
		if err != nil {
			b.t.Error(err)
			return
		}
		defer conn.Close()
		req, err := dhcpv4.NewRenewFromAck(ack)
		if err != nil {
			b.t.Error(err)
			return
		}
		buf := make([]byte, 1500)
		for range 5 {
			if _, err := conn.WriteTo(req.ToBytes(), &net.UDPAddr{IP: ack.ServerIdentifier(), Port: 67}); err != nil {
				b.t.Error(err)
			}
			_ = conn.SetReadDeadline(time.Now().Add(2 * time.Second))
			if n, _, err := conn.ReadFrom(buf); err == nil {
				reply, _ = dhcpv4.FromBytes(buf[:n])
				return
			}
		}
	})
	return reply
}

// A client that takes a rival's offer is noticed long before the next look.
func TestRivalIsHeard(t *testing.T) {
	needNetwork(t)
	_, boxes := lan(t, "h0", "10.77.0.1/24", "router", "pc")
	boxes[0].configure("10.77.0.66/24")
	cfg := config(t, "h0")
	cfg.DHCP, cfg.Reprobe = DHCPAuto, time.Hour
	r := start(t, cfg)
	boxes[0].rival()
	offers := boxes[1].offers([]string{"10.77.0.1", "10.77.0.66"})
	boxes[1].accept(offers["10.77.0.66"])
	wait(t, func() bool { return strings.Contains(r.log.String(), "ANOTHER DHCP SERVER APPEARED") }, "the rival is not noticed")
}

// --dhcp says what to do, whoever else is there.
func TestDHCPModes(t *testing.T) {
	needNetwork(t)
	_, boxes := lan(t, "h0", "10.77.0.1/24", "router", "pc")
	boxes[0].configure("10.77.0.66/24")
	boxes[0].rival()
	bios := []dhcpv4.Modifier{class("PXEClient:Arch:00000:UNDI:002001"), arch(0)}
	for _, tt := range []struct {
		mode   DHCPMode
		leases bool
	}{{DHCPServer, true}, {DHCPProxy, false}} {
		cfg := config(t, "h0")
		cfg.DHCP = tt.mode
		r := start(t, cfg)
		o := boxes[1].offers([]string{"10.77.0.1", "10.77.0.66"}, bios...)["10.77.0.1"]
		if r.info.DHCP != tt.mode || o.YourIPAddr.IsUnspecified() == tt.leases || o.BootFileName != "undionly.kpxe" {
			t.Errorf("--dhcp %s: info %s, offer %s", tt.mode, r.info.DHCP, o.Summary())
		}
		if err := r.stop(); err != nil {
			t.Fatal(err)
		}
	}
	cfg := config(t, "h0")
	cfg.DHCP = DHCPOff
	if r := start(t, cfg); r.info.DHCP != DHCPOff {
		t.Errorf("info %+v", r.info)
	}
	for _, port := range []int{67, 4011} {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{Port: port})
		if err != nil {
			t.Errorf("--dhcp off: port %d: %v; want it free for another server", port, err)
			continue
		}
		c.Close()
	}
	cfg.DHCP = "perhaps"
	if _, err := New(cfg); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), "auto, server, proxy or off") {
		t.Errorf("New = %v", err)
	}
}

// An address that a person gave to a printer is left alone, as the kernel's own
// answer to ARP shows.
func TestAddressInUse(t *testing.T) {
	needNetwork(t)
	_, boxes := lan(t, "h0", "10.77.0.1/24", "printer", "pc")
	boxes[0].configure("10.77.0.128/24") // the first of the pool
	r := start(t, config(t, "h0"))
	if _, ack := boxes[1].lease(); ack.YourIPAddr.String() != "10.77.0.129" {
		t.Errorf("leased %v; want the address after the printer's", ack.YourIPAddr)
	}
	if log := r.log.String(); !strings.Contains(log, "address=10.77.0.128") || !strings.Contains(log, "by="+boxes[0].mac()) {
		t.Error("the printer is not named in the log")
	}
}
