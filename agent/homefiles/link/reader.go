package link

import (
	"bufio"
	"net"
	"sync"
	"time"
)

// Patience is how long a Handle may take before another goroutine reads on; twice
// that at most. To hand each frame to another goroutine would need none, but costs
// a request of a file's attributes as much again as the request itself.
const Patience = 5 * time.Millisecond

// reader reads one connection: one goroutine at a time does.
type reader struct {
	l    *Link
	conn net.Conn
	r    *bufio.Reader
	done chan error // gets the connection's end

	mu sync.Mutex
	// The following is guarded by mu.
	turn    uint64 // counts the handles
	busy    bool   // one is under way, of the goroutine that reads
	owner   uint64 // counts the goroutines
	seen    uint64 // turn when the watch looked last
	watched bool   // the watch's timer runs
	timer   *time.Timer
}

// read reads a connection to its end.
func (l *Link) read(conn net.Conn, r *bufio.Reader) error {
	rd := &reader{l: l, conn: conn, r: r, done: make(chan error, 1)}
	go l.readers(func(h Handle) { rd.run(0, h) })
	return <-rd.done
}

// run reads until the connection ends or another goroutine reads on.
func (rd *reader) run(me uint64, handle Handle) {
	for {
		h, body, err := rd.l.receive(rd.conn, rd.r)
		if err != nil {
			rd.done <- err
			return
		}
		if body == nil {
			continue
		}
		more := rd.r.Buffered() > 0
		if rd.l.inTurn {
			handle(h, body, more)
			continue
		}
		rd.begin()
		handle(h, body, more)
		if !rd.end(me) {
			return
		}
	}
}

func (rd *reader) begin() {
	rd.mu.Lock()
	defer rd.mu.Unlock()
	rd.turn++
	rd.busy = true
	switch {
	case rd.watched:
	case rd.timer == nil:
		rd.watched = true
		rd.timer = time.AfterFunc(Patience, rd.look)
	default:
		rd.watched = true
		rd.timer.Reset(Patience)
	}
}

// end tells whether the goroutine goes on to read.
func (rd *reader) end(me uint64) bool {
	rd.mu.Lock()
	defer rd.mu.Unlock()
	if rd.owner != me {
		return false
	}
	rd.busy = false
	return true
}

// look lets another goroutine read on if the handle that it saw last is still
// under way. It looks for as long as there is something to do.
func (rd *reader) look() {
	rd.mu.Lock()
	defer rd.mu.Unlock()
	idle := rd.turn == rd.seen && !rd.busy
	if rd.busy && rd.turn == rd.seen {
		rd.busy = false
		rd.owner++
		me := rd.owner
		go rd.l.readers(func(h Handle) { rd.run(me, h) })
	}
	rd.seen = rd.turn
	if rd.watched = !idle; rd.watched {
		rd.timer.Reset(Patience)
	}
}
