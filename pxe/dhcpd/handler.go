package dhcpd

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
	"mosimg/pxe/trace"
)

// Handler answers DHCP messages on one interface. It does no I/O but through
// its functions, so that tests drive it with packets and a clock. Its methods
// may be called concurrently.
type Handler struct {
	// Table has the leases.
	Table *Table
	// Mode is who leases the addresses now; nil means the head, always.
	Mode func() decision.Mode
	// Decide says what a machine boots.
	Decide func(mac string, f decision.Facts, m decision.Mode) decision.Answer
	// Save makes a lease durable; a client hears of it only afterwards.
	Save func(Lease) error
	// InUse tells which other machine uses an address, "" for none; it may
	// take a moment. nil means that nobody looks.
	InUse func(ctx context.Context, mac string, a netip.Addr) string
	// Stranger tells of a machine that nobody knows yet: it gets a short
	// lease. nil means that there are none.
	Stranger func(mac string) bool
	// Rival is told when a client takes the offer of another server; it must
	// not block. It may be nil.
	Rival func(server netip.Addr)
	// Log may be nil.
	Log *slog.Logger

	pool   poolWatch
	full   rarely
	served served
}

// Ports of DHCP.
const (
	serverPort = 67
	clientPort = 68
)

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// Handle is the answer to a message on port 67 and where to send it; nil is
// silence.
func (h *Handler) Handle(ctx context.Context, now time.Time, req *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, netip.AddrPort) {
	if !h.sane(req) {
		return nil, netip.AddrPort{}
	}
	if s := addrOf(req.ServerIdentifier()); h.Rival != nil && req.MessageType() == dhcpv4.MessageTypeRequest && isSet(s) && s != h.Table.net.Server {
		h.Rival(s)
	}
	mode := decision.Server
	if h.Mode != nil {
		mode = h.Mode()
	}
	var reply *dhcpv4.DHCPv4
	if mode == decision.Proxy {
		reply = h.beside(now, req)
	} else {
		reply = h.serve(ctx, now, req)
	}
	if reply == nil {
		return nil, netip.AddrPort{}
	}
	return reply, destination(req, reply)
}

// sane tells whether a message is a client's on Ethernet.
func (h *Handler) sane(req *dhcpv4.DHCPv4) bool {
	return req.OpCode == dhcpv4.OpcodeBootRequest && len(req.ClientHWAddr) == 6 && req.ClientHWAddr[0]&1 == 0 &&
		[6]byte(req.ClientHWAddr) != [6]byte{}
}

// serve answers where the head leases the addresses.
func (h *Handler) serve(ctx context.Context, now time.Time, req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	if g := addrOf(req.GatewayIPAddr); isSet(g) && !h.Table.net.Subnet.Contains(g) {
		h.log().Warn("dhcp: relayed request from a network that is not served", "relay", g, "mac", req.ClientHWAddr.String())
		return nil
	}
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return h.discover(ctx, now, req)
	case dhcpv4.MessageTypeRequest:
		return h.request(now, req)
	case dhcpv4.MessageTypeInform:
		return h.inform(req)
	case dhcpv4.MessageTypeDecline:
		h.decline(now, req)
	case dhcpv4.MessageTypeRelease:
		h.release(now, req)
	}
	return nil
}

// beside answers where another server leases them. Relays of any network are
// welcome: a boot file's URL is good everywhere.
func (h *Handler) beside(now time.Time, req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	switch req.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		return h.proxyOffer(req)
	case dhcpv4.MessageTypeRequest:
		return h.renewal(now, req)
	case dhcpv4.MessageTypeDecline:
		h.decline(now, req)
	case dhcpv4.MessageTypeRelease:
		h.release(now, req)
	}
	return nil
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

func (h *Handler) discover(ctx context.Context, now time.Time, req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	mac := req.ClientHWAddr.String()
	facts := factsOf(req)
	addr, err := h.vacant(ctx, now, mac, addrOf(req.RequestedIPAddress()))
	if err != nil {
		// Not a line for each packet: a flood must not fill the disk.
		if more, ok := h.full.due(now); ok {
			h.log().Warn("dhcp: no offer", "mac", mac, "error", err.Error(), "more", more, "hint", "make the pool larger in cluster.yaml")
		}
		return nil
	}
	trace.Event(h.log(), trace.Discover, mac, "vendor", facts.Vendor, "arch", facts.Arch, "ipxe", facts.IPXE)
	answer := h.Decide(mac, facts, decision.Server)
	reply := h.reply(req, dhcpv4.MessageTypeOffer, addr, h.life(mac), &answer)
	trace.Event(h.log(), trace.Offer, mac, "address", addr, "boot", bootText(answer))
	return reply
}

// vacant holds an address for a machine that nobody else uses. It gives up
// after some tries, and the client asks again.
func (h *Handler) vacant(ctx context.Context, now time.Time, mac string, wish netip.Addr) (netip.Addr, error) {
	const tries = 4
	for range tries {
		addr, vacant, err := h.Table.Offer(now, mac, wish)
		if err != nil || vacant || h.InUse == nil {
			return addr, err
		}
		other := h.InUse(ctx, mac, addr)
		if other == "" {
			h.Table.Vacant(mac, addr)
			return addr, nil
		}
		h.Table.Occupied(now, addr)
		h.log().Warn("dhcp: an address of the pool is in use by a machine that did not ask for it", "address", addr, "by", other,
			"left alone for", quarantine, "hint", "give that machine an address outside the pool, or reserve it in cluster.yaml")
	}
	return netip.Addr{}, fmt.Errorf("%d addresses in a row are in use by machines that did not ask for them", tries)
}

// life is how long a machine may have its address.
func (h *Handler) life(mac string) time.Duration {
	full := h.Table.net.leaseTime()
	if _, reserved := h.Table.net.Reserved[mac]; !reserved && h.Stranger != nil && h.Stranger(mac) {
		return min(full, StrangerLeaseTime)
	}
	return full
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
	life := h.life(mac)
	verdict, reason, err := h.Table.Commit(now, mac, wish, life, isSet(server), h.Save)
	switch {
	case err != nil:
		h.log().Error("dhcp: no answer, the lease could not be stored", "mac", mac, "address", wish, "error", err.Error())
		return nil
	case verdict == NotOurs:
		return nil
	case verdict == Wrong:
		h.log().Info("dhcp: wrong request", "mac", mac, "address", wish, "reason", reason)
		return h.nak(req, reason)
	}
	if c, low := h.pool.leased(now, h.Table); low {
		h.log().Warn("dhcp: the pool is nearly used up", "network", h.Table.net.String(), "pool", c.String(), "free", c.free(),
			"hint", "make the pool larger in cluster.yaml before machines are turned away")
	}
	answer := h.Decide(mac, factsOf(req), decision.Server)
	trace.Event(h.log(), trace.Lease, mac, "address", wish, "boot", bootText(answer))
	return h.reply(req, dhcpv4.MessageTypeAck, wish, life, &answer)
}

// inform answers a client that has an address by other means.
func (h *Handler) inform(req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	if !isSet(addrOf(req.ClientIPAddr)) {
		return nil
	}
	answer := h.Decide(req.ClientHWAddr.String(), factsOf(req), decision.Server)
	return h.reply(req, dhcpv4.MessageTypeAck, netip.Addr{}, 0, &answer)
}

func (h *Handler) decline(now time.Time, req *dhcpv4.DHCPv4) {
	mac, addr := req.ClientHWAddr.String(), addrOf(req.RequestedIPAddress())
	if !h.forUs(req) {
		return
	}
	quarantined, err := h.Table.Decline(now, mac, addr, h.Save)
	if err != nil {
		h.log().Error("dhcp: decline could not be stored", "mac", mac, "address", addr, "error", err.Error())
	}
	if quarantined {
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
func (h *Handler) reply(req *dhcpv4.DHCPv4, t dhcpv4.MessageType, addr netip.Addr, life time.Duration, a *decision.Answer) *dhcpv4.DHCPv4 {
	n := &h.Table.net
	reply := h.base(req, t)
	if addr.IsValid() {
		reply.YourIPAddr = ip(addr)
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
	case decision.Local:
		return "its own disk: nobody asked this machine to join"
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
