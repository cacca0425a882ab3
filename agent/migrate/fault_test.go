package migrate_test

import (
	"os"
	"testing"
	"time"

	"mosimg/agent/migrate"
	"mosimg/internal/api"
)

// The failure matrix. In every cell a job of home 1 is on node 2 and is told
// to go to node 3. At one step of the move something dies, for good or until
// its agent is started again; afterwards exactly one copy runs, where the cell
// says, nothing is left of the other, and the next move works.
//
// Steps are named by what is about to be done. "In" a step means after CRIU
// has started for it.
func TestFailures(t *testing.T) {
	if testing.Short() {
		t.Skip("three agents, two seconds a cell")
	}
	const home, src, dst = 1, 2, 3
	agentDies := func(id api.NodeID) func(*cluster) {
		return func(c *cluster) { c.agents[id].kill() }
	}
	shimDies := func(id api.NodeID) func(*cluster) {
		return func(c *cluster) { killAll(c.pids(id, "shim")) }
	}
	criuDies := func(id api.NodeID) func(*cluster) {
		return func(c *cluster) { killAll(c.pids(id, "criu")) }
	}
	// in makes a fault happen in the middle of a step that is about to begin.
	in := func(id api.NodeID, fault func(*cluster)) func(*cluster) {
		return func(c *cluster) {
			go func() {
				for range 5000 {
					if len(c.pids(id, "criu")) > 0 {
						time.Sleep(20 * time.Millisecond)
						fault(c)
						return
					}
					time.Sleep(time.Millisecond)
				}
			}()
		}
	}
	// inPrepare makes a fault happen when the destination has begun to make its copy.
	inPrepare := func(fault func(*cluster)) func(*cluster) {
		return func(c *cluster) {
			go func() {
				for range 5000 {
					if names := c.capsules(dst); len(names) > 0 {
						fault(c)
						return
					}
					time.Sleep(time.Millisecond)
				}
			}()
		}
	}
	filesGo := func(id api.NodeID) func(*cluster) {
		return func(c *cluster) {
			if err := os.WriteFile(c.agents[id].conf.rootless(), nil, 0o600); err != nil {
				t.Error(err)
			}
		}
	}
	both := func(a, b func(*cluster)) func(*cluster) {
		return func(c *cluster) { a(c); b(c) }
	}
	linkCut := func(a, b api.NodeID) func(*cluster) {
		return func(c *cluster) { c.cut(a, b, true) }
	}
	const lost = 0
	for _, tt := range []struct {
		name  string
		step  migrate.Step
		fault func(*cluster)
		want  api.NodeID
	}{
		{"destination's agent before prepare", migrate.StepPrepare, agentDies(dst), src},
		{"destination's agent in prepare", migrate.StepPrepare, inPrepare(agentDies(dst)), src},
		{"link to destination before prepare", migrate.StepPrepare, linkCut(home, dst), src},
		{"home's agent before prepare", migrate.StepPrepare, agentDies(home), src},
		{"source's shim before prepare", migrate.StepPrepare, shimDies(src), lost},

		{"source's agent before freeze", migrate.StepFreeze, agentDies(src), src},
		{"source's agent in freeze", migrate.StepFreeze, in(src, agentDies(src)), src},
		{"source's criu in freeze", migrate.StepFreeze, in(src, criuDies(src)), src},
		{"destination's agent in freeze", migrate.StepFreeze, in(src, agentDies(dst)), src},
		{"destination's shim before freeze", migrate.StepFreeze, shimDies(dst), src},
		{"home's agent in freeze", migrate.StepFreeze, in(src, agentDies(home)), src},
		{"keeper before freeze", migrate.StepFreeze, keeperDies, src},
		{"link of source and destination before freeze", migrate.StepFreeze, linkCut(src, dst), src},

		{"source's agent before restore", migrate.StepRestore, agentDies(src), dst},
		{"source's criu before restore", migrate.StepRestore, criuDies(src), dst},
		{"source's shim before restore", migrate.StepRestore, shimDies(src), dst},
		{"destination's agent in restore", migrate.StepRestore, in(dst, agentDies(dst)), src},
		{"destination's criu in restore", migrate.StepRestore, in(dst, criuDies(dst)), src},
		{"both criu", migrate.StepRestore, both(criuDies(src), in(dst, criuDies(dst))), src},
		{"destination's shim in restore", migrate.StepRestore, in(dst, shimDies(dst)), src},
		{"home's agent in restore", migrate.StepRestore, in(dst, agentDies(home)), src},
		{"link to destination before restore", migrate.StepRestore, linkCut(home, dst), src},

		{"home's agent before commit", migrate.StepCommit, agentDies(home), src},
		{"source's agent before commit", migrate.StepCommit, agentDies(src), dst},
		{"keeper before commit", migrate.StepCommit, keeperDies, src},
		{"destination's agent before commit", migrate.StepCommit, agentDies(dst), dst},

		{"home's agent before resume", migrate.StepResume, agentDies(home), dst},
		{"destination's agent before resume", migrate.StepResume, agentDies(dst), dst},
		{"destination's shim before resume", migrate.StepResume, shimDies(dst), src},
		{"destination's files before resume", migrate.StepResume, filesGo(dst), src},
		{"keeper before resume", migrate.StepResume, keeperDies, src},
		{"keeper and home's agent before resume", migrate.StepResume, both(keeperDies, agentDies(home)), src},
		{"link to destination before resume", migrate.StepResume, linkCut(home, dst), dst},
		{"all agents before resume", migrate.StepResume, both(agentDies(src), both(agentDies(dst), agentDies(home))), dst},

		{"home's agent before kill", migrate.StepKill, agentDies(home), dst},
		{"source's agent before kill", migrate.StepKill, agentDies(src), dst},
		{"source's shim before kill", migrate.StepKill, shimDies(src), dst},
		{"destination's shim before kill", migrate.StepKill, shimDies(dst), lost},
		{"link to source before kill", migrate.StepKill, linkCut(home, src), dst},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newCluster(t, 3)
			c.start(1)
			c.agents[home].must(command{Do: "move", Job: "j", To: src})
			c.progress()
			c.agents[home].send(command{Do: "move", Job: "j", To: dst})
			hit := false
			repaired := make(chan struct{})
			e, ok := c.agents[home].done(func(s migrate.Step) {
				if s != tt.step || hit {
					return
				}
				hit = true
				tt.fault(c)
				// What is repeated after the commit must find its node again.
				time.AfterFunc(300*time.Millisecond, func() {
					defer close(repaired)
					c.repair(home)
				})
			})
			if !hit {
				t.Fatalf("the move never came to %s: %q", tt.step, e.Error)
			}
			t.Logf("the move said %q, home alive %v", e.Error, ok)
			<-repaired
			c.repair()
			c.settle()
			if tt.want == lost {
				if rec := c.record(); rec.End == nil || rec.End.Lost == "" {
					t.Errorf("the job is %+v; want it known as lost", rec)
				}
				c.agents[home].must(command{Do: "forget", Job: "j"})
				return
			}
			c.progress()
			if rec := c.record(); rec.At.Node != tt.want || tt.want == src && rec.Reason == "" {
				t.Errorf("the job is %+v; want it on node %d, and a reason if it stayed", rec, tt.want)
			}
			next := api.NodeID(src + dst - int(tt.want))
			c.agents[home].must(command{Do: "move", Job: "j", To: next})
			c.finish(next)
		})
	}
}

// repair starts dead agents again, except some, and mends links.
func (c *cluster) repair(except ...api.NodeID) {
	for id, a := range c.agents {
		skip := false
		for _, e := range except {
			skip = skip || e == id
		}
		if !skip && !a.alive() {
			a.start()
		}
	}
	for a := range c.agents {
		os.Remove(c.agents[a].conf.rootless())
		for b := range c.agents {
			c.cut(a, b, false)
		}
	}
}

// settle lets agents do what they would do from time to time, until nothing
// is open.
func (c *cluster) settle() {
	c.t.Helper()
	quiet := 0
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if e := c.agents[1].must(command{Do: "jobs"}); len(e.Jobs) == 1 {
			c.agents[1].must(command{Do: "drive", Job: "j"})
		}
		open := 0
		for _, a := range c.agents {
			open += a.must(command{Do: "settle"}).Open
		}
		if quiet++; open > 0 {
			quiet = 0
		}
		if quiet > 1 { // what is noted at one look may be acted upon at the next
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%d copies stay open", open)
		}
	}
}
