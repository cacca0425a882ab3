package console

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
)

// Block is the status of a machine for the person in front of it: a few short
// lines, nothing secret.
func Block(s api.AgentStatus) string {
	var b strings.Builder
	line := func(key, format string, args ...any) {
		fmt.Fprintf(&b, "  %-12s %s\n", key, fmt.Sprintf(format, args...))
	}
	b.WriteString("\n")
	switch s.State {
	case api.StateMember:
		line("mosimg", "node %d, %s: member", s.Node, s.Name)
	default:
		line("mosimg", "%s", s.State)
	}
	if s.Reason != "" {
		line("", "%s", s.Reason)
	}
	if s.Address != "" || s.MAC != "" {
		line("address", "%s", strings.TrimSpace(s.Address+" "+s.MAC))
	}
	if s.Fingerprint != "" {
		line("fingerprint", "%s", s.Fingerprint)
	}
	if s.State == api.StatePending {
		line("", "on the head: mosimg node approve %s", s.Fingerprint)
	}
	if s.Head != "" {
		line("head", "%s", s.Head)
	}
	switch c := s.CRIU; {
	case c.Usable:
		line("migration", "CRIU %s", c.Version)
	case c.Reason != "":
		line("migration", "takes only jobs placed at start: %s", c.Reason)
	}
	b.WriteString("\n")
	return b.String()
}

const (
	// quiet is how long Enter repeats nothing: a stuck key must not fill the screen.
	quiet = time.Second
	// settle gathers changes that come in quick succession into one block.
	settle = 300 * time.Millisecond
)

// Show prints the status whenever it changes, and on Enter, until ctx ends.
// status is called from Show's goroutine; changed wakes it; enter (may be nil)
// reports that somebody pressed Enter.
func Show(ctx context.Context, out io.Writer, status func() api.AgentStatus, changed, enter <-chan struct{}) {
	var last string
	var at time.Time
	for {
		force := false
		select {
		case <-ctx.Done():
			return
		case <-changed:
			select {
			case <-ctx.Done():
				return
			case <-time.After(settle):
			}
			select { // what changed while we waited is in this block
			case <-changed:
			default:
			}
		case <-enter:
			force = time.Since(at) >= quiet
		}
		if text := Block(status()); force || text != last {
			io.WriteString(out, text)
			last, at = text, time.Now()
		}
	}
}

// Keys reports each Enter on the consoles. It takes the terminals' input, so
// it must not run where shells do.
func Keys(ctx context.Context, devs []string) <-chan struct{} {
	pressed := make(chan struct{}, 1)
	for _, dev := range devs {
		// Non-blocking, so that the runtime's poller can end the read.
		f, err := os.OpenFile(dev, os.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		context.AfterFunc(ctx, func() { f.Close() })
		go func() {
			buf := make([]byte, 256)
			for {
				n, err := f.Read(buf)
				if err != nil || n == 0 { // a hung-up line reads 0 bytes for ever
					return
				}
				select {
				case pressed <- struct{}{}:
				default:
				}
			}
		}()
	}
	return pressed
}
