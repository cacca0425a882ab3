package netup

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
)

// Retransmission of one exchange: 1, 2 and 4 s. A switch with spanning tree
// drops everything for its first 30 s, so exchanges are repeated for ever.
const (
	firstTimeout = time.Second
	tries        = 3
)

// errNak is a server's word that our address is not ours any more.
var errNak = errors.New("the DHCP server took the address back")

// hello are the words that every message of ours carries.
func hello() []dhcpv4.Modifier {
	return []dhcpv4.Modifier{
		dhcpv4.WithOption(dhcpv4.OptClassIdentifier("mosimg")),
		dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(nclient4.MaxMessageSize)),
	}
}

func dhcpClient(ifname string) (*nclient4.Client, error) {
	return nclient4.New(ifname, nclient4.WithTimeout(firstTimeout), nclient4.WithRetry(tries))
}

// acquire runs one discover-offer-request-ack.
func acquire(ctx context.Context, ifname string) (*dhcpv4.DHCPv4, error) {
	c, err := dhcpClient(ifname)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	discover, err := dhcpv4.NewDiscovery(c.InterfaceAddr(), hello()...)
	if err != nil {
		return nil, err
	}
	offer, err := c.SendAndRead(ctx, c.RemoteAddr(), discover, func(p *dhcpv4.DHCPv4) bool {
		// A proxy's offer carries no address and is not for us.
		return p.MessageType() == dhcpv4.MessageTypeOffer && !p.YourIPAddr.IsUnspecified()
	})
	if err != nil {
		return nil, fmt.Errorf("no DHCP server answers on %s: %w", ifname, err)
	}
	l, err := c.RequestFromOffer(ctx, offer, hello()...)
	if err != nil {
		return nil, fmt.Errorf("DHCP request on %s: %w", ifname, err)
	}
	return l.ACK, nil
}

// extend asks for more time: from the server that granted the lease, or with
// anyone from every server. It broadcasts in both cases, as the raw socket
// needs no route and the answer is the same.
func extend(ctx context.Context, ifname string, ack *dhcpv4.DHCPv4, anyone bool) (*dhcpv4.DHCPv4, error) {
	c, err := dhcpClient(ifname)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	req, err := dhcpv4.NewRenewFromAck(ack, hello()...)
	if err != nil {
		return nil, err
	}
	match := nclient4.IsMessageType(dhcpv4.MessageTypeAck, dhcpv4.MessageTypeNak)
	if !anyone {
		match = nclient4.IsAll(nclient4.IsCorrectServer(ack.ServerIdentifier()), match)
	}
	reply, err := c.SendAndRead(ctx, c.RemoteAddr(), req, match)
	if err != nil {
		return nil, fmt.Errorf("extend the lease of %s: %w", ack.YourIPAddr, err)
	}
	if reply.MessageType() == dhcpv4.MessageTypeNak {
		return nil, errNak
	}
	return reply, nil
}
