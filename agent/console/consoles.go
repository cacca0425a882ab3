// Package console is what a person in front of a node sees: a short status
// block on every console that the kernel uses, and a writer for messages that
// never blocks on a slow or unplugged serial line.
package console

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ActivePath names the consoles that the kernel writes to.
const ActivePath = "/sys/class/tty/console/active"

// queued bounds the bytes that wait for one console. A serial line at
// 115200 baud drains it in about three seconds.
const queued = 32 << 10

// Active lists the device paths of the kernel's consoles, "tty0" being the
// screen that is in front.
func Active() []string {
	data, err := os.ReadFile(ActivePath)
	if err != nil {
		return nil
	}
	var devs []string
	for name := range strings.FieldsSeq(string(data)) {
		devs = append(devs, filepath.Join("/dev", name))
	}
	return devs
}

// Consoles writes to several consoles at once. A console that does not keep
// up loses output (and is told how much) instead of holding up the writer:
// the writer may be process 1.
type Consoles struct {
	outs []*out
}

type out struct {
	dev string
	f   *os.File // used by drain only

	mu      sync.Mutex // guards the following
	cond    *sync.Cond
	buf     []byte
	dropped int
	closed  bool
	busy    bool // a write is under way
}

// Open opens the consoles given; those that cannot be opened are left out.
func Open(devs []string) *Consoles {
	c := new(Consoles)
	for _, dev := range devs {
		if f, err := openTTY(dev); err == nil {
			c.add(dev, f)
		}
	}
	return c
}

func openTTY(dev string) (*os.File, error) {
	// O_NONBLOCK: opening a serial port without carrier must not wait.
	fd, err := unix.Open(dev, unix.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), dev), nil
}

func (c *Consoles) add(dev string, f *os.File) {
	o := &out{dev: dev, f: f}
	o.cond = sync.NewCond(&o.mu)
	c.outs = append(c.outs, o)
	go o.drain()
}

// Write queues p for every console. It never blocks and never fails.
func (c *Consoles) Write(p []byte) (int, error) {
	for _, o := range c.outs {
		o.write(p)
	}
	return len(p), nil
}

func (o *out) write(p []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.buf)+len(p) > queued {
		o.dropped += len(p)
		return
	}
	o.buf = append(o.buf, p...)
	o.cond.Broadcast()
}

func (o *out) drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		for len(o.buf) == 0 && !o.closed {
			o.cond.Wait()
		}
		if len(o.buf) == 0 {
			o.f.Close()
			return
		}
		p := o.buf
		o.buf = nil
		if o.dropped > 0 {
			p = fmt.Appendf(p, "[%d bytes of messages lost: this console is slow]\n", o.dropped)
			o.dropped = 0
		}
		o.busy = true
		o.mu.Unlock()
		o.send(p)
		o.mu.Lock()
		o.busy = false
		o.cond.Broadcast()
	}
}

// send writes p, if need be to the device opened anew: when a shell on a
// terminal ends, the kernel hangs it up for everybody who has it open.
func (o *out) send(p []byte) {
	n, err := o.f.Write(p)
	if err == nil {
		return
	}
	f, err := openTTY(o.dev)
	if err != nil {
		return // the next message tries again
	}
	o.f.Close()
	o.f = f
	_, _ = o.f.Write(p[n:])
}

// Flush waits until everything is written, but no longer than limit: the last
// words before a reboot.
func (c *Consoles) Flush(limit time.Duration) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, o := range c.outs {
			o.mu.Lock()
			for len(o.buf) > 0 || o.busy {
				o.cond.Wait()
			}
			o.mu.Unlock()
		}
	}()
	select {
	case <-done:
	case <-time.After(limit):
	}
}

// Close ends the writers once their queues are empty.
func (c *Consoles) Close() {
	for _, o := range c.outs {
		o.mu.Lock()
		o.closed = true
		o.cond.Broadcast()
		o.mu.Unlock()
	}
}
