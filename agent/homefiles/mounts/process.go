package mounts

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"mosimg/agent/homefiles/forward"
	"mosimg/agent/homefiles/process"
	"mosimg/internal/api"
)

// Verb is the first argument that makes a program which calls Main the process
// of one mount; the second is its configuration.
const Verb = "homefiles-mount"

// forwardConfig is what such a process is told.
type forwardConfig struct {
	Dir     string // the mount's folder
	Capsule string
	Epoch   uint64
	Home    api.NodeID
	Socket  string // of the agent's Proxy
	Lease   time.Duration
}

// Main is the process of one mount. Its control socket answers lines: "ready"
// when the mount answers, "drain" when nothing is on its way home any more. The
// answer is "ok" or why not.
func Main(ctx context.Context, config string, log *slog.Logger) error {
	var conf forwardConfig
	if err := json.Unmarshal([]byte(config), &conf); err != nil {
		process.Ready(err)
		return err
	}
	m := mount(conf.Dir)
	l, err := listenIn(conf.Dir, socketName)
	process.Ready(err)
	if err != nil {
		return err
	}
	defer l.Close()
	ready, over := make(chan struct{}), make(chan struct{})
	var drain func(context.Context) error
	var why error // set before over is closed
	end := sync.OnceFunc(func() { close(over) })
	cfg := forward.Config{
		Capsule: conf.Capsule, Epoch: conf.Epoch, Mountpoint: m.path(mountName), Lease: conf.Lease, Log: log,
		Ready:   func() { close(ready) },
		Failed:  func(err error) { why = err; end() },
		Control: func(f func(context.Context) error) { drain = f },
		Dial: func(ctx context.Context) (net.Conn, error) {
			var d net.Dialer
			c, err := d.DialContext(ctx, "unix", conf.Socket)
			if err != nil {
				return nil, err
			}
			if err := json.NewEncoder(c).Encode(proxyRequest{Home: conf.Home}); err != nil {
				c.Close()
				return nil, err
			}
			return c, nil
		},
	}
	go answer(ctx, l, func(ctx context.Context, line string) error {
		select {
		case <-over: // though it was ready once
			return why
		default:
		}
		select {
		case <-ready:
		case <-over:
			return why
		case <-ctx.Done():
			return errors.New("the home does not answer")
		}
		if line == "drain" {
			return drain(ctx)
		}
		return nil
	})
	err = forward.Run(ctx, cfg)
	select {
	case <-over:
	default:
		if why = err; why == nil {
			why = errors.New("the mount is over")
		}
		end()
	}
	// Who asks now is told so, for a moment; then the socket is gone, which says the same.
	time.Sleep(100 * time.Millisecond)
	return why
}

// listenIn listens on a socket in a folder with a long path.
func listenIn(dir, name string) (net.Listener, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name))
	if ul, ok := l.(*net.UnixListener); ok {
		ul.SetUnlinkOnClose(false) // the folder's descriptor is another by then
	}
	return l, err
}

// answer answers one line on each connection.
func answer(ctx context.Context, l net.Listener, do func(context.Context, string) error) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			line, err := bufio.NewReader(io.LimitReader(c, 64)).ReadString('\n')
			if err != nil {
				return
			}
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			go func() { // the asker's end
				_, _ = c.Read(make([]byte, 1))
				cancel()
			}()
			word := "ok"
			if err := do(ctx, strings.TrimSpace(line)); err != nil {
				word = err.Error()
			}
			fmt.Fprintln(c, strings.ReplaceAll(word, "\n", " "))
		}()
	}
}

// ask asks a mount's process.
func ask(ctx context.Context, m mount, line string) error {
	c, err := dialIn(ctx, string(m), socketName)
	if err != nil {
		return fmt.Errorf("the process of the mount is gone: %w", err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := fmt.Fprintln(c, line); err != nil {
		return err
	}
	word, err := bufio.NewReader(io.LimitReader(c, 4096)).ReadString('\n')
	switch {
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("the home does not answer: %w", context.Cause(ctx))
	case err != nil:
		return fmt.Errorf("the process of the mount has died: %w", err)
	case strings.TrimSpace(word) != "ok":
		return errors.New(strings.TrimSpace(word))
	}
	return nil
}
