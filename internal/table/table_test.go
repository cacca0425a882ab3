package table

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/api"
)

var now = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

var jobs = []api.JobStatus{
	{ID: "1-7", PID: 4711, UID: 4242, Argv: []string{"sh", "-c", "echo \x1b[2J\n"}, State: api.JobRuns, Home: 1, Node: 3, Since: now.Add(-time.Minute), Moves: 2, Bytes: 600 << 20},
	{ID: "1-12", PID: 99, UID: 4242, Argv: []string{"caf\xe9"}, State: api.JobWaits, Home: 1, Node: 4, Since: now.Add(time.Second), Pinned: "holds a socket", Reason: "node 5 has too little memory", Locked: true},
	{ID: "1-13", PID: 5, UID: 4242, Argv: []string{strings.Repeat("x", 60)}, State: api.JobRuns, Home: 1, Node: 1, Since: now.Add(-time.Hour), Bytes: 700 << 10, Stays: "no node is better"},
}

func TestJobs(t *testing.T) {
	o := Jobs{Names: map[api.NodeID]string{3: "küche"}, Self: 1, Now: now}
	want := `ID     PID  WHERE  SINCE  MOVES  SIZE  STATE  COMMAND
1-7   4711  küche    60s      2  600M  runs   sh -c echo ?[2J?
1-12    99  4       0.0s      0     -  waits  caf?
1-13     5  home     60m      0  700K  runs   ` + strings.Repeat("x", 60) + "\n"
	if d := cmp.Diff(want, o.Text(jobs)); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	o.Users, o.Why, o.Width = true, true, 60
	want = `ID     PID  USER  WHERE  SINCE  MOVES  SIZE  STATE  COMMAND                                   WHY
1-7   4711  4242  küche    60s      2  600M  runs   sh -c echo ?[2J?                          -
1-12    99  4242  4       0.0s      0     -  waits  caf?                                      locked; holds a socket; last move: node 5 has too little memory
1-13     5  4242  home     60m      0  700K  runs   ` + strings.Repeat("x", 37) + "...  stays: no node is better\n"
	if d := cmp.Diff(want, o.Text(jobs)); d != "" {
		t.Errorf("-w (-want +got):\n%s", d)
	}
	o.Why = false
	for width := 1; width < 130; width++ {
		o.Width = width
		for line := range strings.Lines(o.Text(jobs)) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > width {
				t.Fatalf("width %d: a line of %d", width, n)
			}
		}
	}
}

func TestSizesAndAges(t *testing.T) {
	for n, want := range map[int64]string{0: "0M", 1: "0K", 900 << 10: "900K", 464 << 20: "464M", 1 << 30: "1.0G", 10 << 30: "10G", 4 << 40: "4096G"} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %s; want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{0: "0.0s", 9900 * time.Millisecond: "9.9s", time.Minute: "60s", time.Hour: "60m"} {
		if got := Age(d); got != want {
			t.Errorf("Age(%v) = %s; want %s", d, got, want)
		}
	}
}
