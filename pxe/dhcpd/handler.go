package dhcpd

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
	"mosimg/pxe/trace"
)

// Handler answers DHCP messages on one interface. It does no I/O but Save and
// Log, so that tests drive it with packets and a clock.
type Handler struct {
	// Table has the leases.
	Table *Table
	// Decide says what the machine with this MAC boots.
	Decide func(mac string, f decision.Facts) decision.Answer
	// Save makes a lease durable; a client hears of it only afterwards.
	Save func(Lease) error
	// Log may be nil.
	Log *slog.Logger
}

// Ports of DHCP.
const (
	serverPort = 67
	clientPort = 68
)

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// Handle is the answer to a message and where to send it; nil is silence.
func (h *Handler) Handle(now time.Time, req *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, netip.AddrPort) {
	if req.OpCode != dhcpv4.OpcodeBootRequest || len(req.ClientHWAddr) != 6 || req.ClientHWAddr[0]&1 != 0 ||
		[6]byte(req.ClientHWAddr) == ([6]byte{}) {
		return nil, netip.AddrPort{}
	}
	if g := addrOf(req.GatewayIPAddr); isSet(g) && !h.Table.net.Subnet.Contains(g) {
		h.log().Warn("dhcp: relayed request from a network that is not served", "relay", g, "mac", req.ClientHWAddr.String())
		return nil, netip.AddrPort{}
	}
	var reply *dhcpv4.DHCPv4
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		reply = h.discover(now, req)
	case dhcpv4.MessageTypeRequest:
		reply = h.request(now, req)
	case dhcpv4.MessageTypeInform:
		reply = h.inform(req)
	case dhcpv4.MessageTypeDecline:
		h.decline(now, req)
	case dhcpv4.MessageTypeRelease:
		h.release(now, req)
	}
	if reply == nil {
		return nil, netip.AddrPort{}
	}
	return reply, destination(req, reply)
}

// destination is where a reply goes (RFC 2131 section 4.1). A client without
// an address is reached by broadcast even if it could take unicast: that needs
// no ARP entry for an address that nobody answers for yet.
func destination(req, reply *dhcpv4.DHCPv4) netip.AddrPort {
	giaddr, ciaddr := addrOf(req.GatewayIPAddr), addrOf(req.ClientIPAddr)
	switch {
	case isSet(giaddr):
		return netip.AddrPortFrom(giaddr, serverPort)
	case reply.MessageType() == dhcpv4.MessageTypeNak:
		return netip.AddrPortFrom(broadcast, clientPort)
	case isSet(ciaddr):
		return netip.AddrPortFrom(ciaddr, clientPort)
	}
	return netip.AddrPortFrom(broadcast, clientPort)
}

func (h *Handler) discover(now time.Time, req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	mac := req.ClientHWAddr.String()
	facts := factsOf(req)
	trace.Event(h.log(), trace.Discover, mac, "vendor", facts.Vendor, "arch", facts.Arch, "ipxe", facts.IPXE)
	addr, err := h.Table.Offer(now, mac, addrOf(req.RequestedIPAddress()))
	if err != nil {
		var full ErrExhausted
		if errors.As(err, &full) {
			h.log().Warn("dhcp: no offer", "mac", mac, "error", err.Error(), "hint", "make the pool larger in cluster.yaml")
		}
		return nil
	}
	answer := h.Decide(mac, facts)
	reply := h.reply(req, dhcpv4.MessageTypeOffer, addr, &answer)
	trace.Event(h.log(), trace.Offer, mac, "address", addr, "boot", bootText(answer))
	return reply
}

func (h *Handler) request(now time.Time, req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	mac := req.ClientHWAddr.String()
	wish, ciaddr, server := addrOf(req.RequestedIPAddress()), addrOf(req.ClientIPAddr), addrOf(req.ServerIdentifier())
	if isSet(server) && server != h.Table.net.Server {
		// It took another server's offer.
		h.Table.Withdraw(mac)
		return nil
	}
	if !isSet(wish) {
		wish = ciaddr // renewing or rebinding
	}
	if !isSet(wish) {
		return nil
	}
	reason, err := h.Table.Commit(now, mac, wish, h.Save)
	switch {
	case err != nil:
		h.log().Error("dhcp: no answer, the lease could not be stored", "mac", mac, "address", wish, "error", err.Error())
		return nil
	case reason != "":
		h.log().Info("dhcp: wrong request", "mac", mac, "address", wish, "reason", reason)
		return h.nak(req, reason)
	}
	answer := h.Decide(mac, factsOf(req))
	trace.Event(h.log(), trace.Lease, mac, "address", wish, "boot", bootText(answer))
	return h.reply(req, dhcpv4.MessageTypeAck, wish, &answer)
}

// inform answers a client that has an address by other means.
func (h *Handler) inform(req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	if !isSet(addrOf(req.ClientIPAddr)) {
		return nil
	}
	answer := h.Decide(req.ClientHWAddr.String(), factsOf(req))
	return h.reply(req, dhcpv4.MessageTypeAck, netip.Addr{}, &answer)
}

func (h *Handler) decline(now time.Time, req *dhcpv4.DHCPv4) {
	mac, addr := req.ClientHWAddr.String(), addrOf(req.RequestedIPAddress())
	if h.forUs(req) && h.Table.Decline(now, mac, addr) {
		h.log().Warn("dhcp: address is in use by a machine that did not ask for it", "address", addr, "told by", mac, "left alone for", quarantine)
	}
}

func (h *Handler) release(now time.Time, req *dhcpv4.DHCPv4) {
	if !h.forUs(req) {
		return
	}
	mac, addr := req.ClientHWAddr.String(), addrOf(req.ClientIPAddr)
	if err := h.Table.Release(now, mac, addr, h.Save); err != nil {
		h.log().Error("dhcp: release could not be stored", "mac", mac, "address", addr, "error", err.Error())
	}
}

func (h *Handler) forUs(req *dhcpv4.DHCPv4) bool {
	s := addrOf(req.ServerIdentifier())
	return !isSet(s) || s == h.Table.net.Server
}

// reply builds an offer or an acknowledgement. Both carry the same boot data:
// some ROMs read it from the one, some from the other.
func (h *Handler) reply(req *dhcpv4.DHCPv4, t dhcpv4.MessageType, addr netip.Addr, a *decision.Answer) *dhcpv4.DHCPv4 {
	n := &h.Table.net
	reply := h.base(req, t)
	if addr.IsValid() {
		reply.YourIPAddr = ip(addr)
		life := n.leaseTime()
		reply.UpdateOption(dhcpv4.OptIPAddressLeaseTime(life))
		reply.UpdateOption(dhcpv4.OptRenewTimeValue(life / 2))
		reply.UpdateOption(dhcpv4.OptRebindingTimeValue(life * 7 / 8))
	}
	reply.ClientIPAddr = req.ClientIPAddr
	if t == dhcpv4.MessageTypeOffer {
		reply.ClientIPAddr = net.IPv4zero
	}
	reply.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(n.Subnet.Bits(), 32)))
	reply.UpdateOption(dhcpv4.OptBroadcastAddress(ip(lastAddr(n.Subnet))))
	if n.Router.IsValid() {
		reply.UpdateOption(dhcpv4.OptRouter(ip(n.Router)))
	}
	if len(n.DNS) > 0 {
		var dns []net.IP
		for _, d := range n.DNS {
			dns = append(dns, ip(d))
		}
		reply.UpdateOption(dhcpv4.OptDNS(dns...))
	}
	bootOptions(reply, n.Server, a)
	return reply
}

// bootOptions puts the boot decision into header fields and options: EDK2
// reads siaddr and option 67, U-Boot only the header, some others only the
// options. Names end with a zero byte because ROMs print and use what follows.
func bootOptions(reply *dhcpv4.DHCPv4, server netip.Addr, a *decision.Answer) {
	if a.File == "" {
		return
	}
	reply.ServerIPAddr = ip(server)
	if len(a.File) < 128 {
		reply.BootFileName = a.File
	}
	reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionBootfileName, []byte(a.File+"\x00")))
	reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionTFTPServerName, []byte(server.String()+"\x00")))
	if a.Vendor != "" {
		reply.UpdateOption(dhcpv4.OptClassIdentifier(a.Vendor))
	}
	if a.NoProxy {
		const noPXEDHCP = 176
		reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.GenericOptionCode(optIPXE), []byte{noPXEDHCP, 1, 1}))
	}
}

func (h *Handler) nak(req *dhcpv4.DHCPv4, reason string) *dhcpv4.DHCPv4 {
	reply := h.base(req, dhcpv4.MessageTypeNak)
	reply.UpdateOption(dhcpv4.OptMessage(reason))
	if isSet(addrOf(req.GatewayIPAddr)) {
		// The client may not be reachable by the address it has: the relay
		// must broadcast (RFC 2131 section 4.3.2).
		reply.SetBroadcast()
	}
	return reply
}

// base has what every reply echoes.
func (h *Handler) base(req *dhcpv4.DHCPv4, t dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	// NewReplyFromRequest fails only on a nil request.
	reply, err := dhcpv4.NewReplyFromRequest(req,
		dhcpv4.WithMessageType(t),
		dhcpv4.WithServerIP(net.IPv4zero),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(ip(h.Table.net.Server))),
	)
	if err != nil {
		panic(err)
	}
	// PXE wants its machine id back: 17 bytes, the first is 0 (RFC 4578).
	if id := req.Options.Get(dhcpv4.OptionClientMachineIdentifier); len(id) == 17 && id[0] == 0 {
		reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientMachineIdentifier, id))
	}
	return reply
}

func bootText(a decision.Answer) string {
	switch a.Kind {
	case decision.Plain:
		return "no netboot"
	case decision.Refused:
		return "refused: " + a.Reason
	}
	return a.File
}

func (h *Handler) log() *slog.Logger {
	if h.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return h.Log
}

func isSet(a netip.Addr) bool { return a.IsValid() && !a.IsUnspecified() }

func addrOf(x net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(x.To4())
	if !ok {
		return netip.Addr{}
	}
	return a
}

func ip(a netip.Addr) net.IP { return net.IP(a.AsSlice()) }

// lastAddr is the broadcast address of a subnet.
func lastAddr(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(a)
}

// String names a table by its pool, for logs.
func (n Network) String() string {
	return fmt.Sprintf("%s pool %s-%s", n.Subnet, n.First, n.Last)
}
