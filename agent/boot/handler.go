package boot

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
)

// handler writes log records as short lines for a person at the console.
type handler struct {
	out   func(line string)
	attrs []slog.Attr
}

func (h *handler) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelInfo }

func (h *handler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	b.WriteString("init: ")
	if r.Level >= slog.LevelError {
		b.WriteString("FAILED: ")
	}
	b.WriteString(r.Message)
	add := func(a slog.Attr) bool {
		fmt.Fprintf(&b, ", %s: %v", strings.ReplaceAll(a.Key, "_", " "), a.Value)
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	b.WriteByte('\n')
	h.out(b.String())
	return nil
}

func (h *handler) WithAttrs(as []slog.Attr) slog.Handler {
	return &handler{out: h.out, attrs: append(slices.Clip(h.attrs), as...)}
}

// WithGroup is not used by init.
func (h *handler) WithGroup(string) slog.Handler { return h }
