package direct

import (
	"errors"
	"io"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// attention is how long a thread waits for the next bytes before it leaves that to
// Go's poller.
const attention = 8 * time.Millisecond

// threaded reads a connection on the thread that waits for it. Go's poller waits on
// one thread, then wakes the one to which a goroutine is bound, as the keeper's are:
// two switches for each request, where most of them take less time than one. A
// connection that is quiet holds no thread.
type threaded struct{ raw syscall.RawConn }

func (t threaded) Read(p []byte) (n int, err error) {
	rerr := t.raw.Read(func(fd uintptr) bool {
		n, err = readSoon(int(fd), p)
		return !errors.Is(err, unix.EAGAIN)
	})
	switch {
	case rerr != nil: // closed, or the deadline is over
		return 0, rerr
	case err != nil:
		return 0, err
	case n == 0 && len(p) > 0:
		return 0, io.EOF
	}
	return n, nil
}

// readSoon is read(2) that fails with EAGAIN only when nothing comes for a while.
func readSoon(fd int, p []byte) (int, error) {
	for waited := false; ; {
		n, err := unix.Read(fd, p)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EAGAIN) || waited:
			return 0, err
		}
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(attention.Milliseconds()))
		// A signal, as Go's own are, only makes it wait anew.
		if err != nil && !errors.Is(err, unix.EINTR) {
			return 0, err
		}
		waited = err == nil && n == 0
	}
}
