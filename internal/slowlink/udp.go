package slowlink

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"
)

// packetHeaders are what Ethernet, IP and UDP add to the bytes of a packet:
// preamble and gap 20, frame 18, 20 and 8.
const packetHeaders = 66

// UDP passes on what clients send to the address that it returns, and what
// comes back to each of them from any port of the server; a client's packets
// go to the port that answered it last, or, when first says so, to the one
// that it was told: that is how TFTP changes ports. Each packet comes half a
// round trip later and takes the time that it needs on a link of that many
// bits a second (0: none). It ends with ctx.
func UDP(ctx context.Context, to string, roundTrip time.Duration, bits float64, first func(packet []byte) bool) (addr string, err error) {
	server, err := netip.ParseAddrPort(to)
	if err != nil {
		return "", err
	}
	near, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return "", err
	}
	context.AfterFunc(ctx, func() { near.Close() })
	r := &udpRelay{server: server, near: near, first: first, clients: map[netip.AddrPort]*udpClient{}}
	r.up = newPacketLine(ctx, roundTrip/2, bits)
	r.down = newPacketLine(ctx, roundTrip/2, bits)
	go r.read(ctx)
	return near.LocalAddr().String(), nil
}

type udpRelay struct {
	server   netip.AddrPort
	near     *net.UDPConn
	first    func([]byte) bool
	up, down *packetLine
	clients  map[netip.AddrPort]*udpClient // of read alone
}

// udpClient is one client's socket towards the server.
type udpClient struct {
	far *net.UDPConn

	// mu guards the following.
	mu sync.Mutex
	to netip.AddrPort
}

func (r *udpRelay) read(ctx context.Context) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := r.near.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		c := r.clients[from]
		if c == nil {
			far, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				return
			}
			_ = far.SetReadBuffer(socketBuffer)
			context.AfterFunc(ctx, func() { far.Close() })
			c = &udpClient{far: far, to: r.server}
			r.clients[from] = c
			go r.back(c, from)
		}
		c.mu.Lock()
		if r.first(buf[:n]) {
			c.to = r.server
		}
		to := c.to
		c.mu.Unlock()
		r.up.put(buf[:n], func(p []byte) { _, _ = c.far.WriteToUDPAddrPort(p, to) })
	}
}

func (r *udpRelay) back(c *udpClient, client netip.AddrPort) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := c.far.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		c.mu.Lock()
		c.to = from
		c.mu.Unlock()
		r.down.put(buf[:n], func(p []byte) { _, _ = r.near.WriteToUDPAddrPort(p, client) })
	}
}

// socketBuffer is what the relay's sockets should hold: no packet is to be
// lost here.
const socketBuffer = 4 << 20

// packetLine is one direction of a link: packets leave one after the other,
// each with the same delay.
type packetLine struct {
	delay time.Duration
	bits  float64
	line  chan flying

	// mu guards the following.
	mu   sync.Mutex
	free time.Time // when the link has sent what it was given
}

type flying struct {
	due  time.Time
	p    []byte
	send func([]byte)
}

func newPacketLine(ctx context.Context, delay time.Duration, bits float64) *packetLine {
	l := &packetLine{delay: delay, bits: bits, line: make(chan flying, 1<<12)}
	go func() {
		for {
			select {
			case f := <-l.line:
				sleepUntil(f.due)
				f.send(f.p)
			case <-ctx.Done():
				return
			}
		}
	}()
	return l
}

// put gives the link a packet. When more are under way than a switch would
// hold, it is dropped.
func (l *packetLine) put(p []byte, send func([]byte)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.free.Before(now) {
		l.free = now
	}
	if l.bits > 0 {
		l.free = l.free.Add(time.Duration(float64(len(p)+packetHeaders) * 8 / l.bits * float64(time.Second)))
	}
	select {
	case l.line <- flying{l.free.Add(l.delay), append([]byte(nil), p...), send}:
	default:
	}
}
