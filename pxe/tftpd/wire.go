package tftpd

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
)

// batch is how many packets go to the kernel in one call.
const batch = 16

// What recv returns when no packet came.
var (
	errDue  = errors.New("time is up")
	errWake = errors.New("woken")
	errGone = errors.New("nobody listens at the client's port")
)

// wire is a transfer's way to its client.
type wire interface {
	// send sends packets, each in pieces, in one go. What the network or
	// the kernel drops is not an error: it is sent again when it is missed.
	send(m []ipv4.Message) error
	// recv waits for a packet until a time at least. The packet is valid
	// until the next call.
	recv(until time.Time) ([]byte, error)
	// wake lets the current or the next recv return errWake. It may be
	// called at any time.
	wake()
	close()
}

// ownPort is a socket of its own for one transfer, as RFC 1350 has it. It is
// connected: the kernel drops what others send to it.
type ownPort struct {
	conn  *net.UDPConn
	batch *ipv4.PacketConn
	buf   [512]byte
	// armed is the deadline that the socket has. It is set when it passes
	// or is too late, and not with each packet.
	armed time.Time
	woken atomic.Bool
}

// newOwnPort opens a socket on an address of ours for a client.
func newOwnPort(ctx context.Context, local netip.Addr, ports []uint16, client netip.AddrPort) (_ *ownPort, err error) {
	for _, port := range ports {
		d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(local, port))}
		var c net.Conn
		c, err = d.DialContext(ctx, "udp4", client.String())
		if err == nil {
			u := c.(*net.UDPConn)
			return &ownPort{conn: u, batch: ipv4.NewPacketConn(u)}, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, err
}

func (w *ownPort) send(m []ipv4.Message) error {
	for len(m) > 0 {
		n, err := w.batch.WriteBatch(m, 0)
		if err != nil {
			return sendError(err)
		}
		m = m[n:]
	}
	return nil
}

func (w *ownPort) recv(until time.Time) ([]byte, error) {
	for {
		if w.armed.IsZero() || until.Before(w.armed) {
			w.armed = until
			w.conn.SetReadDeadline(until)
		}
		if w.woken.Swap(false) {
			w.armed = time.Time{} // wake has set another deadline
			return nil, errWake
		}
		n, err := w.conn.Read(w.buf[:])
		switch {
		case err == nil:
			return w.buf[:n], nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			w.armed = time.Time{}
			if !w.woken.Load() && !time.Now().Before(until) {
				return nil, errDue
			}
		default:
			return nil, sendError(err)
		}
	}
}

func (w *ownPort) wake() {
	w.woken.Store(true)
	w.conn.SetReadDeadline(time.Unix(1, 0)) // after the store: recv sees one of them
}

func (w *ownPort) close() { w.conn.Close() }

// sendError sorts errors of a socket: those that pass are none.
func sendError(err error) error {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return errGone
	case errors.Is(err, syscall.ENOBUFS), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EPERM):
		// A full queue, a machine that answers no ARP yet, a firewall: the
		// packet is lost like one on the wire.
		return nil
	}
	return err
}

// sharedPort is one of the transfers that share the server's socket. The
// server's reader hands it the packets of its client.
type sharedPort struct {
	batch  *ipv4.PacketConn
	client *net.UDPAddr
	in     chan []byte
	woken  chan struct{} // of capacity 1
	timer  *time.Timer
}

func newSharedPort(batch *ipv4.PacketConn, client netip.AddrPort) *sharedPort {
	return &sharedPort{batch: batch, client: net.UDPAddrFromAddrPort(client),
		in: make(chan []byte, maxWindow), woken: make(chan struct{}, 1), timer: time.NewTimer(0)}
}

// deliver hands over a packet; p is copied as far as an ACK or ERROR goes.
// What does not fit is dropped, as a full socket would.
func (w *sharedPort) deliver(p []byte) {
	select {
	case w.in <- append([]byte(nil), p[:min(len(p), 128)]...):
	default:
	}
}

func (w *sharedPort) send(m []ipv4.Message) error {
	for i := range m {
		m[i].Addr = w.client
	}
	for len(m) > 0 {
		n, err := w.batch.WriteBatch(m, 0)
		if err != nil {
			return sendError(err)
		}
		m = m[n:]
	}
	return nil
}

func (w *sharedPort) recv(until time.Time) ([]byte, error) {
	w.timer.Reset(time.Until(until))
	select {
	case p := <-w.in:
		return p, nil
	case <-w.woken:
		return nil, errWake
	case <-w.timer.C:
		return nil, errDue
	}
}

func (w *sharedPort) wake() {
	select {
	case w.woken <- struct{}{}:
	default:
	}
}

func (w *sharedPort) close() { w.timer.Stop() }

// sender turns steps into packets, with buffers of its own.
type sender struct {
	wire     wire
	headers  [batch][headerSize]byte
	messages [batch]ipv4.Message
}

func newSender(w wire) *sender {
	s := &sender{wire: w}
	for i := range s.messages {
		s.messages[i].Buffers = make([][]byte, 2)
	}
	return s
}

func (s *sender) send(t *transfer, do step) error {
	if do.oack {
		if err := s.wire.send([]ipv4.Message{{Buffers: [][]byte{oackPacket(t.answer)}}}); err != nil {
			return err
		}
	}
	for n := do.from; n != 0 && n <= do.to; {
		k := 0
		for ; k < batch && n <= do.to; k, n = k+1, n+1 {
			b := s.messages[k].Buffers
			b[0] = appendDataHeader(s.headers[k][:0], n)
			b[1] = t.payload(n)
		}
		if err := s.wire.send(s.messages[:k]); err != nil {
			return err
		}
	}
	return nil
}
