package console

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/monitor"
)

const (
	// panelWidth and logRows are what a screen must have: columns, and
	// rows below the panel for messages.
	panelWidth = 40
	logRows    = 8
)

// Panel keeps status and bars in the upper part of a screen, drawn anew each second in place,
// until ctx ends. Messages, the kernel's too, scroll below it: the panel is outside of
// the terminal's scrolling region (DECSTBM, which the Linux console has; console_codes(4)).
// size is asked each time, as the font may change; a screen too small gets no panel.
func Panel(ctx context.Context, out io.Writer, size func() (width, height int), src Source) {
	var p panel
	defer func() { io.WriteString(out, p.leave()) }()
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		width, height := size()
		io.WriteString(out, p.draw(panelLines(src.Status(), src.Members(), width, height), height))
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// panelLines is what the panel shows; nothing on a screen that is too small.
func panelLines(st api.AgentStatus, t api.MemberTable, width, height int) []string {
	lines := strings.Split(strings.Trim(Block(st), "\n"), "\n")
	room := height - logRows - len(lines) - 1 // a line below it
	if width < panelWidth || room < 2 {
		return nil
	}
	if members := t.Members; len(members) > 0 {
		shown := len(members)
		if room < shown+1 {
			shown = max(0, room-2)
		}
		for _, l := range monitor.Bars(members[:shown], width-3) {
			lines = append(lines, "  "+l)
		}
		if shown < len(members) {
			lines = append(lines, "  "+rest(members[shown:]))
		}
	}
	// Behind the last column the terminal could not erase the rest of a line
	// without the line's last character.
	width--
	for i, l := range lines {
		if r := []rune(l); len(r) > width {
			lines[i] = string(r[:width])
		}
	}
	return append(lines, strings.Repeat("-", width))
}

// panel is what a screen has been told.
type panel struct{ rows, height int }

// draw is the output that shows lines. The cursor, which is where messages go on,
// stays where it is, but when the panel takes other rows than before.
func (p *panel) draw(lines []string, height int) string {
	if len(lines) == 0 {
		return p.leave()
	}
	var b strings.Builder
	if p.rows != len(lines) || p.height != height {
		// Setting the region moves the cursor, maybe into the panel's rows.
		fmt.Fprintf(&b, "\x1b[%d;%dr\x1b[%d;1H", len(lines)+1, height, height)
		for y := len(lines); y < p.rows; y++ { // what the panel leaves
			fmt.Fprintf(&b, "\x1b7\x1b[%d;1H\x1b[K\x1b8", y+1)
		}
		p.rows, p.height = len(lines), height
	}
	b.WriteString("\x1b7")
	for y, l := range lines {
		fmt.Fprintf(&b, "\x1b[%d;1H\x1b[0m%s\x1b[K", y+1, l)
	}
	b.WriteString("\x1b8")
	return b.String()
}

// leave gives the whole screen back to the messages.
func (p *panel) leave() string {
	if p.rows == 0 {
		return ""
	}
	*p = panel{}
	return "\x1b7\x1b[r\x1b8"
}
