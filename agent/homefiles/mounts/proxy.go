package mounts

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/upgrade"
)

// proxyRequest is the line with which a mount asks for its home.
type proxyRequest struct{ Home api.NodeID }

// lineTime and maxLine bound that line.
const (
	lineTime = 10 * time.Second
	maxLine  = 128
)

// Listen opens the socket of Proxy, for root only, in place of one that an earlier
// agent has left.
func Listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Environment, "listen on", path, err, "")
	}
	l, err := net.Listen("unix", path)
	if err == nil {
		err = os.Chmod(path, 0o600)
	}
	if err != nil {
		return nil, fault.New(fault.Environment, "listen on", path, err, "")
	}
	return l, nil
}

// Proxy connects mounts with their homes until ctx ends: dial makes a connection
// to a home that is authenticated and encrypted.
func Proxy(ctx context.Context, l net.Listener, dial func(context.Context, api.NodeID) (net.Conn, error), log *slog.Logger) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		go func() {
			if err := proxy(ctx, c, dial); err != nil {
				log.Debug("home files", "err", err)
			}
		}()
	}
}

func proxy(ctx context.Context, c net.Conn, dial func(context.Context, api.NodeID) (net.Conn, error)) error {
	defer c.Close()
	if err := onlyRoot(c); err != nil {
		return err
	}
	if err := c.SetDeadline(time.Now().Add(lineTime)); err != nil {
		return err
	}
	req, err := readRequest(c)
	if err != nil {
		return err
	}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return err
	}
	home, err := dial(ctx, req.Home)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { home.Close(); c.Close() })
	defer stop()
	upgrade.Splice(c, home)
	return nil
}

// readRequest reads the line and not a byte more.
func readRequest(r io.Reader) (req proxyRequest, err error) {
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(r, b); err != nil {
			return req, err
		}
		if b[0] == '\n' {
			return req, json.Unmarshal(line, &req)
		}
		if line = append(line, b[0]); len(line) > maxLine {
			return req, errors.New("the first line does not end")
		}
	}
}

func onlyRoot(c net.Conn) error {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return errors.New("not a unix socket")
	}
	rc, err := uc.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := rc.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if cerr == nil && cred.Uid != 0 {
		cerr = fault.New(fault.Refused, "ask for", "home files", "only root may", "")
	}
	return cerr
}
