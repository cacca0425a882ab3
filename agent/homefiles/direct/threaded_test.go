package direct

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

func threadedPair(t *testing.T) (r io.Reader, near *net.UnixConn, far net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].Close() })
	}
	near = ends[0].(*net.UnixConn)
	raw, err := near.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	return threaded{raw}, near, ends[1]
}

// A reader gets what comes at once and what comes late, and the end of either kind,
// whether the thread waits for it or the poller does.
func TestThreadedRead(t *testing.T) {
	for _, pause := range []time.Duration{0, attention / 2, 3 * attention} {
		r, _, far := threadedPair(t)
		go func() {
			time.Sleep(pause)
			io.WriteString(far, "word") //nolint:errcheck // the reader sees
			time.Sleep(pause)
			far.Close()
		}()
		if got, err := io.ReadAll(r); string(got) != "word" || err != nil {
			t.Errorf("after %v: %q, %v", pause, got, err)
		}

		r, near, _ := threadedPair(t)
		if err := near.SetReadDeadline(time.Now().Add(pause)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a deadline after %v: %v", pause, err)
		}

		r, near, _ = threadedPair(t)
		time.AfterFunc(pause, func() {
			near.CloseRead() //nolint:errcheck // as HangUp
			near.Close()
		})
		if n, err := r.Read(make([]byte, 1)); err == nil || n != 0 {
			t.Errorf("a connection that is closed after %v: %d, %v", pause, n, err)
		}
	}
}
