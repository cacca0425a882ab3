package balance

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/api"
)

// A node that refuses a job is asked again less and less often: it is another
// machine's time, and the job is frozen for some of the refusals.
func TestLedgerBacksOff(t *testing.T) {
	var l Ledger
	now := time.Unix(1000, 0)
	asked := 0
	for end := now.Add(time.Hour); now.Before(end); now = now.Add(time.Second) {
		j := Job{ID: "a"}
		l.Judge(&j, now)
		if j.Wait == 0 && j.Refused[2] == "" {
			asked++
			l.Failed("a", 2, "its CPU lacks avx2", now)
		}
	}
	if asked < 15 || asked > 25 {
		t.Errorf("asked %d times in an hour", asked)
	}
	// Another node may still be better, but not in the same moment.
	j := Job{ID: "a"}
	l.Failed("a", 2, "no", now)
	l.Judge(&j, now)
	if j.Wait <= 0 || j.WaitWhy != "no" {
		t.Errorf("just refused: %+v", j)
	}
	j = Job{ID: "a"}
	l.Judge(&j, now.Add(2*time.Second))
	if d := cmp.Diff(Job{ID: "a", Refused: map[api.NodeID]string{2: "no"}}, j); d != "" {
		t.Errorf("2 s later (-want +got):\n%s", d)
	}
	// A move that went well settles it.
	l.Went("a", 3, 1, 5, now)
	j = Job{ID: "a"}
	l.Judge(&j, now)
	if d := cmp.Diff(Job{ID: "a"}, j); d != "" {
		t.Errorf("after a move (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]Sent{{To: 3, Load: 1, Bytes: 5, Ago: time.Second}}, l.Sent(now.Add(time.Second))); d != "" {
		t.Errorf("sent (-want +got):\n%s", d)
	}
	l.Gone("a")
	if got := l.Sent(now); len(got) > 0 {
		t.Errorf("a job that has ended counts: %+v", got)
	}
	l.Pinned("b", "it has a socket", time.Minute, now)
	l.Keep(nil)
	if len(l.jobs) > 0 {
		t.Error("jobs that are not here any more are remembered")
	}
}
