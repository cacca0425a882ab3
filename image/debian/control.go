package debian

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Paragraph is one paragraph of a control file: Packages, Release, a .deb's
// control, a copyright file, apt's *.sources. Field names are kept as written.
type Paragraph []Field

// Field is one field. The lines of a long value are joined by "\n", each
// without its leading space.
type Field struct{ Name, Value string }

// Get is the value of the field of that name, in any case, or "".
func (p Paragraph) Get(name string) string {
	for _, f := range p {
		if strings.EqualFold(f.Name, name) {
			return f.Value
		}
	}
	return ""
}

const (
	maxLine      = 1 << 20 // Packages' longest line today has 60 kB (a Provides)
	maxParagraph = 16 << 20
)

// ReadControl calls each with every paragraph of r. The paragraph is valid
// only during the call. Comment lines (#) are skipped.
func ReadControl(r io.Reader, each func(Paragraph) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 64<<10), maxLine)
	var p Paragraph
	var more []string // the last field's further lines; joined once, for Release has thousands
	size, line := 0, 0
	endField := func() {
		if len(more) > 0 {
			last := &p[len(p)-1]
			last.Value = strings.Join(append([]string{last.Value}, more...), "\n")
			more = more[:0]
		}
	}
	flush := func() error {
		if len(p) == 0 {
			return nil
		}
		endField()
		err := each(p)
		p, size = p[:0], 0
		return err
	}
	for s.Scan() {
		line++
		text := strings.TrimRight(s.Text(), " \t\r")
		switch {
		case text == "":
			if err := flush(); err != nil {
				return err
			}
		case text[0] == '#':
		case text[0] == ' ' || text[0] == '\t':
			if len(p) == 0 {
				return fmt.Errorf("line %d: continues a field, but there is none", line)
			}
			more = append(more, strings.TrimLeft(text, " \t"))
		default:
			name, value, ok := strings.Cut(text, ":")
			if !ok || name == "" || strings.ContainsAny(name, " \t") {
				return fmt.Errorf("line %d: %.40q is not \"Field: value\"", line, text)
			}
			endField()
			p = append(p, Field{name, strings.TrimSpace(value)})
		}
		if size += len(text); size > maxParagraph {
			return fmt.Errorf("line %d: paragraph has more than %d bytes", line, maxParagraph)
		}
	}
	if err := s.Err(); err != nil {
		if errors.Is(err, bufio.ErrTooLong) {
			err = fmt.Errorf("line %d has more than %d bytes", line+1, maxLine)
		}
		return err
	}
	return flush()
}
