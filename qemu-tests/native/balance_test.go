package native

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/internal/api"
)

// loops starts jobs that want a CPU each, on a machine.
func (c *cluster) loops(on *machine, n int, flags ...string) []*job {
	c.t.Helper()
	var list []*job
	for range n {
		list = append(list, c.mosrun(on, c.dir, append(flags, "sh", "-c", "while :; do :; done")...))
	}
	c.t.Cleanup(func() {
		for _, j := range list {
			j.cmd.Process.Signal(syscall.SIGTERM)
		}
		for _, j := range list {
			j.ends()
		}
	})
	return list
}

// where counts the jobs on each node, and the moves that they have made.
func (c *cluster) where(jobs []*job) (nodes map[api.NodeID]int, moves int, err error) {
	nodes = make(map[api.NodeID]int)
	for _, j := range jobs {
		st, err := j.status()
		if err != nil {
			return nil, 0, err
		}
		if st.State != api.JobRuns {
			return nil, 0, fmt.Errorf("job %s %s", st.ID, st.State)
		}
		nodes[st.Node]++
		moves += st.Moves
	}
	return nodes, moves, nil
}

// awaitSpread waits until so many jobs are on nodes 1, 2 and 3.
func (c *cluster) awaitSpread(limit time.Duration, jobs []*job, want ...int) (moves int) {
	c.t.Helper()
	began := time.Now()
	c.eventually(limit, fmt.Sprintf("%d jobs are spread as %v", len(jobs), want), func() error {
		nodes, n, err := c.where(jobs)
		moves = n
		if err != nil {
			return err
		}
		for i, w := range want {
			if nodes[api.NodeID(i+1)] != w {
				return fmt.Errorf("they are at %v after %d moves", nodes, n)
			}
		}
		return nil
	})
	c.t.Logf("%v after %s and %d moves", want, time.Since(began).Round(100*time.Millisecond), moves)
	return moves
}

// What the tutorial shows: a user starts six loops on one machine and types
// nothing else. All three machines share this one's CPUs: what counts is who is where, and not how fast.
// Each tells its jobs' load alone, and they are alike.
func TestLoadLevels(t *testing.T) {
	c := newClusterOf(t, "--load=jobs", "--speed=10000")
	cpus := 0
	table, err := c.head.members()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range table.Members {
		cpus = m.Load.CPUs
	}
	// Two for each CPU of a machine: level is two for each CPU everywhere.
	each := cpus
	jobs := c.loops(c.all[0], 3*each, "-h")
	moves := c.awaitSpread(2*time.Minute, jobs, each, each, each)
	if moves > 3*each {
		t.Errorf("%d moves of %d jobs; want few more than the %d that it takes", moves, len(jobs), 2*each)
	}
	// And there they stay.
	time.Sleep(20 * time.Second)
	after := c.awaitSpread(10*time.Second, jobs, each, each, each)
	if after > moves+1 {
		t.Errorf("%d moves in 20 s, though all is level", after-moves)
	}
	for _, j := range jobs {
		st, err := j.status()
		if err != nil {
			t.Fatal(err)
		}
		if st.Stays == "" {
			t.Errorf("nobody tells why job %s stays on node %d: %+v", st.ID, st.Node, st)
		}
	}
	t.Log(c.mosps(c.all[0], "-w"))
}

// mosps is what it prints on a machine.
func (c *cluster) mosps(on *machine, flags ...string) string {
	c.t.Helper()
	out, err := on.command(append([]string{c.bin + "/mosagent", "mosps", "--socket", on.socket()}, flags...)...).Output()
	if err != nil {
		c.t.Fatalf("mosps: %s", stderrOf(err))
	}
	return strings.TrimSpace(string(out))
}
