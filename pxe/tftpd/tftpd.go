// Package tftpd serves the boot loaders of an image set by TFTP, and nothing
// else: a request names a bare file of the set's boot folder. It speaks RFC
// 1350 with options (2347), blksize (2348), tsize and timeout (2349) and
// windowsize (7440), for reading only.
//
// transfer.go is the protocol for one client and admission.go says whom to
// serve when; both are pure. Here and in wire.go are the sockets around them.
// Why this is not pin/tftp, which is the client in the tests: docs/architecture.md.
package tftpd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/ipv4"

	"mosimg/pxe/images"
	"mosimg/pxe/limit"
	"mosimg/pxe/trace"
)

const (
	// maxBlock is an Ethernet frame's 1500 bytes without the headers of IP,
	// UDP and TFTP (20+8+4); a larger block would be cut in two packets,
	// which boot ROMs do not put together. Where our side carries more, the
	// client's may not.
	maxBlock = 1500 - ipUDPTFTP
	// ipUDPTFTP are the headers around a block.
	ipUDPTFTP = 32
	// grace is how long a stop waits for transfers to end.
	grace = 2 * time.Second
	// requestBuffer holds the requests of a boot storm until they are read.
	requestBuffer = 1 << 20
)

// Server serves TFTP on one address.
type Server struct {
	// Loader finds a boot loader by its bare name; nil when there is none.
	// It may be called concurrently.
	Loader func(name string) *images.File
	// MAC names the machine at an address, for the boot trace; "" if unknown.
	MAC func(netip.Addr) string
	// MTU of the interface; 0 means 1500.
	MTU int
	// Ports to send from.
	Ports Ports
	// Log may be nil.
	Log *slog.Logger

	contents contents
}

// serving is a Server at work on a socket.
type serving struct {
	*Server
	conn   *net.UDPConn
	batch  *ipv4.PacketConn // of conn
	local  netip.Addr
	ports  portRange
	faults *limit.Limiter // of lines in the log
	wg     sync.WaitGroup

	// mu guards the following.
	mu        sync.Mutex
	admission *admission
	shared    map[netip.AddrPort]*sharedPort // with Ports.Single: those of running transfers
	stopping  bool
}

// Serve answers requests until ctx ends. conn is an IPv4 socket; Serve closes it.
func (s *Server) Serve(ctx context.Context, conn *net.UDPConn) error {
	v := &serving{
		Server: s, conn: conn, batch: ipv4.NewPacketConn(conn), faults: limit.New(5, 50, 1),
		admission: newAdmission(s.Ports.places()), shared: map[netip.AddrPort]*sharedPort{},
	}
	v.ports.Ports = s.Ports
	v.local = conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	_ = conn.SetReadBuffer(requestBuffer) // a smaller one works, too

	// Transfers outlive ctx for a moment; run ends them for good.
	run, kill := context.WithCancel(context.WithoutCancel(ctx))
	defer kill()
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		v.mu.Lock()
		v.stopping = true
		v.mu.Unlock()
		ended := make(chan struct{})
		go func() { v.wg.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(grace):
		}
		conn.Close()
	})
	err := v.read(run)
	if stop() { // the socket failed by itself
		conn.Close()
	} else {
		<-stopped
		err = nil
	}
	kill()
	v.mu.Lock()
	v.stopping = true
	for _, x := range v.admission.running {
		x.wake()
	}
	v.mu.Unlock()
	v.wg.Wait()
	return err
}

// read takes packets from the socket until that fails.
func (v *serving) read(ctx context.Context) error {
	buf := make([]byte, 2048) // more than a request without fragments
	for {
		n, client, err := v.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			return err
		}
		v.packet(ctx, netip.AddrPortFrom(client.Addr().Unmap(), client.Port()), buf[:n])
	}
}

// packet is one packet to the server's port. What is no request and belongs
// to nobody is dropped without a word: there is a lot of it in the world.
func (v *serving) packet(ctx context.Context, client netip.AddrPort, p []byte) {
	switch opcode(p) {
	case opRRQ:
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.stopping {
			return
		}
		if s := v.admission.ask(time.Now(), client, p); s != nil {
			v.launch(ctx, s)
		}
	case opWRQ:
		if _, ok := parseRequest(p); ok {
			_, _ = v.conn.WriteToUDPAddrPort(errorPacket(codeAccess, "files are only read here"), client)
		}
	case opAck, opError:
		v.mu.Lock()
		w := v.shared[client]
		v.mu.Unlock()
		if w != nil {
			w.deliver(p)
		}
	}
}

// launch answers a session's client until it wants nothing more, and then
// those that get its place. v.mu is held.
func (v *serving) launch(ctx context.Context, s *session) {
	v.wg.Go(func() {
		for s != nil {
			v.mu.Lock()
			packet := s.wanted
			s.wanted = ""
			if packet == "" || s.state == stateEvicted || ctx.Err() != nil {
				s = v.admission.end(time.Now(), s)
				packet = ""
			}
			v.mu.Unlock()
			if packet != "" {
				v.answer(ctx, s, packet)
			}
		}
	})
}

// answer serves one request.
func (v *serving) answer(ctx context.Context, s *session, packet string) {
	r, ok := parseRequest([]byte(packet))
	if !ok {
		return
	}
	w, err := v.wire(ctx, s)
	if err != nil {
		v.fault("tftp: no port for a transfer", s, r, err)
		return
	}
	defer v.unwire(s, w)
	data, refusal := v.content(s, r)
	if refusal != nil {
		_ = w.send([]ipv4.Message{{Buffers: [][]byte{refusal}}})
		return
	}
	block := maxBlock
	if v.MTU > 0 {
		block = min(block, max(defaultBlock, v.MTU-ipUDPTFTP))
	}
	began := time.Now()
	t := newTransfer(data, negotiate(r.opts, int64(len(data)), block))
	last, err := v.transfer(ctx, s, packet, w, t)
	attrs := []any{"address", s.client.Addr().String(), "file", printable(r.name), "blksize", t.block, "windowsize", t.window, "resent", t.resent, "took", time.Since(began).Round(time.Millisecond)}
	switch {
	case err != nil:
		v.fault("tftp: transfer failed", s, r, err)
	case last.outcome == finished:
		trace.Event(v.Log, trace.TFTP, v.mac(s), append(attrs, "bytes", len(data))...)
	case last.outcome == aborted && t.acked == 0:
		// Firmware asks for the size first and breaks the transfer off, then
		// asks again: that is how it works, not a failure.
		v.log().Debug("tftp: size asked", attrs...)
	case last.err != nil:
		v.fault("tftp: transfer failed", s, r, last.err)
	}
}

// content is what a request is for, or the packet that refuses it. Refusals
// go to clients: no paths of ours.
func (v *serving) content(s *session, r request) (data, refusal []byte) {
	mode := r.mode
	if mode != netascii && mode != octet {
		return nil, errorPacket(codeIllegal, "the mode must be octet or netascii")
	}
	f := v.Loader(clean(r.name))
	if f == nil {
		// iPXE looks for its script in passing: that is not worth a line.
		if clean(r.name) != autoexec {
			v.fault("tftp: refused", s, r, errors.New("file not found"))
		}
		return nil, errorPacket(codeNotFound, "file not found")
	}
	data, err := v.contents.of(f, mode)
	if err != nil {
		v.fault("tftp: read boot loader", s, r, err)
		return nil, errorPacket(codeUndefined, "internal fault")
	}
	return data, nil
}

// autoexec is a script that iPXE asks for before it does anything else. A
// prompt "not found" lets it go on to DHCP.
const autoexec = "autoexec.ipxe"

// clean is the bare name that a client means: some put a slash before it,
// Windows-made ROMs a backslash, and a few PXE stacks add ".0".
func clean(name string) string {
	return strings.TrimSuffix(strings.TrimLeft(name, `/\`), ".0")
}

// wire opens the way to a session's client and lets admission wake it.
func (v *serving) wire(ctx context.Context, s *session) (w wire, err error) {
	if v.Ports.Single {
		w = newSharedPort(v.batch, s.client)
	} else if w, err = newOwnPort(ctx, v.local, v.ports.candidates(), s.client); err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	s.wake = w.wake
	if p, ok := w.(*sharedPort); ok {
		v.shared[s.client] = p
	}
	if s.wanted != "" || s.state == stateEvicted || ctx.Err() != nil {
		w.wake() // there was nothing yet to be woken by it
	}
	return w, nil
}

func (v *serving) unwire(s *session, w wire) {
	v.mu.Lock()
	s.wake = func() {}
	delete(v.shared, s.client)
	v.mu.Unlock()
	w.close()
}

// transfer moves packets between a transfer and its wire until it ends, or
// the session is told to do something else.
func (v *serving) transfer(ctx context.Context, s *session, packet string, w wire, t *transfer) (step, error) {
	out := newSender(w)
	started := false
	do := t.start(time.Now())
	for do.outcome == running {
		err := out.send(t, do)
		var p []byte
		if err == nil {
			p, err = w.recv(t.due)
		}
		now := time.Now()
		switch {
		case err == nil:
			do = t.packet(now, p)
		case errors.Is(err, errDue):
			do = t.expire(now)
		case errors.Is(err, errGone):
			do = t.gone()
		case !errors.Is(err, errWake):
			return step{}, err
		case ctx.Err() == nil && v.again(s, packet):
			do = t.again(now)
		default:
			return step{}, nil
		}
		if !started && t.started() {
			started = true
			v.mu.Lock()
			v.admission.start(s)
			v.mu.Unlock()
		}
	}
	return do, nil
}

// again tells whether a session was woken because its request came again; else
// its transfer is to end.
func (v *serving) again(s *session, packet string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if s.wanted != packet || s.state == stateEvicted {
		return false
	}
	s.wanted = ""
	return true
}

// fault logs what an operator may have to know of, and no more than a few
// lines a second.
func (v *serving) fault(what string, s *session, r request, err error) {
	if v.faults.Allow("", time.Now()) {
		v.log().Warn(what, "mac", v.mac(s), "address", s.client.Addr().String(), "file", printable(r.name), "error", err.Error())
	}
}

func (v *serving) mac(s *session) string {
	if v.MAC == nil {
		return ""
	}
	return v.MAC(s.client.Addr())
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}
