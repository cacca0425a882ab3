package nodecli

import (
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// modeAgent is an agent with a mode, whose guests leave one at each question.
func modeAgent(t *testing.T, st *api.ModeStatus) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathMode, func(w http.ResponseWriter, _ *http.Request) {
		st.Guests, st.Away = max(0, st.Guests-1), max(0, st.Away-1)
		st.Why = nil
		unixhttp.Reply(w, st)
	})
	mux.HandleFunc("POST "+api.PathMode, func(w http.ResponseWriter, r *http.Request) {
		var c api.ModeChange
		if err := unixhttp.ReadJSON(w, r, &c); err != nil {
			t.Error(err)
		}
		for _, x := range []struct{ to, from *bool }{
			{&st.Blocked, c.Blocked}, {&st.Stay, c.Stay}, {&st.LocalStay, c.LocalStay}, {&st.Leaving, c.Leaving}, {&st.Bringing, c.Bringing},
		} {
			if x.from != nil {
				*x.to = *x.from
			}
		}
		unixhttp.Reply(w, st)
	})
	srv := &http.Server{Handler: mux}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return socket
}

// The verbs mean what MOSIX's do: expel acts as block, bring as lstay, and their
// opposites take all of it back.
func TestMosctlModes(t *testing.T) {
	for _, tc := range []struct {
		verbs string
		want  api.Mode
	}{
		{"block", api.Mode{Blocked: true}},
		{"block noblock", api.Mode{}},
		{"stay", api.Mode{Stay: true}},
		{"stay nostay", api.Mode{}},
		{"lstay", api.Mode{LocalStay: true}},
		{"lstay nolstay", api.Mode{}},
		{"expel", api.Mode{Blocked: true, Leaving: true}},
		{"expel noblock", api.Mode{}},
		{"bring", api.Mode{LocalStay: true, Bringing: true}},
		{"bring nolstay", api.Mode{}},
	} {
		st := &api.ModeStatus{}
		socket := modeAgent(t, st)
		for verb := range strings.FieldsSeq(tc.verbs) {
			if status, out, errs := run(t, "mosctl", verb, "--socket", socket); status != 0 || out+errs != "" {
				t.Errorf("mosctl %s: %d, %q, %q", verb, status, out, errs)
			}
		}
		if d := cmp.Diff(tc.want, st.Mode); d != "" {
			t.Errorf("mosctl %s (-want +got):\n%s", tc.verbs, d)
		}
	}
}

// expel and bring return when it is done, or an operator pulls the plug too
// early; meanwhile they say what they wait for.
func TestMosctlWaits(t *testing.T) {
	for _, verb := range []string{"expel", "bring"} {
		st := &api.ModeStatus{Guests: 2, Away: 2, Why: map[string]string{"2-7": "it has a socket"}}
		status, _, errs := run(t, "mosctl", verb, "--socket", modeAgent(t, st))
		if status != 0 || st.Guests+st.Away != 0 {
			t.Errorf("%s ended with %d, and left %+v", verb, status, st)
		}
		if !strings.Contains(errs, ": 2 ") || !strings.Contains(errs, ": 1 ") || strings.Count(errs, "it has a socket") != 1 {
			t.Errorf("%s said %q", verb, errs)
		}
	}
	if status, _, errs := run(t, "mosctl", "expel", "--socket", "/nonexistent"); status != int(fault.Unavailable) || !strings.Contains(errs, "not running") {
		t.Errorf("without an agent: %d, %q", status, errs)
	}
	if status, _, _ := run(t, "mosctl", "expel", "now"); status != int(fault.Usage) {
		t.Errorf("with a word too much: %d", status)
	}
}
