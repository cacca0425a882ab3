package nodecli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
	"mosimg/internal/monitor"
)

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

// screen is a terminal that is drawn on. It is used by one goroutine, but for keys.
type screen struct {
	in, out *os.File
	colours bool
	before  *unix.Termios // the terminal's mode when it was entered; nil while it is left
	blank   bool          // the next frame is drawn on an empty screen
}

func newScreen(in, out *os.File, colours bool) *screen {
	return &screen{in: in, out: out, colours: colours}
}

// enter makes the terminal give each key at once and unseen, and switches to its second
// screen, so that what was there before comes back at the end. Signals and output
// processing stay on.
func (s *screen) enter() error {
	before, err := unix.IoctlGetTermios(int(s.in.Fd()), unix.TCGETS)
	if err != nil {
		return fault.New(fault.Environment, "set up", "the terminal", err, "print once: mosmon --once")
	}
	t := *before
	t.Lflag &^= unix.ICANON | unix.ECHO
	t.Iflag &^= unix.IXON // ctrl-S would hold up the next frame, and with it q and TERM
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(s.in.Fd()), unix.TCSETS, &t); err != nil {
		return fault.New(fault.Environment, "set up", "the terminal", err, "print once: mosmon --once")
	}
	s.before, s.blank = before, true
	_, _ = io.WriteString(s.out, "\x1b[?1049h\x1b[?25l") // the first frame tells a terminal that is gone
	return nil
}

// leave puts the terminal back into the mode that enter has found; again, it does nothing.
func (s *screen) leave() {
	if s.before == nil {
		return
	}
	_ = unix.IoctlSetTermios(int(s.in.Fd()), unix.TCSETS, s.before)
	s.before = nil
	_, _ = io.WriteString(s.out, "\x1b[0m\x1b[?25h\x1b[?1049l")
}

func (s *screen) size() (width, height int) { return size(s.out) }

// clear makes the next frame begin on an empty screen: something else may be on it.
func (s *screen) clear() { s.blank = true }

// draw writes a frame over the one before. It never writes a newline, which would
// scroll the last row.
func (s *screen) draw(f monitor.Frame) error {
	text := f.Lines()
	lines := text
	if s.colours {
		lines = f.Coloured()
	}
	var b strings.Builder
	if s.blank {
		b.WriteString("\x1b[2J")
		s.blank = false
	}
	for y, l := range lines {
		fmt.Fprintf(&b, "\x1b[%d;1H%s", y+1, l)
		if utf8.RuneCountInString(text[y]) < f.Width() { // else the last character would go
			b.WriteString("\x1b[K")
		}
	}
	_, err := io.WriteString(s.out, b.String())
	return err
}

// keyWait is how long the rest of a key may be under way, and how soon keys notices the end of ctx.
const keyWait = 100 * time.Millisecond

// keys hands over what is typed, until ctx ends or the terminal is gone.
func (s *screen) keys(ctx context.Context, pressed chan<- []monitor.Key) {
	fds := []unix.PollFd{{Fd: int32(s.in.Fd()), Events: unix.POLLIN}}
	var rest []byte
	buf := make([]byte, 256)
	for ctx.Err() == nil {
		n, err := unix.Poll(fds, int(keyWait.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return
		case n == 0:
			rest = nil // the key escape alone
			continue
		}
		n, err = unix.Read(int(s.in.Fd()), buf)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case err != nil || n <= 0:
			return
		}
		var list []monitor.Key
		list, rest = monitor.Keys(append(rest, buf[:n]...))
		if len(list) == 0 {
			continue
		}
		select {
		case pressed <- list:
		case <-ctx.Done():
			return
		}
	}
}
