package monitor

import (
	"bytes"
	"unicode/utf8"
)

// Key is a key that was pressed: a character, or one of the following.
type Key rune

const (
	CtrlC Key = 3
	CtrlL Key = 12

	Up Key = -1 - iota
	Down
	Right
	Left
	Home
	End
	PageUp
	PageDown
	// Other is a key that means nothing here.
	Other
)

const escape = 0x1b

// finals are the keys by the last byte of their control sequence, and numbered
// those that send a number and '~' (ECMA-48; the numbers are the VT220's).
var (
	finals   = map[byte]Key{'A': Up, 'B': Down, 'C': Right, 'D': Left, 'H': Home, 'F': End}
	numbered = map[string]Key{"1": Home, "4": End, "5": PageUp, "6": PageDown, "7": Home, "8": End}
)

// Keys reads what a terminal sent. rest is the beginning of something that is
// not all there; the caller gives it again in front of what comes next.
func Keys(b []byte) (keys []Key, rest []byte) {
	for len(b) > 0 {
		k, n := key(b)
		if n == 0 {
			return keys, b
		}
		keys = append(keys, k)
		b = b[n:]
	}
	return keys, nil
}

// maxSequence bounds a control sequence: what is longer is noise.
const maxSequence = 16

// key reads one key of n bytes; n is 0 when it is not all there.
func key(b []byte) (k Key, n int) {
	if b[0] != escape {
		if !utf8.FullRune(b) {
			return Other, 0
		}
		r, n := utf8.DecodeRune(b)
		if r == utf8.RuneError {
			return Other, n
		}
		return Key(r), n
	}
	if len(b) < 2 {
		return Other, 0
	}
	if b[1] != '[' && b[1] != 'O' {
		return Other, 1 // the key escape itself, and then another
	}
	end := bytes.IndexFunc(b[2:], func(r rune) bool { return r >= 0x40 && r <= 0x7e })
	switch {
	case end < 0 && len(b) < maxSequence:
		return Other, 0
	case end < 0 || end+3 > maxSequence:
		return Other, 2
	}
	end += 2
	if b[end] == '~' {
		if k, ok := numbered[string(b[2:end])]; ok {
			return k, end + 1
		}
	} else if k, ok := finals[b[end]]; ok {
		return k, end + 1
	}
	return Other, end + 1
}
