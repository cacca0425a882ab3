package cli

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"mosimg/agent/jobs/client/clienttest"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// One session of an operator with the jobs of a machine.
func TestJob(t *testing.T) {
	job := api.JobStatus{ID: "1-7", PID: 4711, Argv: []string{"sort", "\x1b[2Jbig"}, State: api.JobRuns, Home: 1, Node: 3, Moves: 2, Epoch: 3, Bytes: 600 << 20, Processes: 2, Pinned: "it holds a lock"}
	agent := clienttest.New(t, func(a *clienttest.Agent) {
		a.Members = api.MemberTable{Members: []api.Member{{Node: 3, Name: "küche"}}}
		find := func(h func(w http.ResponseWriter, r *http.Request)) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				if id := r.PathValue("id"); id != "1-7" && id != "4711" {
					unixhttp.Fail(w, fault.New(fault.NotFound, "find job", id, "no job of yours has this name", ""))
					return
				}
				h(w, r)
			}
		}
		a.Handle("GET "+api.PathJobs, func(w http.ResponseWriter, _ *http.Request) {
			unixhttp.Reply(w, api.JobTable{Self: 1, Jobs: []api.JobStatus{job}})
		})
		a.Handle("GET "+api.PathJobs+"/{id}", find(func(w http.ResponseWriter, _ *http.Request) { unixhttp.Reply(w, job) }))
		a.Handle("POST "+api.PathJobs+"/{id}/kill", find(func(w http.ResponseWriter, _ *http.Request) { unixhttp.Reply(w, struct{}{}) }))
		a.Handle("POST "+api.PathJobs+"/{id}/move", find(func(w http.ResponseWriter, _ *http.Request) {
			unixhttp.Reply(w, api.JobStatus{ID: "1-7", Home: 1, Node: 2, Downtime: 40 * time.Millisecond})
		}))
	})
	for _, tc := range []struct {
		args   []string
		status int
		out    []string // in stdout
		errs   string   // in stderr
	}{
		{[]string{"ls"}, 0, []string{"1-7", "küche", "600M", "it holds a lock", "sort ?[2Jbig"}, ""},
		{[]string{"ls", "--json"}, 0, []string{`"pinned": "it holds a lock"`}, ""},
		{[]string{"show", "1-7"}, 0, []string{"küche", "epoch 3", "600M in 2 processes", "sort ?[2Jbig"}, ""},
		{[]string{"show", "4711", "--json"}, 0, []string{`"epoch": 3`}, ""},
		{[]string{"show", "9"}, int(fault.NotFound), nil, "no job of yours"},
		{[]string{"migrate", "1-7", "2"}, 0, []string{"job 1-7 moved to node 2, stood still 40 ms\n"}, ""},
		{[]string{"kill", "9", "1-7"}, int(fault.NotFound), []string{"job 1-7 is killed\n"}, "no job of yours"},
		{[]string{"kill"}, int(fault.Usage), nil, "--help"},
		{[]string{"migrate", "1-7"}, int(fault.Usage), nil, "--help"},
	} {
		status, out, errs := mosimg(t, append([]string{"job", "--socket", agent.Socket}, tc.args...)...)
		if status != tc.status || !strings.Contains(errs, tc.errs) || tc.errs == "" && errs != "" {
			t.Errorf("job %q: status %d, stderr %q; want %d and %q", tc.args, status, errs, tc.status, tc.errs)
		}
		for _, want := range tc.out {
			if !strings.Contains(out, want) {
				t.Errorf("job %q: %q is not in\n%s", tc.args, want, out)
			}
		}
	}
}
