// Package rootsock is how the processes of home files on one machine talk:
// unix sockets that are root's alone, on which a connection begins with one
// line of JSON. What follows the line is for the callers to say.
package rootsock

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// MaxLine bounds a line, in bytes.
const MaxLine = 1 << 20

// lineTime bounds the wait for a connection's first line.
const lineTime = 10 * time.Second

// Listen opens a socket in place of one that a dead process has left; the
// caller knows that it is dead. The file stays when the listener is closed.
func Listen(path string) (net.Listener, error) {
	fail := func(err error) error { return fault.New(fault.Environment, "listen on", path, err, "") }
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fail(err)
	}
	short, done, err := shorten(path)
	if err != nil {
		return nil, fail(err)
	}
	defer done()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: short, Net: "unix"})
	if err != nil {
		return nil, fail(err)
	}
	l.SetUnlinkOnClose(false) // short is another name by then
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fail(err)
	}
	return l, nil
}

// Dial connects to a socket, which fails with ErrNobody if nobody listens, and
// sends the first line.
func Dial(ctx context.Context, path string, line any) (net.Conn, error) {
	short, done, err := shorten(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNobody
	} else if err != nil {
		return nil, err
	}
	defer done()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", short)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, ErrNobody
	} else if err != nil {
		return nil, err
	}
	stop := Bound(ctx, c)
	defer stop()
	if err := json.NewEncoder(c).Encode(line); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// ErrNobody is a socket on which nobody listens.
var ErrNobody = errors.New("nobody listens")

// Bound ends what waits on a connection when ctx ends, until stop is called.
func Bound(ctx context.Context, c net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) }) // fails if c is closed
}

// shorten gives a name for a path that may be longer than a socket's may be.
func shorten(path string) (short string, done func(), err error) {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(path)), func() { dir.Close() }, nil
}

// Serve hands each connection of root's, after its first line, to handle, which
// owns it, until ctx ends. It closes l.
func Serve[T any](ctx context.Context, l net.Listener, log *slog.Logger, handle func(context.Context, net.Conn, T)) error {
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				c.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil:
			// Too many open files, for one. Those who are served go on.
			log.Error("a connection cannot be accepted", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		go func() {
			var first T
			err := onlyRoot(c)
			if err == nil {
				err = readFirst(c, &first)
			}
			if err != nil {
				log.Warn("connection refused", "err", err)
				c.Close()
				return
			}
			handle(ctx, c, first)
		}()
	}
}

func readFirst(c net.Conn, v any) error {
	if err := c.SetDeadline(time.Now().Add(lineTime)); err != nil {
		return err
	}
	if err := ReadLine(c, v); err != nil {
		return err
	}
	return c.SetDeadline(time.Time{})
}

// ReadLine reads one line, and not a byte more, into v.
func ReadLine(r io.Reader, v any) error {
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(r, b); err != nil {
			if len(line) > 0 && errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if b[0] == '\n' {
			return json.Unmarshal(line, v)
		}
		if line = append(line, b[0]); len(line) > MaxLine {
			return errors.New("a line does not end")
		}
	}
}

// onlyRoot keeps users out, should the socket's mode ever not.
func onlyRoot(c net.Conn) error {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("connection is a %T", c)
	}
	rc, err := uc.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := rc.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return cerr
	}
	if err == nil && cred.Uid != 0 {
		err = fault.New(fault.Refused, "ask for", "home files", fmt.Sprintf("user %d is not root", cred.Uid), "")
	}
	return err
}
