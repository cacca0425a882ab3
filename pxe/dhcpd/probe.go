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

// probeTime is how long Probe listens: servers answer within milliseconds,
// those that ping an address before they offer it (ISC dhcpd) within 1 s.
const probeTime = 2 * time.Second

// Peer is a foreign DHCP server and the address that it offered.
type Peer struct{ Address, Offers netip.Addr }

// Probe asks an interface's network for an address, as a client would, and
// returns who offers one. ok is false when nobody does. Nothing is leased: the
// offer is not taken.
func Probe(ctx context.Context, ifname string) (p Peer, ok bool, err error) {
	c, err := nclient4.New(ifname, nclient4.WithTimeout(probeTime/2), nclient4.WithRetry(2))
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
