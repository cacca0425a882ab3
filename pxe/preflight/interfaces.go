// Package preflight finds out, before anything is bound, whether a head may
// and can run on this machine: which interface to serve, who has the ports,
// what the process may do. A DHCP server on the wrong wire breaks other
// people's network, so in doubt it refuses and says how to insist.
package preflight

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Interface is what matters of a network interface.
type Interface struct {
	Name  string
	Index int
	MAC   net.HardwareAddr
	MTU   int
	// Kind is the kernel's word: "device" for hardware (and virtio), else
	// bridge, veth, tun, dummy, vlan ...
	Kind                   string
	Up, Loopback, Wireless bool
	Ethernet               bool
	Addrs                  []Addr
	// Client says which DHCP client manages the interface; "" for none.
	Client string
	// Uplink is set when the way to other networks is through it: somebody
	// else runs that network, a DHCP server of ours may not be welcome.
	Uplink bool
}

// Addr is an IPv4 address of an interface.
type Addr struct {
	Prefix netip.Prefix
	// Dynamic addresses expire: a DHCP client set them.
	Dynamic bool
}

// List reads the machine's interfaces. root is "/" but in tests.
func List(root string) ([]Interface, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	uplinks := make(map[int]bool)
	for _, r := range routes {
		if r.Gw != nil && (r.Dst == nil || r.Dst.IP.IsUnspecified()) {
			uplinks[r.LinkIndex] = true
		}
	}
	var out []Interface
	for _, l := range links {
		a := l.Attrs()
		i := Interface{
			Name: a.Name, Index: a.Index, MAC: a.HardwareAddr, MTU: a.MTU, Kind: l.Type(),
			Up: a.Flags&net.FlagUp != 0, Loopback: a.Flags&net.FlagLoopback != 0,
			Ethernet: a.EncapType == "ether" && len(a.HardwareAddr) == 6,
			Wireless: wireless(root, a.Name),
			Uplink:   uplinks[a.Index],
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_V4)
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", a.Name, err)
		}
		for _, x := range addrs {
			ip, ok := netip.AddrFromSlice(x.IP.To4())
			ones, _ := x.Mask.Size()
			if !ok || ip.IsLinkLocalUnicast() {
				continue
			}
			i.Addrs = append(i.Addrs, Addr{
				Prefix:  netip.PrefixFrom(ip, ones),
				Dynamic: x.Flags&unix.IFA_F_PERMANENT == 0,
			})
		}
		i.Client = dhcpClient(root, i)
		out = append(out, i)
	}
	return out, nil
}

func wireless(root, name string) bool {
	for _, f := range []string{"wireless", "phy80211"} {
		if _, err := os.Stat(filepath.Join(root, "sys/class/net", name, f)); err == nil {
			return true
		}
	}
	return false
}

// dhcpClient looks for the traces that DHCP clients leave. Some of them set
// addresses without a lifetime, so the address alone does not tell.
func dhcpClient(root string, i Interface) string {
	exists := func(parts ...string) bool {
		m, _ := filepath.Glob(filepath.Join(append([]string{root}, parts...)...))
		return len(m) > 0
	}
	index := strconv.Itoa(i.Index)
	switch {
	case exists("run/systemd/netif/leases", index):
		return "systemd-networkd"
	case exists("var/lib/NetworkManager", "internal-*-"+i.Name+".lease"), exists("var/lib/NetworkManager", "dhclient-*-"+i.Name+".lease"):
		return "NetworkManager"
	case exists("run/dhcpcd", i.Name+"*.pid"), exists("run", "dhcpcd-"+i.Name+"*.pid"):
		return "dhcpcd"
	case exists("run", "udhcpc."+i.Name+".pid"), exists("run", "udhcpc-"+i.Name+".pid"):
		return "udhcpc"
	}
	files, _ := filepath.Glob(filepath.Join(root, "var/lib/dhcp/dhclient*.leases"))
	more, _ := filepath.Glob(filepath.Join(root, "var/lib/dhclient/*.leases"))
	for _, f := range append(files, more...) {
		data, err := os.ReadFile(f)
		if err != nil || !strings.Contains(string(data), `interface "`+i.Name+`"`) {
			continue
		}
		// An old lease file proves nothing: the address must be from it.
		for _, a := range i.Addrs {
			if strings.Contains(string(data), "fixed-address "+a.Prefix.Addr().String()+";") {
				return "dhclient"
			}
		}
	}
	return ""
}

// byDHCP tells whether an interface got its address by DHCP, and how we know.
func (i Interface) byDHCP() (string, bool) {
	if len(i.Addrs) == 0 {
		return "", false
	}
	if i.Client != "" {
		return "by " + i.Client, true
	}
	if a := i.Addrs[0]; a.Dynamic {
		return "it expires", true
	}
	return "", false
}

// Choice is an interface to serve and the address to serve it from.
type Choice struct {
	Interface
	Server netip.Prefix
	// Warning is worth telling although the choice stands.
	Warning string
}

// Choose picks the interfaces to serve. Those named (by name or MAC) are taken
// if they can be served at all; without names every wired one with a static
// address is. With dhcp false no addresses will be given out, so that the
// interface's own may come from anywhere. All faults come at once.
func Choose(all []Interface, named []string, dhcp bool) ([]Choice, error) {
	if len(named) == 0 {
		return unasked(all, dhcp)
	}
	var out []Choice
	var l fault.List
	for _, name := range named {
		i, err := byName(all, name)
		if err == nil {
			if f := servable(i); f != nil {
				err = f
			}
		}
		if err != nil {
			l.Add(err)
			continue
		}
		if slices.ContainsFunc(out, func(c Choice) bool { return c.Name == i.Name }) {
			continue
		}
		c := Choice{Interface: i, Server: i.Addrs[0].Prefix}
		if how, dyn := i.byDHCP(); dyn && dhcp {
			c.Warning = fmt.Sprintf("%s got its own address by DHCP (%s): another DHCP server may be on this network", i.Name, how)
		}
		out = append(out, c)
	}
	return out, l.All("choose interfaces", "")
}

func byName(all []Interface, name string) (Interface, error) {
	mac, _ := net.ParseMAC(name)
	var names []string
	for _, i := range all {
		if i.Name == name || len(mac) == 6 && i.MAC.String() == mac.String() {
			return i, nil
		}
		names = append(names, i.Name)
	}
	return Interface{}, fault.New(fault.Usage, "choose interface", name, "there is no such interface", "there are "+strings.Join(names, ", "))
}

// servable tells why an interface cannot be served even if it is named.
func servable(i Interface) *fault.Error {
	bad := func(cause, hint string) *fault.Error {
		return fault.New(fault.Environment, "serve interface", i.Name, cause, hint)
	}
	switch {
	case i.Loopback:
		return bad("it is the loopback interface", "name one with a cable")
	case !i.Ethernet:
		return bad("it is not an Ethernet interface", "name one that is")
	case !i.Up:
		return bad("it is down", "ip link set "+i.Name+" up")
	case len(i.Addrs) == 0:
		return bad("it has no IPv4 address", "ip addr add 10.77.0.1/24 dev "+i.Name)
	}
	return nil
}

// unasked are the interfaces that may be served without being named: wired ones
// that lead nowhere else and whose addresses a person set.
func unasked(all []Interface, dhcp bool) ([]Choice, error) {
	var fit []Choice
	var why []string
	for _, i := range all {
		how, dyn := i.byDHCP()
		switch {
		case i.Loopback:
		case i.Kind != "device":
			why = append(why, i.Name+" is a "+i.Kind)
		case i.Wireless:
			why = append(why, i.Name+" is wireless")
		case servable(i) != nil:
			why = append(why, i.Name+": "+servable(i).Err.Error())
		case dyn && dhcp:
			why = append(why, fmt.Sprintf("%s got its own address by DHCP (%s)", i.Name, how))
		case i.Uplink && dhcp:
			why = append(why, i.Name+" is this machine's way to other networks")
		default:
			fit = append(fit, Choice{Interface: i, Server: i.Addrs[0].Prefix})
		}
	}
	if len(fit) > 0 {
		return fit, nil
	}
	cause := "this machine has no wired interface with a static address"
	if len(why) > 0 {
		cause += ": " + strings.Join(why, "; ")
	}
	return nil, fault.New(fault.Environment, "choose interface", "", cause,
		"give one a static address, or name it with --interface: on a network that has a DHCP server the head then only adds what to boot")
}
