package monitor

import (
	"strings"
	"unicode/utf8"
)

// style is how a character looks where there are colours.
type style uint8

const (
	plain style = iota
	bold
	dim
	good
	warm
	hot
)

// sgr are the styles for ECMA-48's "select graphic rendition".
var sgr = [...]string{plain: "0", bold: "0;1", dim: "0;2", good: "0;32", warm: "0;33", hot: "0;31"}

type cell struct {
	r rune
	s style
}

// Frame is a screenful of characters.
type Frame struct{ rows [][]cell }

func newFrame(width, height int) Frame {
	f := Frame{rows: make([][]cell, max(0, height))}
	for y := range f.rows {
		f.rows[y] = make([]cell, max(0, width))
		for x := range f.rows[y] {
			f.rows[y][x].r = ' '
		}
	}
	return f
}

// Width is the number of columns.
func (f Frame) Width() int {
	if len(f.rows) == 0 {
		return 0
	}
	return len(f.rows[0])
}

// put writes text from column x on; what does not fit is cut.
func (f Frame) put(x, y int, text string, s style) {
	if y < 0 || y >= len(f.rows) {
		return
	}
	for _, r := range text {
		if x >= 0 && x < len(f.rows[y]) {
			f.rows[y][x] = cell{r, s}
		}
		x++
	}
}

// right writes text so that it ends before column x.
func (f Frame) right(x, y int, text string, s style) {
	f.put(x-utf8.RuneCountInString(text), y, text, s)
}

// centre writes text in the middle of the width columns from x on, cut to them.
func (f Frame) centre(x, y, width int, text string, s style) {
	text = cut(text, width)
	f.put(x+(width-utf8.RuneCountInString(text))/2, y, text, s)
}

// Lines are the rows as plain text, without blanks at their ends.
func (f Frame) Lines() []string {
	out := make([]string, len(f.rows))
	for y := range f.rows {
		out[y] = line(f.rows[y], false)
	}
	return out
}

// Coloured are the rows with the escape sequences of their colours; each row
// ends in the terminal's own style.
func (f Frame) Coloured() []string {
	out := make([]string, len(f.rows))
	for y := range f.rows {
		out[y] = line(f.rows[y], true)
	}
	return out
}

func line(row []cell, coloured bool) string {
	end := len(row)
	for end > 0 && row[end-1].r == ' ' {
		end--
	}
	var b strings.Builder
	now := plain
	change := func(to style) {
		if coloured && to != now {
			b.WriteString("\x1b[" + sgr[to] + "m")
			now = to
		}
	}
	for _, c := range row[:end] {
		if c.r != ' ' {
			change(c.s)
		}
		b.WriteRune(c.r)
	}
	change(plain)
	return b.String()
}

// cut is as much of text as fits in width characters.
func cut(text string, width int) string {
	if r := []rune(text); len(r) > width {
		return string(r[:max(0, width)])
	}
	return text
}

// wrap breaks text at blanks into lines of at most width characters.
func wrap(text string, width int) []string {
	width = max(1, width)
	var out []string
	now := ""
	for word := range strings.FieldsSeq(text) {
		if now != "" && utf8.RuneCountInString(now)+1+utf8.RuneCountInString(word) <= width {
			now += " " + word
			continue
		}
		if now != "" {
			out = append(out, now)
		}
		for utf8.RuneCountInString(word) > width {
			head := cut(word, width)
			out = append(out, head)
			word = word[len(head):]
		}
		now = word
	}
	if now != "" {
		out = append(out, now)
	}
	return out
}
