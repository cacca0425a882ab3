// Package radv answers the IPv6 router solicitations of machines that boot from
// this head with "I am no router, and there is nothing to configure".
//
// Why an IPv4 head does that: iPXE configures a card by DHCP and by IPv6 side
// by side and goes on when both have ended. Without any answer the IPv6 side
// ends by time-out, 16 s later, in every boot of every machine. A router
// advertisement with a lifetime of zero, no prefix and neither the managed nor
// the other flag ends it at once (iPXE src/net/ndp.c,
// ipv6conf_rx_router_advertisement). Hosts learn nothing from it: RFC 4861
// section 6.3.4 makes a router with lifetime 0 no default router.
//
// Only machines that the head knows as its DHCP clients are answered, by
// unicast, so a real IPv6 network on the same wire does not notice.
package radv

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// ICMPv6 message types and the option that carries the sender's MAC (RFC 4861
// sections 4.1, 4.2 and 4.6.1).
const (
	typeSolicitation  = 133
	typeAdvertisement = 134
	optSourceLink     = 1
)

// hopLimit is what neighbour discovery messages must have, so that none comes
// from behind a router (RFC 4861 section 6.1).
const hopLimit = 255

// advertisement is the only thing we ever say: no hop limit, no flags, router
// lifetime 0, reachable and retransmission times unspecified, no options. The
// kernel fills in the checksum.
var advertisement = [16]byte{typeAdvertisement}

// solicitor is the MAC in a router solicitation, or why it is not a valid one.
func solicitor(msg []byte, hops int) (string, error) {
	switch {
	case hops != hopLimit:
		return "", fmt.Errorf("its hop limit is %d", hops)
	case len(msg) < 8 || msg[0] != typeSolicitation || msg[1] != 0:
		return "", errors.New("not a router solicitation")
	}
	for opt := msg[8:]; len(opt) > 0; {
		// An option is type, length in units of 8 bytes, data.
		if len(opt) < 8 || opt[1] == 0 || int(opt[1])*8 > len(opt) {
			return "", errors.New("a broken option")
		}
		if opt[0] == optSourceLink {
			return net.HardwareAddr(opt[2:8]).String(), nil
		}
		opt = opt[int(opt[1])*8:]
	}
	return "", errors.New("it does not name its sender's MAC")
}

// Server answers on one interface.
type Server struct {
	// Known tells whether a MAC (lower case, colons) is one of our clients.
	Known func(mac string) bool
	// Log may be nil.
	Log *slog.Logger
}

// Listen opens the socket for Serve on one interface. It fails where IPv6 is
// off.
func Listen(ctx context.Context, ifname string) (net.PacketConn, error) {
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.BindToDevice(int(fd), ifname) }); e != nil {
			return e
		}
		return err
	}}
	conn, err := lc.ListenPacket(ctx, "ip6:ipv6-icmp", "::")
	if err != nil {
		return nil, err
	}
	p := ipv6.NewPacketConn(conn)
	var only ipv6.ICMPFilter
	only.SetAll(true)
	only.Accept(ipv6.ICMPTypeRouterSolicitation)
	if err := errors.Join(
		p.SetICMPFilter(&only),
		p.SetHopLimit(hopLimit),
		p.JoinGroup(ifi, &net.IPAddr{IP: net.IPv6linklocalallrouters}),
	); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// Serve answers until ctx ends.
func (s *Server) Serve(ctx context.Context, conn net.PacketConn) error {
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	log := s.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p := ipv6.NewPacketConn(conn)
	// Of each PacketConn, not of the socket: it decides what ReadFrom tells.
	if err := p.SetControlMessage(ipv6.FlagHopLimit, true); err != nil {
		return err
	}
	buf := make([]byte, 1500)
	for {
		n, cm, from, err := p.ReadFrom(buf)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		hops := 0
		if cm != nil {
			hops = cm.HopLimit
		}
		mac, err := solicitor(buf[:n], hops)
		if err != nil || !linkLocal(from) || !s.Known(mac) {
			log.Debug("router solicitation left alone", "from", from.String(), "mac", mac, "reason", err)
			continue
		}
		if _, err := p.WriteTo(advertisement[:], nil, from); err != nil {
			log.Debug("router solicitation not answered", "to", from.String(), "error", err.Error())
		}
	}
}

func linkLocal(a net.Addr) bool {
	ip, ok := a.(*net.IPAddr)
	if !ok {
		return false
	}
	addr, ok := netip.AddrFromSlice(ip.IP)
	return ok && addr.IsLinkLocalUnicast()
}
