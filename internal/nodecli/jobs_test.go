package nodecli

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/agent/jobs/client/clienttest"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

var jobTable = api.JobTable{
	Self: 1,
	Jobs: []api.JobStatus{
		{ID: "1-7", PID: 4711, UID: os.Getuid(), Argv: []string{"sh", "-c", "echo \x1b[2J"}, State: api.JobRuns, Home: 1, Node: 2, Since: time.Now().Add(-time.Minute), Moves: 3, Bytes: 600 << 20},
		{ID: "1-8", PID: 4712, UID: os.Getuid(), Argv: []string{"server"}, State: api.JobStopped, Home: 1, Node: 1, Since: time.Now(), Pinned: "it holds a TCP socket"},
	},
	Guests: []api.JobStatus{{ID: "2-1", PID: 9, UID: 4242, Argv: []string{"guest"}, State: api.JobRuns, Home: 2, Node: 1}},
}

// jobAgent knows the jobs above, and moves job 1-7.
func jobAgent(t *testing.T) *clienttest.Agent {
	return clienttest.New(t, func(a *clienttest.Agent) {
		a.Members = members
		a.Handle("GET "+api.PathJobs, func(w http.ResponseWriter, _ *http.Request) { unixhttp.Reply(w, jobTable) })
		a.Handle("POST "+api.PathJobs+"/{id}/move", func(w http.ResponseWriter, r *http.Request) {
			var req api.JobMove
			if err := unixhttp.ReadJSON(w, r, &req); err != nil {
				unixhttp.Fail(w, err)
				return
			}
			switch {
			case r.PathValue("id") != "1-7" && r.PathValue("id") != "4711":
				unixhttp.Fail(w, fault.New(fault.NotFound, "find job", r.PathValue("id"), "no job of yours has this name", "mosps lists them"))
			case req.To == "home":
				unixhttp.Reply(w, api.JobStatus{ID: "1-7", Home: 1, Node: 1, Downtime: 1234567 * time.Nanosecond})
			case req.To == "3":
				unixhttp.Reply(w, api.JobStatus{ID: "1-7", Home: 1, Node: 3, Downtime: 140 * time.Millisecond})
			case req.To == "4":
				unixhttp.Fail(w, fault.New(fault.Unavailable, "move job 1-7", "to node 4", "it does not answer", ""))
			case req.To == "5":
				unixhttp.Reply(w, api.JobStatus{ID: "1-7", Home: 1, Node: 1, Reason: "node 5 has too little memory"})
			default:
				unixhttp.Fail(w, fault.New(fault.Refused, "move job 1-7", "to "+req.To, "it holds a TCP socket", ""))
			}
		})
	})
}

func TestMosps(t *testing.T) {
	agent := jobAgent(t)
	status, out, errs := run(t, "mosps", "--socket", agent.Socket)
	if status != 0 || errs != "" || strings.Count(out, "\n") != 3 || !strings.Contains(out, "node2") || !strings.Contains(out, "home") || strings.Contains(out, "\x1b") || strings.Contains(out, "TCP") || strings.Contains(out, "guest") {
		t.Errorf("mosps: %d, %q\n%s", status, errs, out)
	}
	if _, out, _ = run(t, "mosps", "-w", "--socket", agent.Socket); !strings.Contains(out, "it holds a TCP socket\n") {
		t.Errorf("-w does not say why:\n%s", out)
	}
	status, out, errs = run(t, "mosps", "-a", "--socket", agent.Socket)
	if os.Geteuid() == 0 && (status != 0 || !strings.Contains(out, "FROM") || !strings.Contains(out, "4242")) ||
		os.Geteuid() != 0 && (status != int(fault.Refused) || !strings.Contains(errs, "root")) {
		t.Errorf("-a: %d, %q\n%s", status, errs, out)
	}
	_, out, _ = run(t, "mosps", "--json", "--socket", agent.Socket)
	var got api.JobTable
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(jobTable, got); d != "" {
		t.Errorf("--json (-want +got):\n%s", d)
	}
}

func TestMigrate(t *testing.T) {
	agent := jobAgent(t)
	gone := filepath.Join(t.TempDir(), "s")
	for _, tc := range []struct {
		args   []string
		status int
		text   string // all of stdout, or part of stderr
	}{
		{[]string{"1-7", "3"}, 0, "job 1-7 moved to node 3, stood still 140 ms\n"},
		{[]string{"4711", "home"}, 0, "job 1-7 moved home, stood still 1 ms\n"},
		{[]string{"1-7", "4"}, int(fault.Unavailable), "does not answer"},
		{[]string{"1-7", "5"}, int(fault.Refused), "too little memory"},
		{[]string{"1-7", "node9"}, int(fault.Refused), "TCP socket"},
		{[]string{"1-9", "3"}, int(fault.NotFound), "mosps lists them"},
		{[]string{"../x", "3"}, int(fault.NotFound), "mosps lists"},
		{[]string{"1-7", "balance"}, int(fault.Usage), "each second by itself"},
		{[]string{"1-7", ""}, int(fault.Usage), "no destination"},
		{[]string{"1-7"}, int(fault.Usage), "--help"},
		{[]string{"1-7", "3", "--socket", gone}, int(fault.Unavailable), "not running"},
	} {
		status, out, errs := run(t, append([]string{"migrate", "--socket", agent.Socket}, tc.args...)...)
		if status != tc.status || status == 0 && out != tc.text || status != 0 && (!strings.Contains(errs, tc.text) || out != "" || strings.Count(errs, "\n") != 1) {
			t.Errorf("migrate %q: %d, %q, %q; want %d and %q", tc.args, status, out, errs, tc.status, tc.text)
		}
	}
}
