package dhcpd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"
)

// Before an address is offered to a machine that does not have it, the network
// is asked who does. A ping would not find hosts that drop pings; ARP has to be
// answered. dnsmasq waits 3 s for its ping and therefore stops asking in a boot
// storm; here each offer waits by itself, so that a storm waits once.
const (
	// arpBudget is how long an offer may wait. A host on Ethernet answers
	// within a millisecond, one that sleeps to save power within 200.
	arpBudget = 300 * time.Millisecond
	arpRepeat = 120 * time.Millisecond
)

// An ARP packet for IPv4 on Ethernet (RFC 826):
//
//	0 hardware type 1 | 2 protocol 0x0800 | 4 sizes 6, 4 | 6 operation
//	8 sender MAC | 14 sender IP | 18 target MAC | 24 target IP
const (
	arpSize    = 28
	arpRequest = 1
)

// arpProbe asks who has an address on behalf of nobody (RFC 5227 section 2.1.1):
// the sender's IP is 0, so that no host learns anything from it.
func arpProbe(from net.HardwareAddr, a netip.Addr) []byte {
	b := make([]byte, arpSize)
	copy(b, []byte{0, 1, 8, 0, 6, 4, 0, arpRequest})
	copy(b[8:], from)
	ip := a.As4()
	copy(b[24:], ip[:])
	return b
}

// arpSender is who an ARP packet says it is from.
func arpSender(b []byte) (mac net.HardwareAddr, a netip.Addr, ok bool) {
	if len(b) < arpSize || binary.BigEndian.Uint32(b) != 0x00010800 || b[4] != 6 || b[5] != 4 {
		return nil, netip.Addr{}, false
	}
	return net.HardwareAddr(b[8:14]), netip.AddrFrom4([4]byte(b[14:18])), true
}

// ARP finds out who uses an address on one interface. Serve must run.
type ARP struct {
	conn *packet.Conn
	own  net.HardwareAddr

	// mu guards the following.
	mu sync.Mutex
	// waiting has those who ask for an address; each channel has room for
	// one answer.
	waiting map[netip.Addr][]*arpWaiter
}

type arpWaiter struct {
	except string // the MAC that may have the address
	answer chan net.HardwareAddr
}

// ListenARP opens the socket. It needs CAP_NET_RAW.
func ListenARP(ifname string) (*ARP, error) {
	ifi, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil, err
	}
	c, err := packet.Listen(ifi, packet.Datagram, unix.ETH_P_ARP, nil)
	if err != nil {
		return nil, err
	}
	return &ARP{conn: c, own: ifi.HardwareAddr, waiting: map[netip.Addr][]*arpWaiter{}}, nil
}

// Close ends Serve.
func (p *ARP) Close() error { return p.conn.Close() }

// Serve reads until ctx ends and closes the socket.
func (p *ARP) Serve(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = p.conn.SetReadDeadline(time.Unix(1, 0)) })()
	defer func() { _ = p.conn.Close() }()
	buf := make([]byte, 128)
	for {
		n, _, err := p.conn.ReadFrom(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("arp: %w", err)
		case err != nil: // the interface is down
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(time.Second):
			}
			continue
		}
		if mac, a, ok := arpSender(buf[:n]); ok {
			p.heard(mac, a)
		}
	}
}

// heard passes on that mac uses a.
func (p *ARP) heard(mac net.HardwareAddr, a netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.waiting[a] {
		if s := mac.String(); s == w.except || s == p.own.String() {
			continue
		}
		select {
		case w.answer <- append(net.HardwareAddr(nil), mac...):
		default:
		}
	}
}

// InUse tells who but the machine mac uses an address, "" for nobody. It takes
// arpBudget when it is nobody.
func (p *ARP) InUse(ctx context.Context, mac string, a netip.Addr) string {
	w := &arpWaiter{except: mac, answer: make(chan net.HardwareAddr, 1)}
	p.mu.Lock()
	p.waiting[a] = append(p.waiting[a], w)
	p.mu.Unlock()
	defer p.forget(a, w)

	repeat := time.NewTicker(arpRepeat)
	defer repeat.Stop()
	ctx, cancel := context.WithTimeout(ctx, arpBudget)
	defer cancel()
	for {
		// A packet that is not sent is as good as one that is lost.
		_, _ = p.conn.WriteTo(arpProbe(p.own, a), &packet.Addr{HardwareAddr: net.HardwareAddr{255, 255, 255, 255, 255, 255}})
		select {
		case other := <-w.answer:
			return other.String()
		case <-ctx.Done():
			return ""
		case <-repeat.C:
		}
	}
}

func (p *ARP) forget(a netip.Addr, w *arpWaiter) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ws := p.waiting[a]
	for i := range ws {
		if ws[i] == w {
			ws = append(ws[:i:i], ws[i+1:]...)
			break
		}
	}
	if len(ws) == 0 {
		delete(p.waiting, a)
	} else {
		p.waiting[a] = ws
	}
}
