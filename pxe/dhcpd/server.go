// Package dhcpd is the head's DHCP server: an address and a boot file for
// every machine on the interfaces that it is told to serve, or, where another
// server leases the addresses, only the boot file ("proxy DHCP").
//
// There is one socket for each interface, bound to that device and to the
// wildcard address: Linux delivers no broadcast to a socket that is bound to
// an address, and a broadcast reply leaves by the device of its socket.
package dhcpd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/sys/unix"

	"mosimg/pxe/limit"
)

// Bounds on the work that the network can cause.
const (
	// atOnce packets are answered at the same time on each interface; more
	// are dropped, and clients repeat. Nearly all of the time is spent
	// waiting, 300 ms for ARP and then for an fsync that many share, so 512
	// answer 1000 machines in a second.
	atOnce   = 512
	maxBytes = 4096 // of one packet; larger ones are cut and fail to parse
)

// Listen binds a socket to an interface. It does not share the port: a second
// server on the same device is an error here and not a riddle later.
func Listen(ctx context.Context, ifname string, port int) (*net.UDPConn, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) {
			err = errors.Join(
				unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
				unix.BindToDevice(int(fd), ifname))
		})
		return errors.Join(cerr, err)
	}}
	c, err := lc.ListenPacket(ctx, "udp4", fmt.Sprintf(":%d", port))
	if err != nil {
		return nil, err
	}
	return c.(*net.UDPConn), nil
}

// Server serves one interface.
type Server struct {
	Handler *Handler
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Serve answers what comes to port 67 until ctx ends. It closes conn.
func (s *Server) Serve(ctx context.Context, conn *net.UDPConn) error {
	return s.serve(ctx, conn, func(now time.Time, req *dhcpv4.DHCPv4, _ netip.AddrPort) (*dhcpv4.DHCPv4, netip.AddrPort) {
		return s.Handler.Handle(ctx, now, req)
	})
}

// ServeBoot answers what comes to port 4011 until ctx ends. It closes conn.
func (s *Server) ServeBoot(ctx context.Context, conn *net.UDPConn) error {
	return s.serve(ctx, conn, func(_ time.Time, req *dhcpv4.DHCPv4, from netip.AddrPort) (*dhcpv4.DHCPv4, netip.AddrPort) {
		return s.Handler.HandleBoot(req, from)
	})
}

type handleFunc func(time.Time, *dhcpv4.DHCPv4, netip.AddrPort) (*dhcpv4.DHCPv4, netip.AddrPort)

func (s *Server) serve(ctx context.Context, conn *net.UDPConn, handle handleFunc) error {
	now := s.Now
	if now == nil {
		now = time.Now
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()

	// Firmware sends a handful of packets in a boot; 5 a second is a loop.
	perMAC := limit.New(5, 20, 4096)
	room := make(chan struct{}, atOnce)
	var wg sync.WaitGroup
	defer wg.Wait()
	buf := make([]byte, maxBytes)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("dhcp: %w", err)
			}
			// The interface went down, or an ICMP error came back.
			s.Handler.log().Warn("dhcp: receive", "error", err.Error())
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(time.Second):
			}
			continue
		}
		req, err := parse(buf[:n])
		if err != nil {
			s.Handler.log().Debug("dhcp: not a DHCP packet", "error", err.Error())
			continue
		}
		if !perMAC.Allow(string(req.ClientHWAddr), now()) {
			continue
		}
		select {
		case room <- struct{}{}:
		default:
			s.Handler.log().Debug("dhcp: too busy, packet dropped", "mac", req.ClientHWAddr.String())
			continue
		}
		wg.Go(func() {
			defer func() { <-room }()
			s.answer(conn, now(), req, from, handle)
		})
	}
}

// answer handles one packet. A fault in it costs that packet and not the head.
func (s *Server) answer(conn *net.UDPConn, now time.Time, req *dhcpv4.DHCPv4, from netip.AddrPort, handle handleFunc) {
	defer func() {
		if r := recover(); r != nil {
			s.Handler.log().Error("dhcp: fault while answering", "mac", req.ClientHWAddr.String(), "panic", r, "stack", string(debug.Stack()))
		}
	}()
	reply, to := handle(now, req, from)
	if reply == nil {
		return
	}
	if _, err := conn.WriteToUDPAddrPort(reply.ToBytes(), to); err != nil {
		s.Handler.log().Warn("dhcp: send", "to", to, "error", err.Error())
	}
}

// parse reads a packet. The library panics on nothing known, but the bytes
// come from anyone: a panic here would end the read loop.
func parse(b []byte) (req *dhcpv4.DHCPv4, err error) {
	defer func() {
		if r := recover(); r != nil {
			req, err = nil, fmt.Errorf("parse: %v", r)
		}
	}()
	return dhcpv4.FromBytes(b)
}
