package preflight

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mosimg/internal/fault"
)

func nic(name string, change func(*Interface)) Interface {
	mac, _ := net.ParseMAC("52:54:00:00:00:01")
	i := Interface{Name: name, Index: 2, MAC: mac, Kind: "device", Up: true, Ethernet: true,
		Addrs: []Addr{{Prefix: netip.MustParsePrefix("10.77.0.1/24")}}}
	if change != nil {
		change(&i)
	}
	return i
}

func TestChoose(t *testing.T) {
	lo := nic("lo", func(i *Interface) { i.Loopback = true })
	eth := nic("eth1", nil)
	dyn := nic("eth0", func(i *Interface) { i.Addrs[0].Dynamic = true })
	managed := nic("eth0", func(i *Interface) { i.Client = "dhclient" })
	for _, tt := range []struct {
		name  string
		all   []Interface
		named []string
		off   bool   // DHCP
		want  string // the chosen one
		fault string
		warn  string
	}{
		{name: "the only one", all: []Interface{lo, eth}, want: "eth1"},
		{name: "the only one beside the uplink", all: []Interface{lo, dyn, eth}, want: "eth1"},
		{name: "an office network is not taken over", all: []Interface{lo, dyn}, fault: "got its own address by DHCP"},
		{name: "nor one whose client sets no lifetime", all: []Interface{lo, managed}, fault: "by dhclient"},
		{name: "unless it is named, with a warning", all: []Interface{lo, dyn}, named: []string{"eth0"}, want: "eth0", warn: "another DHCP server"},
		{name: "nor a static uplink", all: []Interface{lo, nic("eth0", func(i *Interface) { i.Uplink = true })}, fault: "eth0 is this machine's way to other networks"},
		{name: "a static uplink that is named", all: []Interface{nic("eth0", func(i *Interface) { i.Uplink = true })}, named: []string{"eth0"}, want: "eth0"},
		{name: "no addresses given out, no danger", all: []Interface{lo, dyn}, off: true, want: "eth0"},
		{name: "wireless", all: []Interface{lo, nic("wlan0", func(i *Interface) { i.Wireless = true })}, fault: "wlan0 is wireless"},
		{name: "a container bridge", all: []Interface{lo, nic("docker0", func(i *Interface) { i.Kind = "bridge" })}, fault: "docker0 is a bridge"},
		{name: "a bridge that is named", all: []Interface{nic("br0", func(i *Interface) { i.Kind = "bridge" })}, named: []string{"br0"}, want: "br0"},
		{name: "by MAC", all: []Interface{lo, eth}, named: []string{"52:54:00:00:00:01"}, want: "lo", fault: "loopback"},
		{name: "both of two", all: []Interface{lo, eth, dyn, nic("eth2", nil)}, want: "eth1 eth2"},
		{name: "no address", all: []Interface{nic("eth1", func(i *Interface) { i.Addrs = nil })}, fault: "no IPv4 address"},
		{name: "no address, named", all: []Interface{nic("eth1", func(i *Interface) { i.Addrs = nil })}, named: []string{"eth1"}, fault: "ip addr add"},
		{name: "down", all: []Interface{nic("eth1", func(i *Interface) { i.Up = false })}, named: []string{"eth1"}, fault: "ip link set eth1 up"},
		{name: "no such interface", all: []Interface{lo, eth}, named: []string{"eth7"}, fault: "there are lo, eth1"},
		{name: "nothing at all", all: nil, fault: "no wired interface"},
		{name: "a tunnel", all: []Interface{nic("tun0", func(i *Interface) { i.Ethernet = false })}, named: []string{"tun0"}, fault: "not an Ethernet"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Choose(tt.all, tt.named, !tt.off)
			if tt.fault != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fault) {
					t.Errorf("Choose = %v, %v; want a fault that says %q", got, err, tt.fault)
				}
				return
			}
			var names []string
			for _, c := range got {
				names = append(names, c.Name)
			}
			if err != nil || strings.Join(names, " ") != tt.want {
				t.Fatalf("Choose = %v, %v; want %s", names, err, tt.want)
			}
			if !strings.Contains(got[0].Warning, tt.warn) || (tt.warn == "") != (got[0].Warning == "") {
				t.Errorf("warning %q; want %q", got[0].Warning, tt.warn)
			}
		})
	}
	// All wrong names at once.
	_, err := Choose([]Interface{eth}, []string{"a", "eth1", "b"}, true)
	if err == nil || !strings.Contains(err.Error(), "choose interface a") || !strings.Contains(err.Error(), "choose interface b") {
		t.Errorf("Choose = %v; want both faults", err)
	}
}

func TestDHCPClientTraces(t *testing.T) {
	i := nic("eth0", nil)
	for file, want := range map[string]string{
		"run/systemd/netif/leases/2":                      "systemd-networkd",
		"run/systemd/netif/leases/3":                      "",
		"var/lib/NetworkManager/internal-0a1b-eth0.lease": "NetworkManager",
		"run/udhcpc.eth0.pid":                             "udhcpc",
		"run/dhcpcd/eth0-4.pid":                           "dhcpcd",
		"var/lib/dhcp/dhclient.eth0.leases":               "dhclient",
		"var/lib/dhcp/dhclient.leases":                    "dhclient",
		"var/lib/NetworkManager/internal-0a1b-eth1.lease": "",
	} {
		root := t.TempDir()
		path := filepath.Join(root, file)
		os.MkdirAll(filepath.Dir(path), 0o755)
		text := "lease {\n  interface \"eth0\";\n  fixed-address 10.77.0.1;\n}\n"
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := dhcpClient(root, i); got != want {
			t.Errorf("%s: client %q; want %q", file, got, want)
		}
	}
	// An old lease file of an interface that has a static address now.
	root := t.TempDir()
	os.MkdirAll(filepath.Join(root, "var/lib/dhcp"), 0o755)
	os.WriteFile(filepath.Join(root, "var/lib/dhcp/dhclient.leases"), []byte("interface \"eth0\";\nfixed-address 192.168.1.5;\n"), 0o644)
	if got := dhcpClient(root, i); got != "" {
		t.Errorf("an old lease file counts: %q", got)
	}
}

func TestParseSocket(t *testing.T) {
	for _, tt := range []struct {
		line, proto, want string
	}{
		{"  12: 00000000:0043 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4711 2 0000 0", "udp", "0.0.0.0:67 4711"},
		{"   0: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 99 1 0000", "tcp", "127.0.0.1:80 99"},
		{"   0: 0100007F:0050 0100007F:1234 01 00000000:00000000 00:00000000 00000000     0        0 99 1 0000", "tcp", ""},
		{"   1: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 5 1", "tcp", "[::]:80 5"},
		{"   1: 0000000000000000FFFF000001004D0A:0050 00000000000000000000000000000000:0000 0A 0:0 00:0 0 0 0 5 1", "tcp", "10.77.0.1:80 5"},
		{"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode", "udp", ""},
		{"", "udp", ""},
		{"0: zz:zz x 07 a b c d e f", "udp", ""},
	} {
		got := ""
		if s, ok := parseSocket(tt.line, tt.proto); ok {
			got = fmt.Sprintf("%s %s", netip.AddrPortFrom(s.addr, uint16(s.port)), s.inode)
		}
		if got != tt.want {
			t.Errorf("parseSocket(%.40q) = %q; want %q", tt.line, got, tt.want)
		}
	}
}

// The user learns which process is in the way, for all ports at once.
func TestTaken(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	u, err := net.ListenPacket("udp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	tcp, udp := l.Addr().(*net.TCPAddr).Port, u.LocalAddr().(*net.UDPAddr).Port
	me := fmt.Sprintf("process %d", os.Getpid())
	lo := []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	other := []netip.Addr{netip.MustParseAddr("127.0.0.2")}

	err = Taken("/proc", []Port{
		{Proto: "tcp", Number: tcp, For: "HTTP", Flag: "--http-port", Addrs: lo},
		{Proto: "udp", Number: udp, For: "TFTP", Addrs: other},
	})
	if fault.KindOf(err) != fault.Environment || strings.Count(err.Error(), me) != 2 || !strings.Contains(err.Error(), "--http-port") {
		t.Errorf("Taken = %v; want both ports and %s", err, me)
	}
	if err := Taken("/proc", []Port{{Proto: "tcp", Number: tcp, Addrs: other}, {Proto: "udp", Number: tcp}}); err != nil {
		t.Errorf("Taken = %v; a socket at another address or of another protocol is not in the way", err)
	}
}

func TestCapabilities(t *testing.T) {
	proc := func(caps string, start string) string {
		root := t.TempDir()
		for name, text := range map[string]string{"self/status": "Name:\tx\nCapEff:\t" + caps + "\n", "sys/net/ipv4/ip_unprivileged_port_start": start + "\n"} {
			os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o755)
			os.WriteFile(filepath.Join(root, name), []byte(text), 0o644)
		}
		return root
	}
	low := []Port{{Number: 80}}
	for _, tt := range []struct {
		name, caps, start string
		dhcp              bool
		ports             []Port
		want              string
	}{
		{"root", "000001ffffffffff", "1024", true, low, ""},
		{"nobody", "0000000000000000", "1024", true, low, "CAP_NET_BIND_SERVICE and CAP_NET_RAW"},
		{"only ports", "0000000000000400", "1024", true, low, "CAP_NET_RAW"},
		{"no DHCP", "0000000000000400", "1024", false, low, ""},
		{"high ports", "0000000000000000", "1024", false, []Port{{Number: 8080}}, ""},
		{"a host that gives low ports to all", "0000000000000000", "0", false, low, ""},
	} {
		err := Capabilities(proc(tt.caps, tt.start), tt.dhcp, tt.ports)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), "lacks "+tt.want)) {
			t.Errorf("%s: Capabilities = %v; want %q", tt.name, err, tt.want)
		}
	}
}

func TestList(t *testing.T) {
	all, err := List("/")
	if err != nil {
		t.Skipf("no netlink here: %v", err)
	}
	for _, i := range all {
		if i.Name == "lo" && i.Loopback {
			return
		}
	}
	t.Errorf("no loopback in %+v", all)
}
