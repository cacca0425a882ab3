package vswitch

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// queueFrames bounds each queue of a port: at most 6 MiB of full frames.
const queueFrames = 4096

// MaxSocketPath is how long a unix socket's path may be: sun_path has 108
// bytes on Linux, 104 elsewhere, with the final zero.
const MaxSocketPath = 103

// Port is one port of a switch.
type Port struct {
	sw    *Switch
	name  string
	group int // partition; guarded by sw.mu

	listener net.Listener // nil for an in-process port
	stop     chan struct{}
	stopOnce sync.Once

	in  line // machine -> switch
	out line // switch -> machine

	mu        sync.Mutex // guards the following
	peer      peer       // nil while nobody is connected
	unplugged atomic.Bool

	rx, rxBytes, tx, txBytes, lost, dropped, bad atomic.Uint64
}

// peer is the far end of a port's cable.
type peer interface {
	writeFrame(frame) error
	io.Closer
}

// line is one direction of a port's link: a queue of frames with the times at
// which they arrive.
type line struct {
	queue chan arrival

	mu     sync.Mutex // guards the following
	shaper shaper
}

type arrival struct {
	at time.Time // zero: at once
	f  frame
}

// Listen adds a port that one machine may connect to over a unix socket. A
// new connection replaces the last: its machine was started anew.
func (s *Switch) Listen(name, path string, l Link) (*Port, error) {
	if len(path) > MaxSocketPath {
		return nil, fmt.Errorf("unix socket path %s has %d bytes, %d are possible", path, len(path), MaxSocketPath)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		listener.Close()
		return nil, err
	}
	p, err := s.newPort(name, listener, l)
	if err != nil {
		listener.Close()
		return nil, err
	}
	s.wait.Go(p.accept)
	return p, nil
}

func (s *Switch) newPort(name string, listener net.Listener, l Link) (*Port, error) {
	p := &Port{sw: s, name: name, listener: listener, stop: make(chan struct{})}
	p.in.queue = make(chan arrival, queueFrames)
	p.out.queue = make(chan arrival, queueFrames)
	p.SetLink(l)
	if err := s.add(p); err != nil {
		return nil, err
	}
	s.wait.Go(func() { p.drain(&p.in, p.arrive) })
	s.wait.Go(func() { p.drain(&p.out, p.leave) })
	return p, nil
}

// Name is the port's name.
func (p *Port) Name() string { return p.name }

// SetLink changes the cable; frames that are under way keep their times.
func (p *Port) SetLink(l Link) {
	for _, d := range []*line{&p.in, &p.out} {
		d.mu.Lock()
		d.shaper = shaper{Link: l}
		d.mu.Unlock()
	}
}

// Unplug pulls the cable: frames are dropped in both directions. The machine
// sees its carrier all the same; vm.SetLink takes that away.
func (p *Port) Unplug() {
	p.unplugged.Store(true)
	p.forget()
}

// Plug puts the cable back.
func (p *Port) Plug() { p.unplugged.Store(false) }

// Close takes the port away.
func (p *Port) Close() {
	p.sw.remove(p)
	p.shut()
}

func (p *Port) shut() {
	p.stopOnce.Do(func() {
		close(p.stop)
		if p.listener != nil {
			p.listener.Close() // removes the socket, too
		}
	})
	p.connect(nil)
}

func (p *Port) forget() {
	p.sw.mu.Lock()
	defer p.sw.mu.Unlock()
	p.sw.table.forget(p)
}

// connect makes a new peer the port's own, and lets the old one go.
func (p *Port) connect(n peer) {
	p.mu.Lock()
	old := p.peer
	p.peer = n
	p.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

// disconnect lets go of gone, unless another peer took its place.
func (p *Port) disconnect(gone peer) {
	p.mu.Lock()
	ours := p.peer == gone
	if ours {
		p.peer = nil
	}
	p.mu.Unlock()
	gone.Close()
	if ours {
		p.forget()
	}
}

// acceptPause keeps a listener that fails for want of descriptors from
// spinning.
const acceptPause = 200 * time.Millisecond

func (p *Port) accept() {
	for {
		conn, err := p.listener.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			p.sw.log.Warn("switch: accept", "port", p.name, "error", err)
			select {
			case <-p.stop:
				return
			case <-time.After(acceptPause):
				continue
			}
		}
		s := &socketPeer{conn}
		p.connect(s)
		select {
		case <-p.stop:
			p.connect(nil) // shut may have passed before connect
			return
		default:
		}
		p.sw.wait.Go(func() {
			defer p.disconnect(s)
			if err := p.read(conn); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				p.sw.log.Debug("switch: machine is gone", "port", p.name, "error", err)
			}
		})
	}
}

// socketPeer is a machine on a unix socket.
type socketPeer struct{ conn net.Conn }

func (s *socketPeer) writeFrame(f frame) error {
	_, err := s.conn.Write(f)
	return err
}

func (s *socketPeer) Close() error { return s.conn.Close() }

// read takes frames from a machine until its stream ends.
func (p *Port) read(conn io.Reader) error {
	r := bufio.NewReaderSize(conn, 128<<10)
	for {
		f, err := readFrame(r)
		if err != nil {
			return err
		}
		if !p.receive(f) {
			return net.ErrClosed
		}
	}
}

// receive puts a frame from the machine on the wire to the switch. It makes
// the machine wait for its wire, as a network card does; false means that the
// port is closed.
func (p *Port) receive(f frame) bool {
	if len(f.data()) < minFrame {
		p.bad.Add(1)
		return true
	}
	at, wait, lost := p.in.admit(len(f.data()))
	if lost {
		p.lost.Add(1)
		return true
	}
	if !p.sleep(wait) {
		return false
	}
	select {
	case p.in.queue <- arrival{at, f}:
		return true
	case <-p.stop:
		return false
	}
}

// admit is the sending side of a line that may wait.
func (d *line) admit(n int) (at time.Time, wait time.Duration, lost bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.shaper.Link == (Link{}) {
		return time.Time{}, 0, false
	}
	if d.shaper.Loss > 0 && rand.Float64() < d.shaper.Loss {
		return time.Time{}, 0, true
	}
	now := time.Now()
	at = d.shaper.pass(now, n)
	return at, d.shaper.room(now, senderBuffer), false
}

// arrive hands a frame from the machine to the fabric.
func (p *Port) arrive(f frame) {
	if p.unplugged.Load() {
		p.dropped.Add(1)
		return
	}
	p.rx.Add(1)
	p.rxBytes.Add(uint64(len(f.data())))
	p.sw.forward(p, f)
}

// send queues a frame for the machine, or drops it: the fabric never waits.
func (p *Port) send(f frame) {
	d := &p.out
	d.mu.Lock()
	defer d.mu.Unlock()
	var at time.Time
	if d.shaper.Link != (Link{}) {
		now := time.Now()
		if d.shaper.Loss > 0 && rand.Float64() < d.shaper.Loss {
			p.lost.Add(1)
			return
		}
		if d.shaper.full(now, switchBuffer) {
			p.dropped.Add(1)
			return
		}
		at = d.shaper.pass(now, len(f.data()))
	}
	select {
	case d.queue <- arrival{at, f}:
	default:
		p.dropped.Add(1)
	}
}

// leave hands a frame to the machine.
func (p *Port) leave(f frame) {
	p.mu.Lock()
	to := p.peer
	p.mu.Unlock()
	if to == nil || p.unplugged.Load() {
		p.dropped.Add(1)
		return
	}
	if to.writeFrame(f) != nil {
		p.dropped.Add(1) // its reader notices the end
		return
	}
	p.tx.Add(1)
	p.txBytes.Add(uint64(len(f.data())))
}

// drain delivers a line's frames when their time has come.
func (p *Port) drain(d *line, deliver func(frame)) {
	for {
		select {
		case a := <-d.queue:
			if !a.at.IsZero() && !p.sleep(time.Until(a.at)) {
				return
			}
			deliver(a.f)
		case <-p.stop:
			return
		}
	}
}

// sleep waits for d; false means that the port was closed meanwhile.
func (p *Port) sleep(d time.Duration) bool {
	if d <= 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-p.stop:
		return false
	}
}

func (p *Port) counters() Counters {
	p.mu.Lock()
	connected := p.peer != nil
	p.mu.Unlock()
	return Counters{
		Name: p.name, Connected: connected,
		Rx: p.rx.Load(), RxBytes: p.rxBytes.Load(),
		Tx: p.tx.Load(), TxBytes: p.txBytes.Load(),
		Lost: p.lost.Load(), Dropped: p.dropped.Load(), Bad: p.bad.Load(),
	}
}
