package netup

import (
	"context"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mosimg/internal/api"
)

// insideEnv marks the run of this test program in a network of its own.
const insideEnv = "MOSIMG_TEST_NETNS"

// TestInNamespace runs the tests below in an own network namespace, with two
// cards (veth) that are joined by a cable: client on mos0, server on mos1.
func TestInNamespace(t *testing.T) {
	if os.Getenv(insideEnv) != "" {
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("a network namespace needs root")
	}
	if testing.Short() {
		t.Skip("waits for leases to run out, 45 s")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestInside", "-test.v=true", "-test.timeout=4m")
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}

func inside(t *testing.T) {
	t.Helper()
	if os.Getenv(insideEnv) == "" {
		t.Skip("runs below TestInNamespace")
	}
	mountOnce.Do(func() {
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
			t.Fatal(err)
		}
	})
	v := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "mos0"}, PeerName: "mos1"}
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(v) })
}

var mountOnce sync.Once

func linkUp(t *testing.T, name string, up bool) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if up {
		err = netlink.LinkSetUp(l)
	} else {
		err = netlink.LinkSetDown(l)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// dhcpd is a DHCP server on mos1 that grants one address for a time.
type dhcpd struct {
	mu    sync.Mutex // guards the following
	addr  net.IP
	life  time.Duration
	nak   bool
	seen  map[dhcpv4.MessageType]int
	quiet bool
}

func startServer(t *testing.T, d *dhcpd) *dhcpd {
	t.Helper()
	linkUp(t, "mos1", true)
	l, err := netlink.LinkByName("mos1")
	if err != nil {
		t.Fatal(err)
	}
	a, _ := netlink.ParseAddr("10.77.0.1/24")
	if err := netlink.AddrReplace(l, a); err != nil {
		t.Fatal(err)
	}
	d.seen = make(map[dhcpv4.MessageType]int)
	s, err := server4.NewServer("mos1", &net.UDPAddr{Port: 67}, d.serve)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve()
	t.Cleanup(func() { s.Close() })
	return d
}

func (d *dhcpd) serve(conn net.PacketConn, _ net.Addr, m *dhcpv4.DHCPv4) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seen[m.MessageType()]++
	if d.quiet {
		return
	}
	kind := dhcpv4.MessageTypeOffer
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		kind = dhcpv4.MessageTypeAck
		if d.nak {
			kind = dhcpv4.MessageTypeNak
			d.nak = false
		}
	}
	r, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(kind), dhcpv4.WithYourIP(d.addr),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 77, 0, 1))), dhcpv4.WithServerIP(net.IPv4(10, 77, 0, 1)),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithRouter(net.IPv4(10, 77, 0, 254)),
		seconds(dhcpv4.OptionIPAddressLeaseTime, d.life))
	if err == nil {
		conn.WriteTo(r.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: 68})
	}
}

func (d *dhcpd) change(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

func (d *dhcpd) count(m dhcpv4.MessageType) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.seen[m]
}

// startClient runs the service on mos0 and gives the way to its status.
func startClient(t *testing.T, cfg Config) func() Status {
	t.Helper()
	cfg.StatusFile = filepath.Join(t.TempDir(), "net.json")
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg) }()
	t.Cleanup(func() {
		select {
		case err := <-done:
			t.Errorf("the service ended: %v", err)
			return
		default:
		}
		cancel()
		<-done
	})
	return func() Status {
		st, err := ReadStatus(cfg.StatusFile)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
}

// patience is how long a test waits for what should come in seconds: the
// machine that runs it may be busy with something else.
const patience = 45 * time.Second

func await(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

func addresses(t *testing.T, name string) []string {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	list, err := netlink.AddrList(l, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range list {
		out = append(out, a.IPNet.String())
	}
	return out
}

// No cable, then a cable, then an address and a route; the lease is renewed;
// the cable is pulled and put back.
func TestInsideCableThenLease(t *testing.T) {
	inside(t)
	status := startClient(t, Config{Card: "mos0"})
	await(t, patience, "the missing cable is told", func() bool { return status().State == api.StateNoLink })
	mac := status().MAC
	if want := "no carrier on mos0 (" + mac + "): check the cable"; status().Reason != want {
		t.Errorf("reason = %q; want %q", status().Reason, want)
	}
	d := startServer(t, &dhcpd{addr: net.IPv4(10, 77, 0, 9), life: minLease})
	await(t, patience, "an address", func() bool { return status().Address == "10.77.0.9" })
	if got := addresses(t, "mos0"); len(got) != 1 || got[0] != "10.77.0.9/24" {
		t.Errorf("addresses = %v", got)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	gw := ""
	for _, r := range routes {
		if r.Gw != nil {
			gw = r.Gw.String()
		}
	}
	if gw != "10.77.0.254" {
		t.Errorf("default route by %q; want 10.77.0.254", gw)
	}
	await(t, patience, "a renewal", func() bool { return d.count(dhcpv4.MessageTypeRequest) >= 2 })
	if n := d.count(dhcpv4.MessageTypeDiscover); n > 3 {
		t.Errorf("%d discovers; a renewal must not begin anew", n)
	}
	linkUp(t, "mos1", false)
	await(t, patience, "the pulled cable is told", func() bool { return status().Reason != "" })
	if !status().Up() {
		t.Error("the address is gone with the cable")
	}
	linkUp(t, "mos1", true)
	await(t, patience, "the cable is back", func() bool { return status().Reason == "" && status().Up() })
}

// The server is away for longer than the lease: the address stays. It comes
// back and gives another one: that is taken, and the old one removed.
func TestInsideServerGoneThenOtherAddress(t *testing.T) {
	inside(t)
	linkUp(t, "mos1", true)
	d := startServer(t, &dhcpd{addr: net.IPv4(10, 77, 0, 9), life: minLease})
	status := startClient(t, Config{Card: "mos0"})
	await(t, patience, "an address", func() bool { return status().Up() })
	d.change(func() { d.quiet = true })
	await(t, patience, "the missing server is told", func() bool { return status().Reason != "" })
	time.Sleep(minLease + 3*time.Second)
	if got := addresses(t, "mos0"); !status().Up() || len(got) != 1 {
		t.Errorf("after the lease ran out: %+v, %v; want the address kept", status(), got)
	}
	d.change(func() { d.quiet = false; d.addr = net.IPv4(10, 77, 0, 10) })
	await(t, patience, "the new address", func() bool { return status().Address == "10.77.0.10" })
	if got := addresses(t, "mos0"); len(got) != 1 || got[0] != "10.77.0.10/24" {
		t.Errorf("addresses = %v; want only the new one", got)
	}
}

func TestInsideNakBeginsAnew(t *testing.T) {
	inside(t)
	linkUp(t, "mos1", true)
	d := startServer(t, &dhcpd{addr: net.IPv4(10, 77, 0, 9), life: minLease})
	status := startClient(t, Config{Card: "mos0"})
	await(t, patience, "an address", func() bool { return status().Up() })
	before := d.count(dhcpv4.MessageTypeDiscover)
	d.change(func() { d.nak = true; d.addr = net.IPv4(10, 77, 0, 11) })
	await(t, patience, "another address", func() bool { return status().Address == "10.77.0.11" })
	if d.count(dhcpv4.MessageTypeDiscover) == before {
		t.Error("no discover after the server's no")
	}
}

func TestInsideStatic(t *testing.T) {
	inside(t)
	status := startClient(t, Config{Card: "mos0", Address: "10.77.0.1/24"})
	await(t, patience, "the address without a cable", func() bool { return status().Address == "10.77.0.1" })
	await(t, patience, "the missing cable is told", func() bool { return status().Reason != "" })
	linkUp(t, "mos1", true)
	await(t, patience, "the cable is seen", func() bool { return status().Reason == "" })
}

func TestWrongStaticAddress(t *testing.T) {
	for _, a := range []string{"10.77.0.1", "x/24", "fd00::1/64"} {
		if err := Run(t.Context(), Config{Address: a}); err == nil {
			t.Errorf("address %q was accepted", a)
		}
	}
}
