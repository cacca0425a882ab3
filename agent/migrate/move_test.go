package migrate_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"mosimg/agent/capsule/capsuletest"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

func TestMain(m *testing.M) {
	capsuletest.Main(m, map[string]func([]string) int{"agent": agentMain, "appender": appender})
}

// appender is a job that cannot run twice unnoticed: it appends numbers to a
// file, and looks after its memory. args: file, megabytes.
func appender(args []string) int {
	f, err := os.OpenFile(args[0], os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return 11
	}
	mb, err := strconv.Atoi(args[1])
	if err != nil {
		return 12
	}
	memory := make([]byte, mb<<20)
	for i := range memory {
		if i>>12&1 == 0 { // every other page is without content
			memory[i] = byte(i*7 + i>>8)
		}
	}
	sum := sha256.Sum256(memory)
	for i := 0; ; i++ {
		if _, err := fmt.Fprintln(f, i); err != nil {
			return 13
		}
		if _, err := os.Stat(args[0] + ".stop"); err == nil {
			if sha256.Sum256(memory) != sum {
				return 14
			}
			return 7
		}
		time.Sleep(time.Millisecond)
	}
}

// start starts the appender at home.
func (c *cluster) start(mb int) {
	c.t.Helper()
	spec := c.w.Program("appender", filepath.Join(c.w.Work, "log"), strconv.Itoa(mb))
	c.agents[1].must(command{Do: "start", Job: "j", Spec: &spec})
}

// numbers is how far the job has come.
func (c *cluster) numbers() int {
	data, _ := os.ReadFile(filepath.Join(c.w.Work, "log"))
	return strings.Count(string(data), "\n")
}

// progress waits until the job has done something from now on.
func (c *cluster) progress() {
	c.t.Helper()
	from := c.numbers()
	for deadline := time.Now().Add(20 * time.Second); c.numbers() < from+5; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.t.Fatalf("the job stands still at %d", from)
		}
	}
}

// finish ends the job and checks that it has done everything exactly once, on
// the node where it should be, and that nothing is left elsewhere.
func (c *cluster) finish(at api.NodeID) {
	c.t.Helper()
	c.progress()
	rec := c.record()
	if rec.At.Node != at || !rec.Running || rec.Next != nil || rec.Prev != nil {
		c.t.Errorf("the job is %+v; want it settled on node %d", rec, at)
	}
	for id := range c.agents {
		if names := c.capsules(id); len(names) != 0 && id != at || len(names) != 1 && id == at {
			c.t.Errorf("node %d has capsules %v", id, names)
		}
	}
	if err := os.WriteFile(filepath.Join(c.w.Work, "log.stop"), nil, 0o644); err != nil {
		c.t.Fatal(err)
	}
	var end *migrate.End
	for deadline := time.Now().Add(20 * time.Second); end == nil; time.Sleep(5 * time.Millisecond) {
		if end = c.record().End; time.Now().After(deadline) {
			c.t.Fatal("the job does not end")
		}
	}
	if *end != (migrate.End{Exit: 7}) {
		c.t.Errorf("the job ended with %+v; want exit 7", *end)
	}
	c.agents[1].must(command{Do: "forget", Job: "j"})
	for id := range c.agents {
		if names := c.capsules(id); len(names) != 0 {
			c.t.Errorf("node %d has capsules %v of a job that is over", id, names)
		}
	}
	data, err := os.ReadFile(filepath.Join(c.w.Work, "log"))
	if err != nil {
		c.t.Fatal(err)
	}
	for i, l := range strings.Fields(string(data)) {
		if l != strconv.Itoa(i) {
			c.t.Fatalf("line %d is %s", i, l)
		}
	}
}

// record is the home's record of the job.
func (c *cluster) record() migrate.Record {
	c.t.Helper()
	e := c.agents[1].must(command{Do: "jobs"})
	if len(e.Jobs) != 1 {
		c.t.Fatalf("jobs: %v", e.Jobs)
	}
	return e.Jobs[0]
}

// What a guest wrote to mapped files is with its home before the home knows of its
// end: who waits for the job reads it next.
func TestEndIsToldAfterSync(t *testing.T) {
	c := newCluster(t, 2)
	c.start(1)
	c.agents[1].must(command{Do: "move", Job: "j", To: 2})
	c.progress()
	if err := os.Remove(c.agents[2].conf.synced()); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	c.finish(2)
	if _, err := os.Stat(c.agents[2].conf.synced()); err != nil {
		t.Errorf("the end of a guest was told without a sync of its files: %v", err)
	}
}

// A script that moves a job which is just ending must be able to tell that
// from a move that was refused.
func TestMoveRacesEnd(t *testing.T) {
	for _, step := range []migrate.Step{migrate.StepPrepare, migrate.StepFreeze} {
		t.Run(string(step), func(t *testing.T) {
			c := newCluster(t, 3)
			c.start(1)
			c.agents[1].must(command{Do: "move", Job: "j", To: 2})
			c.progress()
			c.agents[1].send(command{Do: "move", Job: "j", To: 3})
			e, _ := c.agents[1].done(func(s migrate.Step) {
				if s != step {
					return
				}
				if err := os.WriteFile(filepath.Join(c.w.Work, "log.stop"), nil, 0o644); err != nil {
					t.Error(err)
				}
				for deadline := time.Now().Add(20 * time.Second); len(c.pids(2, "job")) > 0 && time.Now().Before(deadline); {
					time.Sleep(time.Millisecond)
				}
			})
			if e.Kind != fault.NotFound || !strings.Contains(e.Error, "it has ended") {
				t.Errorf("move of a job that ends = %q, kind %d; want that it has ended, kind %d", e.Error, e.Kind, fault.NotFound)
			}
			c.settle()
			if end := c.record().End; end == nil || *end != (migrate.End{Exit: 7}) {
				t.Errorf("the job ended with %+v; want exit 7", end)
			}
			c.agents[1].must(command{Do: "forget", Job: "j"})
		})
	}
}

// A dump that met a process just ending is made once more: the user does not
// hear of it. One that meets it again is told.
func TestDumpIsTriedAgain(t *testing.T) {
	for races, want := range map[int]string{1: "", 2: "a process ended while it was being stopped"} {
		t.Run(strconv.Itoa(races), func(t *testing.T) {
			c := newCluster(t, 2)
			c.agents[1].kill()
			c.agents[1].conf.CRIU = c.w.Racy(c.w.CRIU, races)
			c.agents[1].start()
			c.start(1)
			c.progress()
			c.agents[1].send(command{Do: "move", Job: "j", To: 2})
			e, _ := c.agents[1].done(nil)
			if want == "" && e.Error != "" || !strings.Contains(e.Error, want) {
				t.Errorf("move with %d races = %q; want %q", races, e.Error, want)
			}
			at := api.NodeID(2)
			if want != "" {
				at = 1
			}
			c.finish(at)
		})
	}
}

// A job goes round three nodes and home again, with its memory.
func TestRound(t *testing.T) {
	c := newCluster(t, 3)
	c.start(16)
	for _, to := range []api.NodeID{2, 3, 2, 1, 3, 1} {
		c.progress()
		began := time.Now()
		c.agents[1].must(command{Do: "move", Job: "j", To: to})
		t.Logf("to node %d: %v", to, time.Since(began).Round(time.Millisecond))
	}
	c.finish(1)
}
