package dhcpd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
)

// Probe asks at once and again after probeRepeat, and listens for probeTime in
// all. Most servers answer within milliseconds, but ISC dhcpd pings an address
// for 1 s before it offers it, and dnsmasq (home routers, libvirt) for 3 s.
const (
	probeRepeat = 1500 * time.Millisecond
	probeTime   = 3 * probeRepeat // nclient4 doubles its time-out
)

// Peer is a foreign DHCP server and the address that it offered.
type Peer struct{ Address, Offers netip.Addr }

// Probe asks an interface's network for an address, as a client would, and
// returns who offers one; own is the head's address there, whose offers do not
// count (a relay may carry the question back). ok is false when nobody does.
// Nothing is leased: the offer is not taken.
func Probe(ctx context.Context, ifname string, own netip.Addr) (p Peer, ok bool, err error) {
	fail := func(err error) (Peer, bool, error) {
		return Peer{}, false, fmt.Errorf("look for another DHCP server on %s: %w", ifname, err)
	}
	c, err := nclient4.New(ifname, nclient4.WithTimeout(probeRepeat), nclient4.WithRetry(2))
	if err != nil {
		return fail(err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	ask, err := dhcpv4.NewDiscovery(c.InterfaceAddr(), dhcpv4.WithBroadcast(true))
	if err != nil {
		return fail(err)
	}
	// An offer without an address is a proxy's.
	foreign := func(m *dhcpv4.DHCPv4) bool {
		return m.MessageType() == dhcpv4.MessageTypeOffer && isSet(addrOf(m.YourIPAddr)) && serverOf(m) != own
	}
	offer, err := c.SendAndRead(ctx, c.RemoteAddr(), ask, foreign)
	if err != nil {
		if errors.Is(err, nclient4.ErrNoResponse) || errors.Is(err, context.DeadlineExceeded) {
			return Peer{}, false, nil
		}
		return fail(err)
	}
	return Peer{Address: serverOf(offer), Offers: addrOf(offer.YourIPAddr)}, true, nil
}

// serverOf is who sent an offer, by its own word.
func serverOf(m *dhcpv4.DHCPv4) netip.Addr {
	if a := addrOf(m.ServerIdentifier()); isSet(a) {
		return a
	}
	return addrOf(m.ServerIPAddr)
}
