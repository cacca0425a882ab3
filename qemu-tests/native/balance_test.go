package native

import (
	"fmt"
	"strconv"
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
	c.idleCost(10 * time.Second)
	table, err := c.head.members()
	if err != nil {
		t.Fatal(err)
	}
	each := table.Members[0].Load.CPUs // then nobody waits, and nobody is idle
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

// idleCost logs what the agent of node 2 takes while nothing runs: for docs/measurements.md.
func (c *cluster) idleCost(d time.Duration) {
	c.t.Helper()
	look := func() (ticks, bytes int64) {
		out, err := c.all[1].command("sh", "-c", "cat /proc/$0/stat /sys/class/net/eth0/statistics/tx_bytes", strconv.Itoa(c.all[1].agent.cmd.Process.Pid)).Output()
		f := strings.Fields(string(out))
		if err != nil || len(f) < 17 {
			c.t.Fatalf("%v: %q", err, out)
		}
		user, _ := strconv.ParseInt(f[13], 10, 64)
		system, _ := strconv.ParseInt(f[14], 10, 64)
		bytes, err = strconv.ParseInt(f[len(f)-1], 10, 64)
		if err != nil {
			c.t.Fatal(err)
		}
		return user + system, bytes
	}
	ticks, bytes := look()
	time.Sleep(d)
	t2, b2 := look()
	c.t.Logf("an idle agent takes %.2f %% of a CPU and sends %d bytes a second", float64(t2-ticks)/d.Seconds(), (b2-bytes)/int64(d.Seconds()))
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

// mosctl runs one of its verbs on a machine.
func (c *cluster) mosctl(on *machine, verb string) {
	c.t.Helper()
	if out, err := on.command(c.bin+"/mosagent", "mosctl", verb, "--socket", on.socket()).CombinedOutput(); err != nil {
		c.t.Fatalf("mosctl %s on %s: %v: %s", verb, on.name, err, out)
	}
}

// What an operator does before a machine is switched off, and a user who wants
// all programs back: nobody loses one.
func TestMachinesEmptied(t *testing.T) {
	c := newClusterOf(t, "--load=jobs", "--speed=10000")
	head, a, b := c.all[0], c.all[1], c.all[2]
	counter, dir := c.counter(head)
	table, err := head.members()
	if err != nil {
		t.Fatal(err)
	}
	cpus := table.Members[0].Load.CPUs
	// A burst is placed by what was started before, not only by what was heard.
	jobs := c.loops(head, 3*cpus)
	var nodes map[api.NodeID]int
	c.eventually(20*time.Second, "all jobs have started", func() error {
		nodes, _, err = c.where(jobs)
		return err
	})
	t.Logf("%d jobs started at %v", len(jobs), nodes)
	if nodes[1] == len(jobs) || nodes[2] == 0 || nodes[3] == 0 {
		t.Errorf("all machines were idle, and %d jobs were started at %v", len(jobs), nodes)
	}
	locked := c.mosrun(head, c.dir, "-L", "-2", "sleep", "1000")
	t.Cleanup(func() {
		locked.cmd.Process.Signal(syscall.SIGTERM)
		locked.ends()
	})
	c.eventually(10*time.Second, "a locked job runs on node 2", func() error {
		if st, err := locked.status(); err != nil || st.Node != 2 {
			return fmt.Errorf("%+v, %w", st, err)
		}
		return nil
	})

	// A drained machine has no guest, whatever it costs the others, and gets none.
	c.head.mustNode("drain", "2")
	all := append([]*job{locked}, jobs...)
	if nodes, _, err = c.where(all); err != nil || nodes[2] != 0 {
		t.Fatalf("node 2 is drained; jobs are at %v, %v", nodes, err)
	}
	if err := jobs[0].migrate(2); err == nil || !strings.Contains(err.Error(), "leaving") {
		t.Errorf("a job is moved to a drained machine: %v", err)
	}
	if r := c.head.record(a.mac, "drained", func(r api.NodeRecord) bool { return r.Drain }); r.State != api.Approved {
		t.Errorf("a drained machine is %s", r.State)
	}
	c.head.mustNode("undrain", "2")

	// bring waits until all are home, and they stay; locked ones too.
	c.mosctl(head, "bring")
	if nodes, _, err = c.where(all); err != nil || nodes[1] != len(all) {
		t.Fatalf("all were brought home; they are at %v, %v", nodes, err)
	}
	time.Sleep(5 * time.Second)
	if nodes, _, err = c.where(all); err != nil || nodes[1] != len(all) {
		t.Fatalf("they were to stay at home; they are at %v, %v", nodes, err)
	}
	if why := c.mosps(head, "-w"); !strings.Contains(why, "mosctl lstay") {
		t.Errorf("mosps -w does not tell that they were brought home:\n%s", why)
	}

	// And out again, but not to a machine that takes none; one that expels keeps none.
	c.mosctl(a, "block")
	c.mosctl(head, "nolstay")
	c.eventually(time.Minute, "jobs go to node 3", func() error {
		if nodes, _, err = c.where(jobs); err != nil || nodes[3] == 0 || nodes[2] != 0 {
			return fmt.Errorf("they are at %v, %w", nodes, err)
		}
		return nil
	})
	c.mosctl(b, "expel")
	if nodes, _, err = c.where(all); err != nil || nodes[1] != len(all) {
		t.Errorf("node 2 takes none and node 3 has expelled all; they are at %v, %v", nodes, err)
	}
	counter.counted(dir)
}
