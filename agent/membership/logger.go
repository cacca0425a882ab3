package membership

import (
	"bytes"
	"context"
	"log"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// newLogger adapts memberlist's log to slog. Everybody on the LAN can make
// memberlist complain by sending it rubbish, so that each kind of complaint
// is shown once in repeatAfter, with how often it was held back.
//
// ended, once set, silences it: memberlist's goroutines outlive its Shutdown.
func newLogger(to *slog.Logger, ended *atomic.Bool) *log.Logger {
	return log.New(&adapter{log: to, ended: ended, seen: make(map[string]*seen)}, "", 0)
}

const repeatAfter = time.Minute

// maxKinds bounds the kinds remembered; they come from memberlist's source,
// so more means that a kind is not recognised as such.
const maxKinds = 200

type adapter struct {
	log   *slog.Logger
	ended *atomic.Bool

	mu sync.Mutex // guards the following
	// seen holds when each kind of message was shown last.
	seen map[string]*seen
}

type seen struct {
	at   time.Time
	held int
}

func (a *adapter) Write(line []byte) (int, error) {
	level, text := parseLine(string(bytes.TrimSpace(line)))
	if a.ended.Load() || !a.log.Enabled(context.Background(), level) {
		return len(line), nil
	}
	held, show := a.admit(kindOf(text), time.Now())
	if show {
		var attrs []any
		if held > 0 {
			attrs = []any{"held_back", held}
		}
		a.log.Log(context.Background(), level, "gossip: "+text, attrs...)
	}
	return len(line), nil
}

func (a *adapter) admit(kind string, now time.Time) (held int, show bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.seen[kind]
	if s == nil {
		if len(a.seen) >= maxKinds {
			clear(a.seen)
		}
		a.seen[kind] = &seen{at: now}
		return 0, true
	}
	if now.Sub(s.at) < repeatAfter {
		s.held++
		return 0, false
	}
	held, s.held, s.at = s.held, 0, now
	return held, true
}

// parseLine splits "[WARN] memberlist: text". What memberlist calls an error
// is a peer or a packet that is wrong, which is a warning to us; its warnings
// and infos are its own workings.
func parseLine(line string) (slog.Level, string) {
	level := slog.LevelDebug
	if rest, ok := strings.CutPrefix(line, "["); ok {
		tag, rest, ok := strings.Cut(rest, "] ")
		if ok {
			line = rest
			if strings.HasPrefix(tag, "ERR") {
				level = slog.LevelWarn
			}
		}
	}
	return level, strings.TrimPrefix(line, "memberlist: ")
}

// kindOf is a message without what varies in it: the part up to the first
// colon or digit.
func kindOf(text string) string {
	if i := strings.IndexAny(text, ":0123456789"); i >= 0 {
		return text[:i]
	}
	return text
}
