// Package console is what a person in front of a node sees on every console that the kernel
// uses: a panel with status and bars of all nodes on a screen, a short block and
// a line for each node that changes on a serial line; and a writer for messages
// that never blocks on a slow or unplugged serial line.
package console

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
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

// Run shows the status and the nodes on the consoles devs until ctx ends.
// keys says that their keyboards are ours: Enter then shows all again, and a
// screen belongs to nobody else, so that a panel may stay on it. changed is told of changes of the status.
func Run(ctx context.Context, devs []string, keys bool, src Source, changed <-chan struct{}) {
	var wg sync.WaitGroup
	defer wg.Wait()
	var lines []string
	for _, dev := range devs {
		if !keys || !isScreen(dev) {
			lines = append(lines, dev)
			continue
		}
		wg.Go(func() {
			out := Open([]string{dev})
			defer out.finish()
			Panel(ctx, out, func() (int, int) { return size(dev) }, src)
		})
	}
	out := Open(lines)
	defer out.finish()
	var enter <-chan struct{}
	if keys {
		enter = Keys(ctx, lines)
	}
	Show(ctx, out, src, changed, enter)
}

// isScreen reports whether a console is a virtual terminal of the kernel: tty and a number.
func isScreen(dev string) bool {
	number, ok := strings.CutPrefix(dev, "/dev/tty")
	_, err := strconv.Atoi(number)
	return ok && err == nil
}

// size is that of a terminal; zeros if it does not know.
func size(dev string) (width, height int) {
	f, err := openTTY(dev)
	if err != nil {
		return 0, 0
	}
	defer f.Close()
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0, 0
	}
	return int(ws.Col), int(ws.Row)
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

// lastWrite is how long the end of an agent waits for its last output.
const lastWrite = 300 * time.Millisecond

func (c *Consoles) finish() {
	c.Flush(lastWrite)
	c.Close()
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
