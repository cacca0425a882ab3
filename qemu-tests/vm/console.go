package vm

import (
	"bytes"
	"io"
	"os"
	"regexp"
	"strings"
)

// tailBytes is how much of a console's end is looked at.
const tailBytes = 32 << 10

// Tail is the last n lines of a console or log, readable: without terminal
// control sequences, empty lines and lines that repeat. A file that does not
// exist has none.
func Tail(name string, n int) []string {
	f, err := os.Open(name)
	if err != nil {
		return nil
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil
	}
	b, err := io.ReadAll(io.NewSectionReader(f, max(0, st.Size()-tailBytes), tailBytes))
	if err != nil {
		return nil
	}
	lines := clean(b)
	return lines[max(0, len(lines)-n):]
}

// Terminal control sequences (ECMA-48). Colours stand inside lines; the rest
// moves the cursor, so what follows is a line of its own.
var (
	colours = regexp.MustCompile(`\x1b\[[0-9;]*m`)
	moves   = regexp.MustCompile(`\x1b(\[[0-9;?=]*[ -/]*[@-~]|[()][0-9A-Za-z]|[=>78cDEHM])`)
)

// clean makes console output readable.
func clean(b []byte) []string {
	b = colours.ReplaceAll(b, nil)
	b = moves.ReplaceAll(b, []byte("\n"))
	b = bytes.ReplaceAll(b, []byte("\r"), []byte("\n"))
	var lines []string
	for line := range strings.SplitSeq(string(b), "\n") {
		line = strings.TrimRight(strings.Map(func(r rune) rune {
			if r == '\t' {
				return ' '
			}
			if r < ' ' || r == 0x7f || r == 0xfffd {
				return -1
			}
			return r
		}, line), " ")
		if line == "" || (len(lines) > 0 && lines[len(lines)-1] == line) {
			continue
		}
		lines = append(lines, line)
	}
	return lines
}

// Panicked is the kernel's last word if the console ends in a panic.
func Panicked(consoleLog string) string {
	for _, line := range Tail(consoleLog, 1000) {
		if _, after, ok := strings.Cut(line, "Kernel panic - not syncing: "); ok && !strings.HasPrefix(after, "---") {
			return "Kernel panic: " + strings.TrimSuffix(after, " ]---")
		}
	}
	return ""
}
