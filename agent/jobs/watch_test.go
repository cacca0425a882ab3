package jobs

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"mosimg/agent/capsule"
	"mosimg/agent/capsule/control"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// starter is a node that only starts jobs.
type starter struct{ migrate.Peer }

func (starter) Start(context.Context, migrate.Order, control.Spec) error { return nil }

// A node that is away for a while costs nothing but time; one that is away for
// longer than its guests live has lost them. The user is told of both.
func TestSilentNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		journal, err := migrate.OpenJournal[migrate.Record](t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		home, err := migrate.NewHome(migrate.HomeConfig{Self: 1, Journal: journal, Peer: func(api.NodeID) migrate.Peer { return starter{} }})
		if err != nil {
			t.Fatal(err)
		}
		var down atomic.Bool
		s, err := New(Config{
			Self: 1, Dir: t.TempDir(), Home: home, Nodes: func() []api.Member { return nil },
			Capsule: func(job migrate.JobID, _ migrate.Placement) (*capsule.Capsule, error) {
				return capsule.Remote(string(job), func(context.Context) (net.Conn, error) {
					if down.Load() {
						return nil, fault.New(fault.Unavailable, "connect to", "node 2", errors.New("no route to host"), "")
					}
					ours, theirs := net.Pipe()
					go func() {
						defer theirs.Close()
						if _, err := control.Receive(theirs, new(control.Request)); err == nil {
							_ = control.Send(theirs, control.Answer{Status: control.Status{State: control.Running}})
						}
					}()
					return ours, nil
				}), nil
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		const id = "1-2-abc"
		if err := home.Start(t.Context(), id, 2, control.Spec{}); err != nil {
			t.Fatal(err)
		}
		j := s.newJob(Info{Job: id})
		j.session = &session{j: j, words: make(chan word, maxWords)}
		heard := func() string {
			select {
			case w := <-j.session.words:
				return string(w.body)
			default:
				return ""
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		go j.follow(ctx)
		go j.watch(ctx)
		defer synctest.Wait()
		defer cancel()
		time.Sleep(time.Minute + watchEvery/2) // between two looks
		before, err := j.awaitPlace(ctx)
		if err != nil || heard() != "" {
			t.Fatalf("place %v, %v; or a note without need", before, err)
		}

		shown := func(want api.JobState) {
			t.Helper()
			if st, err := j.status(ctx); err != nil || st.State != want {
				t.Errorf("mosps shows %+v, %v; want that it %s", st, err, want)
			}
		}
		down.Store(true)
		time.Sleep(noteAfter - watchEvery)
		if got := heard(); got != "" {
			t.Errorf("a note too early: %q", got)
		}
		shown(api.JobRuns) // as it was last seen
		time.Sleep(3 * watchEvery)
		if got := heard(); got != "node 2 does not answer; the job waits" {
			t.Errorf("note %q", got)
		}
		shown(api.JobWaits)
		time.Sleep(migrate.DefaultLease - noteAfter)
		if got := heard(); got != "" {
			t.Errorf("told again: %q", got)
		}
		down.Store(false)
		time.Sleep(2 * watchEvery)
		if got := heard(); got != "node 2 answers again" {
			t.Errorf("note %q", got)
		}
		if after, err := j.awaitPlace(ctx); err != nil || after == before || before.ctx.Err() == nil {
			t.Errorf("connections from before the silence are kept: %v", err)
		}
		shown(api.JobRuns)

		down.Store(true)
		time.Sleep(migrate.DefaultLease + lostMargin - 2*watchEvery)
		if rec, err := home.Job(id); err != nil || rec.End != nil {
			t.Errorf("given up too early: %+v, %v", rec.End, err)
		}
		time.Sleep(3 * watchEvery)
		if rec, err := home.Job(id); err != nil || rec.End == nil || !strings.Contains(rec.End.Lost, "node 2 has not answered for 5m30s") {
			t.Errorf("not given up: %+v, %v", rec.End, err)
		}
		j.look() // as Changed does
		synctest.Wait()
		if _, err := j.awaitPlace(ctx); !errors.Is(err, errLost) {
			t.Errorf("a lost job's place: %v", err)
		}
	})
}
