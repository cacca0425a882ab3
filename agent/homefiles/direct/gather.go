package direct

import (
	"bufio"
	"io"
	"net"
	"sync"
	"syscall"
)

// maxRecord is the most that TLS puts into one record, in bytes (RFC 8446, section 5.1).
const maxRecord = 16 << 10

// gatherSize is how much goes to, or comes from, the kernel at once.
const gatherSize = 256 << 10

// gather is a connection below TLS, which writes and reads it by the record.
type gather struct {
	net.Conn
	in *bufio.Reader

	mu sync.Mutex
	// The following is guarded by mu.
	held bool   // what is written is kept
	out  []byte // what was kept
	err  error  // of a write
}

// newGather gathers on c; with threads, a read waits as threaded does.
func newGather(c net.Conn, threads bool) *gather {
	var r io.Reader = c
	if s, ok := c.(syscall.Conn); ok && threads {
		if raw, err := s.SyscallConn(); err == nil {
			r = threaded{raw}
		}
	}
	return &gather{Conn: c, in: bufio.NewReaderSize(r, gatherSize)}
}

func (g *gather) Read(p []byte) (int, error) { return g.in.Read(p) }

func (g *gather) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return 0, g.err
	}
	if !g.held {
		return g.Conn.Write(p)
	}
	if len(g.out)+len(p) > gatherSize {
		g.flush()
	}
	g.out = append(g.out, p...)
	return len(p), g.err
}

// hold keeps what is written until release, or until it is much.
func (g *gather) hold() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = true
	if g.out == nil {
		g.out = make([]byte, 0, gatherSize)
	}
}

func (g *gather) release() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held = false
	g.flush()
	return g.err
}

// flush writes what was kept. mu is held.
func (g *gather) flush() {
	if g.err == nil && len(g.out) > 0 {
		_, g.err = g.Conn.Write(g.out)
	}
	g.out = g.out[:0]
}
