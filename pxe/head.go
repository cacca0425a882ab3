// Package pxe is a cluster's head: it serves the boot of diskless machines
// (DHCP, TFTP, HTTP), keeps the registry of nodes and the cluster's authority,
// and decides with the operator who is a member. The parts are in the packages
// below this one; here they are put together.
//
// On each network the head gives out the addresses itself, or adds what to boot
// beside another DHCP server (proxy mode). Limits: IPv4 Ethernet; one head.
package pxe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"

	"mosimg/internal/bootargs"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/pxe/clusterconfig"
	"mosimg/pxe/decision"
	"mosimg/pxe/dhcpd"
	"mosimg/pxe/enrol"
	"mosimg/pxe/httpd"
	"mosimg/pxe/images"
	"mosimg/pxe/preflight"
	"mosimg/pxe/registry"
)

// Head is a head that was checked and can be run.
type Head struct {
	cfg     Config
	cluster *clusterconfig.Config
	nets    []*network
	images  *images.Store

	// Set by Run.
	store *registry.Store
	enrol *enrol.Service
}

// New checks a configuration and the machine. Nothing is bound, written or
// sent. Faults of one kind come all at once.
func New(cfg Config) (*Head, error) {
	// 1. What the user wrote.
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	h := &Head{cfg: cfg, cluster: new(clusterconfig.Config)}
	if cfg.ConfigFile != "" {
		c, err := clusterconfig.Load(cfg.ConfigFile)
		if err != nil {
			return nil, err
		}
		h.cluster = c
	}
	// 2. The interfaces, and what is served on them.
	if err := h.chooseNetworks(); err != nil {
		return nil, err
	}
	// 3. What this machine has and lacks.
	var l fault.List
	ports := h.ports()
	l.Add(preflight.Capabilities("/proc", h.cfg.DHCP != DHCPOff, ports))
	l.Add(preflight.Taken("/proc", ports))
	var err error
	h.images, err = images.Open(h.cfg.Images, h.cfg.Log)
	l.Add(err)
	if err := l.All("start head", ""); err != nil {
		return nil, err
	}
	return h, nil
}

func (h *Head) chooseNetworks() error {
	all, err := preflight.List("/")
	if err != nil {
		return fault.New(fault.Environment, "start head", "", err, "")
	}
	named, byName, err := h.namedInterfaces(all)
	if err != nil {
		return err
	}
	choices, err := preflight.Choose(all, named, h.cfg.DHCP != DHCPOff)
	if err != nil {
		return err
	}
	var l fault.List
	for _, c := range choices {
		conf := byName[c.Name]
		if conf.Interface == "" {
			conf = byName[""]
		}
		conf.Interface = c.Name
		n := &network{Choice: c, log: h.cfg.Log, rivals: make(chan netip.Addr, 1)}
		if n.conf, err = h.cluster.Resolve(conf, c.Server); err != nil {
			l.Add(err)
		}
		h.nets = append(h.nets, n)
	}
	for i, n := range h.nets {
		for _, o := range h.nets[:i] {
			if n.conf.Subnet.Overlaps(o.conf.Subnet) {
				l.Addf("%s and %s are in the same network %s", o.Name, n.Name, n.conf.Subnet)
			}
		}
	}
	return l.All("start head", "")
}

// namedInterfaces joins the flags and cluster.yaml: which interfaces are
// named, and the settings of each ("" for one that the head finds).
func (h *Head) namedInterfaces(all []preflight.Interface) ([]string, map[string]clusterconfig.Network, error) {
	conf := map[string]clusterconfig.Network{}
	var inFile []string
	for _, n := range h.cluster.Networks {
		conf[n.Interface] = n
		if n.Interface != "" {
			inFile = append(inFile, n.Interface)
		}
	}
	if len(h.cfg.Interfaces) == 0 {
		return inFile, conf, nil
	}
	// A MAC in a flag is resolved here, since the file speaks of names.
	var named []string
	for _, name := range h.cfg.Interfaces {
		if mac, err := net.ParseMAC(name); err == nil {
			for _, i := range all {
				if i.MAC.String() == mac.String() {
					name = i.Name
				}
			}
		}
		named = append(named, name)
		if len(inFile) > 0 && !slices.Contains(inFile, name) {
			return nil, nil, fault.New(fault.Usage, "start head", "", fmt.Sprintf("--interface %s is not among the networks of %s: %v", name, h.cfg.ConfigFile, inFile), "add it there")
		}
	}
	return named, conf, nil
}

// ports are all that will be bound.
func (h *Head) ports() []preflight.Port {
	var addrs []netip.Addr
	for _, n := range h.nets {
		addrs = append(addrs, n.addr())
	}
	ports := []preflight.Port{
		{Proto: "udp", Number: h.cfg.TFTPPort, For: "TFTP", Flag: "--tftp-port", Addrs: addrs},
		{Proto: "tcp", Number: h.cfg.HTTPPort, For: "HTTP", Flag: "--http-port", Addrs: addrs},
		{Proto: "tcp", Number: h.cfg.APIPort, For: "head API", Flag: "--api-port", Addrs: addrs},
	}
	if h.cfg.DHCP != DHCPOff {
		for _, n := range h.nets {
			ports = append(ports,
				preflight.Port{Proto: "udp", Number: h.cfg.DHCPPort, For: "DHCP on " + n.Name, Device: n.Index, Hint: "or leave DHCP to it with --dhcp off"},
				preflight.Port{Proto: "udp", Number: bootPort, For: "PXE boot server on " + n.Name, Device: n.Index})
		}
	}
	return ports
}

// Run serves until ctx ends, and then stops cleanly. It returns an error when
// it could not start or a part of it failed.
func (h *Head) Run(ctx context.Context) (err error) {
	// 1. The registry: also the lock against a second head.
	h.store, err = registry.Open(h.cfg.State, registry.Options{Cluster: h.cluster.Cluster, Log: h.cfg.Log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.store.Close()) }()

	// 2. Is somebody else's DHCP server on the wire?
	if err := h.chooseModes(ctx); err != nil {
		if ctx.Err() != nil {
			return nil // told to stop before it began
		}
		return err
	}
	h.newEnrol()
	if h.cfg.DHCP != DHCPOff {
		if err := h.newDHCP(); err != nil {
			return err
		}
	}

	// 3. Bind all sockets, or none.
	services, err := h.bind(ctx)
	if err != nil {
		return err
	}

	// 4. Let the agent on this machine in, and open the window if asked.
	ticket := h.ticketFile()
	h.enrol.TicketUsed = func() {
		if err := h.writeTicket(ticket); err != nil {
			h.cfg.Log.Error("local ticket", "error", err.Error())
		}
	}
	err = h.writeTicket(ticket)
	if adopt := max(h.cfg.Adopt, 0); err == nil && (adopt > 0 || h.cluster.Adopt > 0) {
		err = h.enrol.Adopt(adoptFor(adopt, h.cluster.Adopt))
	}
	if err != nil {
		services.close()
		return err
	}
	defer removeTicket(ticket)

	// 5. Serve.
	if h.cfg.Started != nil {
		h.cfg.Started(h.info())
	}
	return services.run(ctx, h.cfg.Log)
}

// newDHCP makes the DHCP handlers, with the leases of the registry.
func (h *Head) newDHCP() error {
	var known []dhcpd.Lease
	err := h.store.View(func(tx *registry.Tx) error {
		for _, l := range tx.Leases() {
			if a, err := netip.ParseAddr(l.Address); err == nil {
				known = append(known, dhcpd.Lease{MAC: l.MAC, Addr: a, Expires: l.Expires})
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, n := range h.nets {
		reserved := map[string]netip.Addr{}
		for _, r := range n.conf.Reservations {
			if r.Address.IsValid() {
				reserved[r.MAC] = r.Address
			}
		}
		table := dhcpd.NewTable(dhcpd.Network{
			Server: n.addr(), Subnet: n.conf.Subnet, First: n.conf.First, Last: n.conf.Last,
			Reserved: reserved, Router: n.conf.Router, DNS: h.cluster.DNS, LeaseTime: n.conf.LeaseTime,
		}, known)
		n.dhcp = &dhcpd.Handler{
			Table: table, Mode: n.mode, Save: h.saveLease, Stranger: h.stranger, Log: h.cfg.Log,
			Decide: func(mac string, f decision.Facts, m decision.Mode) decision.Answer { return h.decide(n, mac, f, m) },
			Rival: func(server netip.Addr) {
				select {
				case n.rivals <- server:
				default: // a look is due already
				}
			},
		}
	}
	return nil
}

func (h *Head) saveLease(l dhcpd.Lease) error {
	return h.store.SaveLease(registry.Lease{MAC: l.MAC, Address: l.Addr.String(), Expires: l.Expires})
}

func (h *Head) newEnrol() {
	listed := map[string]bool{}
	for _, mac := range h.cluster.Approved {
		listed[mac] = true
	}
	h.enrol = &enrol.Service{
		Store: h.store, Prober: enrol.AgentProber{}, CheckSource: h.cfg.DHCP != DHCPOff,
		Listed: listed, Names: h.cluster.Names(), Log: h.cfg.Log,
		Offered: func(arch string) string {
			if set := h.images.Current()[arch]; set != nil {
				return set.Manifest.ID
			}
			return h.images.Pick().Manifest.ID
		},
	}
}

// decide is the boot decision for a machine on a network.
func (h *Head) decide(n *network, mac string, f decision.Facts, m decision.Mode) decision.Answer {
	url := h.cfg.httpURL(n.addr())
	return decision.Decide(f, decision.Head{
		Mode: m, Stranger: m == decision.Proxy && !h.expected(mac),
		Boot: h.images.Pick().Boot(), URL: url, Script: url + "/ipxe/" + mac,
	})
}

// expected tells whether a machine may join now. In doubt it may not: on
// somebody else's network a wrong yes takes a person's PC away.
func (h *Head) expected(mac string) bool {
	yes, err := h.enrol.Expected(mac)
	if err != nil {
		h.cfg.Log.Error("read the record of a machine", "mac", mac, "error", err.Error())
	}
	return yes
}

// stranger tells whether a machine's lease is to be short.
func (h *Head) stranger(mac string) bool {
	approved, err := h.enrol.Approved(mac)
	if err != nil {
		h.cfg.Log.Error("read the record of a machine", "mac", mac, "error", err.Error())
	}
	return !approved
}

// script makes a machine's iPXE script.
func (h *Head) script(_ context.Context, mac string, from netip.Addr) (string, error) {
	n := h.networkOf(from)
	proxy := n.mode() == decision.Proxy
	if n.dhcp != nil {
		// Where another server leases we may not know who has an address.
		if holder := n.holder(from); holder != mac && !(proxy && holder == "") {
			return "", fault.New(fault.Refused, "make a boot script", mac, fmt.Sprintf("%s is not the address of this machine", from), "")
		}
	}
	reason, err := h.enrol.Denied(mac)
	if err != nil {
		return "", err
	}
	if reason != "" {
		h.cfg.Log.Info("denied machine is sent to its own disk", "mac", mac, "reason", reason)
		return httpd.Local(reason), nil
	}
	if proxy && !h.expected(mac) {
		h.cfg.Log.Info("unknown machine is sent to its own disk", "mac", mac, "hint", "mosimg node approve --for 10m lets new machines in for a while")
		return httpd.Local("nobody asked it to (an adoption window lets new machines in)"), nil
	}
	if proxy {
		from = netip.Addr{} // that server may give iPXE and Linux different ones
	}
	nonce, err := h.enrol.IssueNonce(mac, from)
	if err != nil {
		return "", err
	}
	url := h.cfg.httpURL(n.addr())
	return httpd.Boot{
		Self: url + "/ipxe/" + mac, URL: url, Sets: h.images.Current(), KernelArgs: h.cluster.KernelArgs,
		Args: bootargs.Args{
			Head: h.cfg.apiURL(n.addr()), CA: identity.Pin(h.store.CA().Cert), Nonce: nonce, BootMAC: mac, Role: "node",
		},
	}.Text(), nil
}

// networkOf is the network that an address is in, or the first one.
func (h *Head) networkOf(a netip.Addr) *network {
	for _, n := range h.nets {
		if n.conf.Subnet.Contains(a) {
			return n
		}
	}
	return h.nets[0]
}

// macOf names the machine at an address, for the boot trace.
func (h *Head) macOf(a netip.Addr) string { return h.networkOf(a).holder(a) }

func (h *Head) info() Info {
	i := Info{CA: identity.Pin(h.store.CA().Cert), Images: map[string]string{}, DHCP: DHCPProxy,
		HTTP: h.cfg.httpURL(h.nets[0].addr()), API: h.cfg.apiURL(h.nets[0].addr())}
	if h.cfg.DHCP == DHCPOff {
		i.DHCP = DHCPOff
	}
	if err := h.store.View(func(tx *registry.Tx) error { i.Cluster = tx.ClusterName(); return nil }); err != nil {
		h.cfg.Log.Error("read the cluster's name", "error", err.Error())
	}
	for arch, set := range h.images.Current() {
		i.Images[arch] = set.Manifest.ID
	}
	for _, n := range h.nets {
		i.Networks = append(i.Networks, n.String())
		if i.DHCP != DHCPOff && n.mode() == decision.Server {
			i.DHCP = DHCPServer
		}
	}
	return i
}

func (h *Head) ticketFile() string { return filepath.Join(h.cfg.Run, "join.json") }
