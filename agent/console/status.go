package console

import (
	"context"
	"fmt"
	"os"
	"strings"

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
