// Package link carries one home files session over one connection after
// another: whatever is sent is kept until the other side has acknowledged it,
// and a new connection begins by sending again what the old one may have
// lost. Between two living processes each frame is handed over exactly once
// and in order, however often the network fails.
//
// It does not dial, greet or authenticate: package forward and package home
// do that and then Attach a connection. It does not survive the end of its
// process.
package link

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"mosimg/agent/homefiles/wire"
)

// Bounds on a connection's silence. A link that is cut without a RST (a cable
// pulled) is noticed after Silence; each side sends something at least every
// Heartbeat.
const (
	Heartbeat = 2 * time.Second
	Silence   = 7 * time.Second
)

// An acknowledgement rides on each frame; a side that has nothing to send
// acknowledges by itself after so much, which bounds what the other keeps.
const (
	ackFrames = 64
	ackBytes  = 4 << 20
)

// batch is how much is handed to one Write: enough for several small frames
// and little enough that a slow link has acknowledgements in between.
const batch = 256 << 10

// Handle takes a numbered frame and owns its body. more tells that the next has
// come already.
type Handle func(h wire.Header, body *Buf, more bool)

// Link is one side of a session. Make it with New.
type Link struct {
	readers func(read func(Handle))
	inTurn  bool // one handle at a time
	limit   int

	mu    sync.Mutex
	space sync.Cond // signalled when bytes shrinks, writing ends or the link closes
	// The following is guarded by mu.
	conn    net.Conn // nil while there is none
	queue   []frame  // numbered frames not known to have arrived, in order
	next    uint64   // number of the frame that Send queues next
	sent    int      // queue[:sent] were given to conn
	written int      // queue[:written] are no longer read by a Write; <= sent
	acked   uint64   // all up to this number have arrived
	bytes   int      // in queue
	writing bool     // somebody is in flush
	ackDue  bool     // a frame without content is wanted, for its ack
	closed  bool

	rx        uint64 // highest number handed over; written by Attach only
	toldRx    uint64 // what the other side was last told of rx
	rxBytes   int    // received since then
	lastHeard atomic.Int64
	lastSaid  atomic.Int64
	attach    sync.Mutex // held by the one Attach that runs
	down      atomic.Int64
}

type frame struct {
	hdr  wire.Header
	body []byte
	buf  *Buf // to be freed with the frame; may be nil
}

// New makes a link without a connection. handle gets each numbered frame, in
// order, from one goroutine; it must not wait for anything that needs a later
// frame. Send waits while more than limit bytes are not acknowledged; 0 is no
// limit.
func New(limit int, handle func(h wire.Header, body *Buf)) *Link {
	l := NewWith(limit, func(read func(Handle)) {
		read(func(h wire.Header, body *Buf, _ bool) { handle(h, body) })
	})
	l.inTurn = true
	return l
}

// NewWith is New for a Handle that may wait: when it does so for longer than
// Patience, another goroutine reads on. readers is called, on a goroutine of its own,
// for each that is needed, and has to have read called once, on whichever goroutine
// is to read, with the Handle that is to get the frames. Handles begin in the order
// of the frames.
func NewWith(limit int, readers func(read func(Handle))) *Link {
	l := &Link{readers: readers, limit: limit, next: 1}
	l.space.L = &l.mu
	l.down.Store(time.Now().UnixNano())
	return l
}

// ErrClosed is the end of a link that was closed.
var ErrClosed = errors.New("home files link closed")

// Send queues a numbered frame and hands it to the connection if there is
// one. The link owns buf (if not nil, body lies in it) from now on and frees
// it when the frame has arrived. It fails only when the link is closed.
func (l *Link) Send(kind wire.Kind, flags uint8, body []byte, buf *Buf) error {
	l.mu.Lock()
	for l.limit > 0 && l.bytes > l.limit && !l.closed {
		l.space.Wait()
	}
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	l.queue = append(l.queue, frame{
		hdr:  wire.Header{Length: uint32(len(body)), Kind: kind, Flags: flags, Seq: l.next},
		body: body, buf: buf,
	})
	l.next++
	l.bytes += len(body)
	l.flush()
	l.mu.Unlock()
	return nil
}

// Rx is the highest number handed over: what a greeting tells the other side.
func (l *Link) Rx() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rx
}

// DownSince is when the link lost its connection; ok is false while it has one.
func (l *Link) DownSince() (since time.Time, ok bool) {
	ns := l.down.Load()
	return time.Unix(0, ns), ns != 0
}

// Cut closes the connection, if there is one, so that Attach returns.
func (l *Link) Cut() {
	l.mu.Lock()
	conn := l.conn
	l.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
}

// Close ends the link: Attach and waiting Sends return, what was not sent is
// dropped.
func (l *Link) Close() {
	l.mu.Lock()
	l.closed = true
	conn := l.conn
	l.space.Broadcast()
	l.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
}

// Attach runs the session over conn until conn fails or the link is closed,
// and closes conn. r is what reads from conn: the greeting may have buffered
// bytes. greeted (may be nil) is written first, unnumbered: the home's answer
// to a greeting. peerRx is what the other side has received. Another Attach
// that still runs is ended first. The error is never nil.
func (l *Link) Attach(conn net.Conn, r *bufio.Reader, greeted func(rx uint64) []byte, peerRx uint64) error {
	defer conn.Close()
	l.Cut()
	l.attach.Lock()
	defer l.attach.Unlock()
	if greeted != nil {
		conn.SetWriteDeadline(time.Now().Add(Silence))
		if _, err := conn.Write(greeted(l.Rx())); err != nil {
			return err
		}
		conn.SetWriteDeadline(time.Time{})
	}

	l.mu.Lock()
	for l.writing && !l.closed {
		l.space.Wait()
	}
	if l.closed {
		l.mu.Unlock()
		return ErrClosed
	}
	if peerRx < l.acked || peerRx >= l.next {
		l.mu.Unlock()
		return fmt.Errorf("peer says it received frame %d; %d was acknowledged and %d is the last", peerRx, l.acked, l.next-1)
	}
	l.acked = peerRx
	l.sent, l.written = len(l.queue), len(l.queue)
	l.trim()
	l.sent, l.written = 0, 0
	l.conn = conn
	l.toldRx, l.rxBytes = l.rx, 0
	now := time.Now().UnixNano()
	l.lastHeard.Store(now)
	l.lastSaid.Store(now)
	l.down.Store(0)
	l.flushSoon()
	l.mu.Unlock()

	stop := make(chan struct{})
	go l.watch(conn, stop)
	err := l.read(conn, r)
	close(stop)
	conn.Close()
	l.mu.Lock()
	l.conn = nil
	l.down.Store(time.Now().UnixNano())
	if l.closed {
		err = ErrClosed
	}
	l.mu.Unlock()
	return err
}

// watch closes a connection that is silent, and keeps ours from being so.
func (l *Link) watch(conn net.Conn, stop <-chan struct{}) {
	t := time.NewTicker(Heartbeat / 2)
	defer t.Stop()
	for {
		select {
		case <-stop:
			return
		case <-t.C:
		}
		now := time.Now().UnixNano()
		if now-l.lastHeard.Load() > int64(Silence) {
			conn.Close()
			return
		}
		if now-l.lastSaid.Load() >= int64(Heartbeat) {
			l.mu.Lock()
			if l.conn == conn {
				l.ackDue = true
				l.flush()
			}
			l.mu.Unlock()
		}
	}
}

// flush writes all that is queued and not sent, unless another goroutine is
// at it, which then writes ours too: one system call for many frames under
// load, and no change of goroutine when there is none. mu is held at entry
// and at return, not while writing.
func (l *Link) flush() {
	if l.writing {
		return
	}
	l.writing = true
	var scratch []byte
	for l.conn != nil && !l.closed && (l.sent < len(l.queue) || l.ackDue) {
		conn := l.conn
		first, n := l.sent, 0
		var parts net.Buffers
		scratch = scratch[:0]
		// Small bodies are copied behind their headers; large ones are
		// handed over where they lie. Scratch must not move once it is in
		// parts, so its growth is bounded beforehand.
		if cap(scratch) == 0 {
			scratch = make([]byte, 0, 32<<10)
		}
		start := 0
		for l.sent < len(l.queue) && n < batch && len(scratch)+wire.HeaderSize+smallBody <= cap(scratch) {
			f := &l.queue[l.sent]
			f.hdr.Ack = l.rx
			var hdr [wire.HeaderSize]byte
			f.hdr.Put(hdr[:])
			scratch = append(scratch, hdr[:]...)
			if len(f.body) <= smallBody {
				scratch = append(scratch, f.body...)
			} else {
				parts = append(parts, scratch[start:], f.body)
				start = len(scratch)
			}
			n += len(f.body)
			l.sent++
		}
		if first == l.sent {
			scratch = wire.AppendFrame(scratch, wire.KindAck, l.rx, nil)
		}
		if start < len(scratch) {
			parts = append(parts, scratch[start:])
		}
		l.ackDue = false
		l.toldRx, l.rxBytes = l.rx, 0
		l.mu.Unlock()
		l.lastSaid.Store(time.Now().UnixNano())
		_, err := parts.WriteTo(conn)
		l.mu.Lock()
		if err != nil {
			// Its reader ends too and Attach sets conn to nil; what was
			// sent is still in the queue.
			conn.Close()
			break
		}
		l.written = l.sent
		l.trim()
	}
	l.writing = false
	l.space.Broadcast()
}

// flushSoon flushes on another goroutine: the connection's reader must not
// write. Two sides that both write to a full connection, and read only then,
// would wait for each other. mu is held.
func (l *Link) flushSoon() {
	if l.writing {
		return // who writes goes on until nothing is left
	}
	go func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.flush()
	}()
}

// smallBody is the longest body that is copied rather than written from where
// it lies: below this a copy costs less than one more element of a writev.
const smallBody = 8 << 10

// trim drops the frames that have arrived, once no Write reads them. mu is held.
func (l *Link) trim() {
	n := 0
	for n < l.written && n < len(l.queue) && l.queue[n].hdr.Seq <= l.acked {
		f := &l.queue[n]
		l.bytes -= len(f.body)
		f.buf.Free()
		*f = frame{}
		n++
	}
	if n == 0 {
		return
	}
	l.queue = l.queue[n:]
	if len(l.queue) == 0 {
		l.queue = nil
	}
	l.sent -= n
	l.written -= n
	l.space.Broadcast()
}

// receive reads one frame. The body is nil if it has no number.
func (l *Link) receive(conn net.Conn, r *bufio.Reader) (h wire.Header, body *Buf, err error) {
	var b [wire.HeaderSize]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return h, nil, err
	}
	l.lastHeard.Store(time.Now().UnixNano())
	h, err = wire.ParseHeader(b[:])
	if err != nil {
		return h, nil, err
	}
	if !h.Kind.Numbered() {
		switch {
		case h.Length != 0:
			return h, nil, fmt.Errorf("frame of kind %d with a body of %d bytes", h.Kind, h.Length)
		case h.Kind == wire.KindFenced:
			return h, nil, ErrFenced
		case h.Kind != wire.KindAck:
			return h, nil, fmt.Errorf("greeting of kind %d in the middle of a connection", h.Kind)
		}
	} else {
		body = NewBuf(int(h.Length))
		for got := 0; got < len(body.B); {
			n, err := r.Read(body.B[got:])
			if err != nil {
				body.Free()
				return h, nil, err
			}
			got += n
			// A frame of a megabyte takes a second on a slow link.
			l.lastHeard.Store(time.Now().UnixNano())
		}
	}
	if err := l.account(conn, h, body); err != nil {
		body.Free()
		return h, nil, err
	}
	return h, body, nil
}

// account notes what a frame's header says.
func (l *Link) account(conn net.Conn, h wire.Header, body *Buf) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn != conn || l.closed {
		return ErrClosed
	}
	if h.Ack > l.acked {
		if h.Ack >= l.next {
			return fmt.Errorf("peer acknowledges frame %d; %d is the last", h.Ack, l.next-1)
		}
		l.acked = h.Ack
		l.trim()
	}
	if body == nil {
		return nil
	}
	if h.Seq != l.rx+1 {
		return fmt.Errorf("frame %d arrived, expected %d", h.Seq, l.rx+1)
	}
	l.rx++
	l.rxBytes += len(body.B)
	if l.owesAck() {
		l.ackDue = true
		l.flushSoon()
	}
	return nil
}

// owesAck tells whether the other side keeps much that has arrived. mu is held.
func (l *Link) owesAck() bool { return l.rx-l.toldRx >= ackFrames || l.rxBytes >= ackBytes }

// ErrFenced is the end of a connection whose session was told that it is over.
var ErrFenced = errors.New("fenced: the capsule has a newer epoch")

// Fence tells the other side that the session is over and closes the link.
func (l *Link) Fence() {
	l.mu.Lock()
	conn := l.conn
	l.closed = true
	l.space.Broadcast()
	if conn != nil {
		// A peer that does not read must not keep a fence up for ever.
		conn.SetWriteDeadline(time.Now().Add(time.Second))
	}
	for l.writing {
		l.space.Wait()
	}
	rx := l.rx
	l.mu.Unlock()
	if conn != nil {
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = conn.Write(wire.AppendFrame(nil, wire.KindFenced, rx, nil)) // best effort: a later greeting is refused
		conn.Close()
	}
}
