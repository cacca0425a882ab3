package pxe

import (
	"fmt"
	"log/slog"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"

	"mosimg/pxe/clusterconfig"
	"mosimg/pxe/decision"
	"mosimg/pxe/dhcpd"
	"mosimg/pxe/preflight"
)

// network is one served interface.
type network struct {
	preflight.Choice
	conf clusterconfig.Network
	log  *slog.Logger

	// Set by Head.Run.
	dhcp *dhcpd.Handler // nil when DHCP is off
	// proxy: another server leases the addresses. Once set it stays.
	proxy atomic.Bool
	// rivals has a DHCP server that a client was heard to prefer.
	rivals chan netip.Addr
}

func (n *network) addr() netip.Addr { return n.Server.Addr() }

func (n *network) mode() decision.Mode {
	if n.proxy.Load() {
		return decision.Proxy
	}
	return decision.Server
}

// holder is the machine at an address: by its lease, or, where another server
// leases, by the kernel's neighbour table; "" when neither knows.
func (n *network) holder(a netip.Addr) string {
	if n.dhcp == nil {
		return ""
	}
	if mac := n.dhcp.Table.Holder(time.Now(), a); mac != "" || n.mode() == decision.Server {
		return mac
	}
	neighbours, err := netlink.NeighList(n.Index, netlink.FAMILY_V4)
	if err != nil {
		return ""
	}
	for _, x := range neighbours {
		if ip, ok := netip.AddrFromSlice(x.IP.To4()); ok && ip == a && len(x.HardwareAddr) == 6 {
			return x.HardwareAddr.String()
		}
	}
	return ""
}

// boots tells whether a machine boots from this head: it has an address of
// ours, or was told what to boot.
func (n *network) boots(mac string) bool {
	return n.dhcp.Table.Knows(time.Now(), mac) || n.dhcp.Served(mac)
}

// String is the network as the head tells of it when it starts.
func (n *network) String() string {
	text := fmt.Sprintf("%s %s", n.Name, n.Server)
	switch {
	case n.dhcp == nil:
		return text
	case n.mode() == decision.Proxy:
		return text + " beside another DHCP server (proxy)"
	}
	return fmt.Sprintf("%s pool %s-%s", text, n.conf.First, n.conf.Last)
}
