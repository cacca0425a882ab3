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
// returns who offers one. ok is false when nobody does. Nothing is leased: the
// offer is not taken.
func Probe(ctx context.Context, ifname string) (p Peer, ok bool, err error) {
	c, err := nclient4.New(ifname, nclient4.WithTimeout(probeRepeat), nclient4.WithRetry(2))
	if err != nil {
		return Peer{}, false, fmt.Errorf("look for another DHCP server on %s: %w", ifname, err)
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	offer, err := c.DiscoverOffer(ctx, dhcpv4.WithBroadcast(true))
	if err != nil {
		if errors.Is(err, nclient4.ErrNoResponse) || errors.Is(err, context.DeadlineExceeded) {
			return Peer{}, false, nil
		}
		return Peer{}, false, fmt.Errorf("look for another DHCP server on %s: %w", ifname, err)
	}
	p = Peer{Address: addrOf(offer.ServerIdentifier()), Offers: addrOf(offer.YourIPAddr)}
	if !isSet(p.Address) {
		p.Address = addrOf(offer.ServerIPAddr)
	}
	return p, true, nil
}
