package dhcpd

import (
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
	"mosimg/pxe/trace"
)

// Beside another DHCP server ("proxy DHCP", PXE 2.1 section 2.2.3) a client
// hears two offers: an address from the other one, and from us an offer without
// an address that says what to boot. It asks for the address there. BIOS ROMs
// and iPXE then boot; EDK2 asks us once more, on port 4011.

// proxyOffer answers a DISCOVER with boot data and no address.
func (h *Handler) proxyOffer(req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	mac := req.ClientHWAddr.String()
	facts := factsOf(req)
	answer := h.Decide(mac, facts, decision.Proxy)
	if answer.Kind == decision.Plain {
		return nil
	}
	trace.Event(h.log(), trace.Discover, mac, "vendor", facts.Vendor, "arch", facts.Arch, "ipxe", facts.IPXE, "mode", "proxy")
	trace.Event(h.log(), trace.Offer, mac, "boot", bootText(answer), "mode", "proxy")
	return h.proxyReply(req, dhcpv4.MessageTypeOffer, &answer)
}

// proxyReply is nil when there is nothing to boot: another server's client
// hears of us only what helps it.
func (h *Handler) proxyReply(req *dhcpv4.DHCPv4, t dhcpv4.MessageType, a *decision.Answer) *dhcpv4.DHCPv4 {
	if a.File == "" {
		return nil
	}
	h.served.add(req.ClientHWAddr.String())
	reply := h.base(req, t)
	if t == dhcpv4.MessageTypeAck {
		reply.ClientIPAddr = req.ClientIPAddr
	}
	bootOptions(reply, h.Table.net.Server, a)
	return reply
}

// renewal answers a machine that prolongs a lease of ours after we stepped down
// for another server: what was given is not taken back from a machine that
// works. New leases come from the other server only.
func (h *Handler) renewal(now time.Time, req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	mac, ciaddr := req.ClientHWAddr.String(), addrOf(req.ClientIPAddr)
	if !isSet(ciaddr) || isSet(addrOf(req.ServerIdentifier())) || h.Table.Holder(now, ciaddr) != mac {
		return nil
	}
	return h.request(now, req)
}

// HandleBoot is the answer to a message on port 4011, and where to send it: to
// where it came from. A client comes here after an offer with option 60 =
// "PXEClient", whichever server sent that, and waits until it times out.
func (h *Handler) HandleBoot(req *dhcpv4.DHCPv4, from netip.AddrPort) (*dhcpv4.DHCPv4, netip.AddrPort) {
	if !h.sane(req) {
		return nil, netip.AddrPort{}
	}
	switch req.MessageType() {
	case dhcpv4.MessageTypeRequest, dhcpv4.MessageTypeInform:
	default:
		return nil, netip.AddrPort{}
	}
	// Option 54 may be ours, the other server's, or absent: ROMs differ, and
	// the port says enough.
	mac := req.ClientHWAddr.String()
	answer := h.Decide(mac, factsOf(req), decision.Proxy)
	if answer.Kind == decision.Plain {
		return nil, netip.AddrPort{}
	}
	trace.Event(h.log(), trace.BootServer, mac, "boot", bootText(answer))
	reply := h.proxyReply(req, dhcpv4.MessageTypeAck, &answer)
	if reply == nil {
		return nil, netip.AddrPort{}
	}
	to := netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if !isSet(to.Addr()) {
		// It does not use its address yet: the reply goes to all, at the
		// port it listens on.
		to = netip.AddrPortFrom(broadcast, clientPort)
	}
	return reply, to
}
