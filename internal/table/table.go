// Package table lays out what the tools show on a terminal: columns that fit a
// line, sizes and ages in a few characters, and the table of jobs that mosps
// and mosimg share.
package table

import (
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// gap is between two columns.
const gap = "  "

// Width is how long the longest line of the rows will be.
func Width(rows [][]string) int {
	total := 0
	for _, w := range widths(rows) {
		total += w + len(gap)
	}
	return max(0, total-len(gap))
}

func widths(rows [][]string) []int {
	if len(rows) == 0 {
		return nil
	}
	out := make([]int, len(rows[0]))
	for _, r := range rows {
		for c := range out {
			out[c] = max(out[c], utf8.RuneCountInString(r[c]))
		}
	}
	return out
}

// Align writes rows of equally many cells as lines. Columns in left are
// aligned to the left, the others, which are numbers, to the right.
func Align(rows [][]string, left ...int) string {
	isLeft := map[int]bool{}
	for _, c := range left {
		isLeft[c] = true
	}
	ws := widths(rows)
	var b strings.Builder
	for _, r := range rows {
		var line strings.Builder
		for c, cell := range r {
			if c > 0 {
				line.WriteString(gap)
			}
			pad := strings.Repeat(" ", ws[c]-utf8.RuneCountInString(cell))
			if isLeft[c] {
				line.WriteString(cell + pad)
			} else {
				line.WriteString(pad + cell)
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}

// Cut makes each line of text no wider than width; 0 means any width.
func Cut(text string, width int) string {
	if width <= 0 {
		return text
	}
	var b strings.Builder
	for line := range strings.Lines(text) {
		r := []rune(strings.TrimSuffix(line, "\n"))
		b.WriteString(string(r[:min(len(r), width)]) + "\n")
	}
	return b.String()
}

// Printable is text that somebody else chose: it can neither end the line nor
// tell the terminal anything.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, strings.ToValidUTF8(s, "?"))
}

// Bytes is a size in three digits or so.
func Bytes(n int64) string {
	switch g := float64(n) / (1 << 30); {
	case g >= 9.95:
		return fmt.Sprintf("%.0fG", g)
	case g >= 1:
		return fmt.Sprintf("%.1fG", g)
	case n > 0 && n < 1<<20:
		return fmt.Sprintf("%dK", n>>10)
	}
	return fmt.Sprintf("%dM", n>>20)
}

// Age is a length of time in two to four characters.
func Age(d time.Duration) string {
	switch {
	case d < 10*time.Second:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < 2*time.Minute:
		return fmt.Sprintf("%.0fs", d.Seconds())
	}
	return fmt.Sprintf("%.0fm", d.Minutes())
}
