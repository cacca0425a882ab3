package boot

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/unixhttp"
)

// modeAgent is an agent whose guests leave one at each question, if they do.
func modeAgent(t *testing.T, guests int, leave bool) (*unixhttp.Client, func() bool) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	told := false
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var c api.ModeChange
		if r.Method == http.MethodPost {
			if err := unixhttp.ReadJSON(w, r, &c); err != nil {
				t.Error(err)
			}
			told = c.Leaving != nil && *c.Leaving
		} else if leave {
			guests--
		}
		unixhttp.Reply(w, api.ModeStatus{Guests: guests, Why: map[string]string{"2-7": "it has a socket"}})
	})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return unixhttp.New(socket, "agent"), func() bool { return told && guests == 0 }
}

// The power button of a node that works for others must not end what they have begun.
func TestGuestsLeaveFirst(t *testing.T) {
	var log bytes.Buffer
	agent, gone := modeAgent(t, 3, true)
	sendGuestsAway(t.Context(), agent, slog.New(slog.NewTextHandler(&log, nil)))
	if !gone() {
		t.Errorf("the machine ends and has guests: %s", log.String())
	}
}

// And a machine whose guests cannot leave, or whose agent is dead, must still end.
func TestMachineEndsWithGuests(t *testing.T) {
	var log bytes.Buffer
	agent, _ := modeAgent(t, 1, false)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	sendGuestsAway(ctx, agent, slog.New(slog.NewTextHandler(&log, nil)))
	if !strings.Contains(log.String(), "it has a socket") {
		t.Errorf("it does not say which guest ends, and why it was not moved: %s", log.String())
	}
	began := time.Now()
	sendGuestsAway(t.Context(), unixhttp.New(filepath.Join(t.TempDir(), "none"), "agent"), slog.New(slog.DiscardHandler))
	if took := time.Since(began); took > leaveAsk+time.Second {
		t.Errorf("without an agent it takes %s", took)
	}
}
