package nodecli

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// run runs mosagent as if started with these arguments.
func run(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = Main(t.Context(), &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Args: args, Pid: 4711})
	return status, out.String(), errs.String()
}

func TestVerbByName(t *testing.T) {
	for _, tc := range []struct {
		args []string
		pid  int
		want string
	}{
		{[]string{"/init", "quiet", "splash"}, 1, "init"}, // the kernel's words are not ours
		{[]string{"/usr/bin/mosagent"}, 1, "init"},
		{[]string{"/usr/bin/mosmon", "--once"}, 5, "mosmon --once"},
		{[]string{"mosagent", "mosmon", "--once"}, 5, "mosmon --once"},
		{[]string{"/usr/bin/mosrun", "-3", "init"}, 5, "mosrun -3 init"},
		{[]string{"mosps"}, 5, "mosps"},
		{[]string{"./migrate", "1-7", "home"}, 5, "migrate 1-7 home"},
		{[]string{"/sbin/poweroff"}, 5, "poweroff"},
		{[]string{"/usr/bin/mosagent-amd64", "agent"}, 5, "agent"},
		{nil, 5, ""},
	} {
		if _, got := verbOf(tc.args, tc.pid); strings.Join(got, " ") != tc.want {
			t.Errorf("verbOf(%q, %d) = %q; want %q", tc.args, tc.pid, got, tc.want)
		}
	}
}

// Each refusal is one clear line and has the status of its kind.
func TestRefusals(t *testing.T) {
	gone := filepath.Join(t.TempDir(), "s")
	for _, tc := range []struct {
		args []string
		kind fault.Kind
		text string
	}{
		{[]string{"mosagent", "dance"}, fault.Usage, "dance"},
		{[]string{"mosagent", "agent"}, fault.Usage, "does not know its head"},
		{[]string{"mosagent", "agent", "--head", "https://h:1"}, fault.Usage, "does not know its head"},
		{[]string{"mosagent", "agent", "--nonsense"}, fault.Usage, "--help"},
		{[]string{"mosagent", "agent", "x"}, fault.Usage, "--help"},
		{[]string{"mosagent", "init"}, fault.Usage, "not process 1"},
		{[]string{"init"}, fault.Usage, "not process 1"},
		{[]string{"mosagent", "net", "--address", "10.0.0.1"}, fault.Usage, "prefix"},
		{[]string{"mosmon", "--socket", gone}, fault.Unavailable, "not running"},
		{[]string{"poweroff"}, fault.Refused, "not mosimg's init"},
		{[]string{"mosagent", "probe-criu", "--criu", t.TempDir()}, fault.Environment, "only jobs placed at start"},
	} {
		status, out, errs := run(t, tc.args...)
		if status != int(tc.kind) || !strings.Contains(errs, tc.text) || strings.Count(strings.TrimSpace(errs), "\n") > 0 || out != "" {
			t.Errorf("%q: status %d, stdout %q, stderr %q; want status %d and one line with %q", tc.args, status, out, errs, tc.kind, tc.text)
		}
	}
}

func TestHelp(t *testing.T) {
	for _, args := range [][]string{{"mosagent", "--help"}, {"mosmon", "--help"}, {"mosagent"}, {"mosrun", "--help"}, {"mosagent", "mosrun", "--help"}, {"mosps", "--help"}, {"migrate", "-h"}} {
		status, out, errs := run(t, args...)
		if status != 0 || !strings.Contains(out, "Usage:") || errs != "" {
			t.Errorf("%q: status %d, %q, %q", args, status, out, errs)
		}
	}
}

func load(l, u float64, cpus int) *api.LoadVector {
	return &api.LoadVector{Load: l, Utilisation: u, CPUs: cpus, MemTotal: 4 << 30, MemFree: 1 << 30}
}

var members = api.MemberTable{Cluster: "c", Self: 1, Members: []api.Member{
	{Node: 1, Name: "head", Self: true, Liveness: api.Alive, Load: load(0, 0.03, 4), AgeMillis: 400},
	{Node: 2, Name: "node2", Liveness: api.Alive, Load: load(8, 1, 4), AgeMillis: 1200},
	{Node: 3, Name: "node3", Liveness: api.Dead, Load: load(3, 1, 1), AgeMillis: 99000},
	{Node: 11, Name: "küche", Liveness: api.Suspect},
}}

func TestMemberTable(t *testing.T) {
	want := strings.TrimLeft(`
NODE  NAME    STATE    LOAD                     UTIL        MEM  CPUS  GUESTS   AGE
   1  head *  alive    0.00 ..................    3%  3.0G/4.0G     4       0  0.4s
   2  node2   alive    8.00 ##################  100%  3.0G/4.0G     4       0  1.2s
   3  node3   dead        -                        -          -     -       -     -
  11  küche   suspect     -                        -          -     -       -     -
`, "\n")
	if d := cmp.Diff(want, memberTable(members, 83)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	narrow := memberTable(members, 60)
	if strings.Contains(narrow, "#") {
		t.Errorf("a bar in 60 columns:\n%s", narrow)
	}
	for width := 66; width < 200; width++ {
		for line := range strings.Lines(memberTable(members, width)) {
			if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > width {
				t.Fatalf("width %d: a line of %d:\n%s", width, n, line)
			}
		}
	}
	if got := memberTable(api.MemberTable{}, 80); !strings.Contains(got, "not a member") {
		t.Errorf("no members: %q", got)
	}
}

func TestPaintFitsTheScreen(t *testing.T) {
	got := paint(strings.Repeat("äöü-0123456789\n", 50), 5, 10)
	if n := strings.Count(got, "\n"); n != 9 {
		t.Errorf("%d lines on a screen of 10; want 9", n)
	}
	if strings.Contains(got, "01") || !strings.Contains(got, "äöü-0") {
		t.Errorf("lines are not cut to the width: %q", got)
	}
}

// agentSocket is an agent that knows the table above.
func agentSocket(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathMembers, func(w http.ResponseWriter, _ *http.Request) { unixhttp.Reply(w, members) })
	srv := &http.Server{Handler: mux}
	mux.HandleFunc("GET "+api.PathStatus, func(w http.ResponseWriter, _ *http.Request) {
		unixhttp.Reply(w, api.AgentStatus{State: api.StatePending, Fingerprint: "aaaa-bbbb", Address: "10.77.0.9"})
	})
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return path
}

func TestMosmon(t *testing.T) {
	socket := agentSocket(t)
	status, out, errs := run(t, "mosmon", "--once", "--socket", socket)
	if status != 0 || errs != "" || strings.Count(out, "\n") != 5 || !strings.Contains(out, "node2") {
		t.Errorf("--once: %d, %q\n%s", status, errs, out)
	}
	status, out, _ = run(t, "mosmon", "--json", "--socket", socket)
	var got api.MemberTable
	if err := json.Unmarshal([]byte(out), &got); status != 0 || err != nil {
		t.Fatalf("--json: %d, %v", status, err)
	}
	if d := cmp.Diff(members, got); d != "" {
		t.Errorf("--json (-want +got):\n%s", d)
	}
}

func TestStatus(t *testing.T) {
	socket := agentSocket(t)
	status, out, errs := run(t, "mosagent", "status", "--socket", socket)
	if status != 0 || errs != "" || !strings.Contains(out, "pending") || !strings.Contains(out, "aaaa-bbbb") {
		t.Errorf("status: %d, %q, %q", status, out, errs)
	}
	status, out, _ = run(t, "mosagent", "status", "--json", "--socket", socket)
	var got api.AgentStatus
	if err := json.Unmarshal([]byte(out), &got); status != 0 || err != nil || got.State != api.StatePending {
		t.Errorf("status --json: %d, %v, %+v", status, err, got)
	}
}

// In a terminal mosmon repaints until q, and leaves the terminal as it was.
func TestMosmonLive(t *testing.T) {
	tty, far := openPTY(t)
	before := termiosOf(t, tty)
	done := make(chan int, 1)
	socket := agentSocket(t)
	go func() {
		done <- Main(context.Background(), &Env{Stdin: tty, Stdout: tty, Stderr: tty, Args: []string{"mosmon", "--socket", socket}, Pid: 2})
	}()
	var seen strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(seen.String(), "node2") {
		far.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := far.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q", err, seen.String())
		}
		seen.Write(buf[:n])
	}
	if _, err := far.WriteString("q"); err != nil {
		t.Fatal(err)
	}
	select {
	case status := <-done:
		if status != 0 {
			t.Errorf("status %d; want 0", status)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("q does not end mosmon")
	}
	if after := termiosOf(t, tty); after != before {
		t.Error("the terminal is left in another mode")
	}
}
