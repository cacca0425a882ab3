package nodecli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/unixhttp"
)

func newMosmonCmd(env *Env) *cobra.Command {
	var once, asJSON bool
	var socket string
	cmd := &cobra.Command{
		Use:   "mosmon",
		Short: "Show the machines of the cluster and their loads",
		Long: `mosmon shows one line for each machine, as this machine's agent has heard of it:
its state, its load (runnable processes, as a bar against its CPUs), how much
of its CPUs and memory is used, the jobs that are guests there, and how old
that news is. In a terminal it is repainted each second until q is pressed.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			ask := func(ctx context.Context) (api.MemberTable, error) {
				ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
				defer cancel()
				var t api.MemberTable
				return t, unixhttp.New(socket, "agent").Get(ctx, api.PathMembers, &t)
			}
			in, inTerm := terminal(env.Stdin)
			out, outTerm := terminal(env.Stdout)
			if !once && !asJSON && inTerm && outTerm {
				return watch(c.Context(), in, out, ask)
			}
			t, err := ask(c.Context())
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(env.Stdout)
				e.SetIndent("", "  ")
				return e.Encode(t)
			}
			width := 80
			if outTerm {
				width, _ = size(out)
			}
			_, err = io.WriteString(env.Stdout, memberTable(t, width))
			return err
		},
	}
	f := cmd.Flags()
	f.BoolVar(&once, "once", false, "print the table once and end")
	f.BoolVar(&asJSON, "json", false, "print the table once, as JSON")
	f.StringVar(&socket, "socket", api.AgentSocket, "the agent's unix socket")
	return cmd
}

// terminal is the file behind a stream when that is a terminal.
func terminal(stream any) (*os.File, bool) {
	f, ok := stream.(*os.File)
	if !ok {
		return nil, false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return f, err == nil
}

// size is a terminal's width and height; a serial line knows neither.
func size(f *os.File) (width, height int) {
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || ws.Col == 0 || ws.Row == 0 {
		return 80, 24
	}
	return int(ws.Col), int(ws.Row)
}

// watch repaints the table each second until q, ctrl-C or the end of ctx.
func watch(ctx context.Context, in, out *os.File, ask func(context.Context) (api.MemberTable, error)) error {
	restore, err := keystrokes(in)
	if err != nil {
		return err
	}
	defer restore()
	// The alternate screen: what was there before comes back at the end.
	io.WriteString(out, "\x1b[?1049h\x1b[?25l")
	defer io.WriteString(out, "\x1b[?25h\x1b[?1049l")

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		defer cancel()
		for buf := make([]byte, 1); ; {
			n, err := in.Read(buf)
			if err != nil && !errors.Is(err, unix.EINTR) || n == 1 && (buf[0] == 'q' || buf[0] == 'Q' || buf[0] == 3) {
				return
			}
		}
	}()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		width, height := size(out)
		text := ""
		if t, err := ask(ctx); ctx.Err() != nil {
			return nil
		} else if err != nil {
			text = "mosmon: " + err.Error() + "\n"
		} else {
			text = memberTable(t, width)
		}
		io.WriteString(out, paint(text, width, height))
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// keystrokes makes a terminal give each key at once and unseen. It is put
// back by the function returned. Output processing stays on.
func keystrokes(f *os.File) (restore func(), err error) {
	old, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	t := *old
	t.Lflag &^= unix.ICANON | unix.ECHO
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, &t); err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	return func() { _ = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, old) }, nil
}
