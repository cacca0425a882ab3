package labport

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// hostPoll is how often a guest without a host looks for one. The kernel
// reports that state by a read of 0 bytes, and offers no wait for its end.
const hostPoll = 250 * time.Millisecond

// Open finds the lab's port on this machine and opens it. There is no udev in
// the image, so the device is found by name in sysfs.
func Open() (io.ReadWriteCloser, error) {
	names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil || strings.TrimSpace(string(b)) != PortName {
			continue
		}
		dev := "/dev/" + filepath.Base(filepath.Dir(n))
		// Blocking on purpose: a write then waits for a host, where a
		// non-blocking one would fail without a later wake-up.
		fd, err := unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fault.New(fault.Environment, "open lab port", dev, err, "")
		}
		return &device{f: os.NewFile(uintptr(fd), dev), closed: make(chan struct{})}, nil
	}
	return nil, fault.New(fault.NotFound, "open lab port", PortName, "this machine has no such virtio-serial port", "")
}

// OpenWait is Open for an init that runs before the driver is there: it tries
// until ctx ends.
func OpenWait(ctx context.Context) (io.ReadWriteCloser, error) {
	for {
		p, err := Open()
		if err == nil || fault.KindOf(err) != fault.NotFound {
			return p, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(hostPoll):
		}
	}
}

// device is the guest's end of the port.
type device struct {
	f      *os.File
	closed chan struct{}
}

// Read waits for a host instead of reporting the end that the kernel reports
// while none is connected.
func (d *device) Read(p []byte) (int, error) {
	for {
		n, err := d.f.Read(p)
		if n > 0 || (err != nil && !errors.Is(err, io.EOF)) {
			return n, err
		}
		select {
		case <-d.closed:
			return 0, io.EOF
		case <-time.After(hostPoll):
		}
	}
}

// Write implements io.Writer; it blocks while no host is connected.
func (d *device) Write(p []byte) (int, error) { return d.f.Write(p) }

// Close lets the descriptor go. A Read or Write that waits in the kernel ends
// only when the host does something.
func (d *device) Close() error {
	select {
	case <-d.closed:
		return nil
	default:
		close(d.closed)
	}
	return d.f.Close()
}
