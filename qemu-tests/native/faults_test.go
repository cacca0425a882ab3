package native

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/agent/migrate"
	"mosimg/internal/api"
)

// number is a number from the environment.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("%s=%q: %v", name, s, err)
	}
	return n
}

// victim is what a fault of the first test hits. None of them is a reason for
// a job to end.
type victim string

const (
	homeAgent   victim = "the home's agent"
	sourceAgent victim = "the source's agent"
	destAgent   victim = "the destination's agent"
	criuProcess victim = "a criu"
	spareShim   victim = "the shim of a copy that is not the job"
	spareMount  victim = "the mount of a copy that is not the job"
	cablePulled victim = "a cable"
)

var victims = []victim{homeAgent, sourceAgent, destAgent, criuProcess, spareShim, spareMount, cablePulled}

// round is one fault. All of it is drawn at once, so that a seed gives the
// same rounds whatever the clock does.
type round struct {
	to     int           // which of the other nodes
	late   bool          // the move is to be committed first
	delay  time.Duration // from its begin, or a tenth of it from its commit
	victim victim
	down   time.Duration // of an agent
	cable  int           // whose
	pulled time.Duration
}

func draw(r *rand.Rand) round {
	upTo := func(d time.Duration) time.Duration {
		return time.Duration(r.Int64N(int64(d))).Truncate(time.Millisecond)
	}
	return round{
		to: r.IntN(2), late: r.IntN(3) == 0, delay: upTo(900 * time.Millisecond), victim: victims[r.IntN(len(victims))],
		down: upTo(2 * time.Second), cable: r.IntN(3), pulled: 200*time.Millisecond + upTo(3800*time.Millisecond),
	}
}

func (r round) String() string {
	s := fmt.Sprintf("after %v %s", r.delay, r.victim)
	if r.late {
		s = fmt.Sprintf("%v after the commit %s", r.delay/10, r.victim)
	}
	switch r.victim {
	case homeAgent, sourceAgent, destAgent:
		s += fmt.Sprintf(" for %v", r.down)
	case cablePulled:
		s += fmt.Sprintf(" of machine %d for %v", r.cable+1, r.pulled)
	}
	return s
}

// A program that is moved round the cluster, while whatever carries it is
// killed or cut off, counts on without a gap and without saying anything twice.
// MOSIMG_FAULTS is how many faults, MOSIMG_SEED which ones.
func TestFaultsDoNoHarm(t *testing.T) {
	c := newCluster(t)
	seed := number(t, "MOSIMG_SEED", uint64(time.Now().UnixNano()%1e6))
	n := int(number(t, "MOSIMG_FAULTS", 12))
	t.Logf("again: MOSIMG_SEED=%d MOSIMG_FAULTS=%d", seed, n)
	rnd := rand.New(rand.NewPCG(seed, 0))
	j, dir := c.counter(c.all[0])
	hit, moved := make(map[victim]int), 0
	for i := range n {
		r := draw(rnd)
		began := time.Now()
		from := j.quiet()
		to := api.NodeID((int(from)+r.to)%3 + 1)
		c.canMove()
		migrated := make(chan error, 1)
		go func() { migrated <- j.migrate(to) }()
		if r.late {
			j.committed()
			time.Sleep(r.delay / 10)
		} else {
			time.Sleep(r.delay)
		}
		did := j.strike(r, from, to)
		t.Logf("round %d: %d to %d, %v (hit %v)", i, from, to, r, did)
		var err error
		select {
		case err = <-migrated:
		case <-time.After(90 * time.Second):
			t.Fatalf("round %d, %d to %d, %v: migrate does not return", i, from, to, r)
		}
		if did {
			hit[r.victim]++
		}
		at := j.quiet()
		if err == nil {
			moved++
			if at != to {
				t.Errorf("round %d: migrate to %d was content, and the job is on %d", i, to, at)
			}
		}
		j.onlyCopy(at)
		j.goesOn(dir)
		t.Logf("round %d: on %d after %v; migrate: %v", i, at, time.Since(began).Round(time.Millisecond), err)
	}
	t.Logf("%d of %d moves went through; hit: %v", moved, n, hit)
	j.counted(dir)
	c.nothingLeft()
}

// canMove waits until the home knows that CRIU works everywhere: an agent that
// was started again finds it out anew.
func (c *cluster) canMove() {
	c.t.Helper()
	c.eventually(60*time.Second, "all machines can take jobs", func() error {
		table, err := c.head.members()
		n := 0
		for _, m := range table.Members {
			if m.Migration && m.Liveness == api.Alive {
				n++
			}
		}
		if err == nil && n != len(c.all) {
			err = fmt.Errorf("%d can", n)
		}
		return err
	})
}

// strike does a round's fault and repairs what can be repaired. It tells
// whether there was something to hit.
func (j *job) strike(r round, from, to api.NodeID) bool {
	j.c.t.Helper()
	switch r.victim {
	case homeAgent:
		j.c.restart(j.home, r.down)
	case sourceAgent:
		j.c.restart(j.c.all[from-1], r.down)
	case destAgent:
		j.c.restart(j.c.all[to-1], r.down)
	case cablePulled:
		m := j.c.all[r.cable]
		m.cable("down")
		time.Sleep(r.pulled)
		m.cable("up")
	case criuProcess:
		return waitFor(2*time.Second, func() bool {
			for _, n := range []api.NodeID{from, to} {
				if killAll(j.c.all[n-1].procs("*/criu")) {
					return true
				}
			}
			return false
		})
	case spareShim:
		return waitFor(2*time.Second, func() bool {
			return j.spare(func(p migrate.Placement, id migrate.JobID) bool {
				return killAll(j.c.all[p.Node-1].procs(fmt.Sprintf("%s.%d/shim", id, p.Epoch)))
			})
		})
	case spareMount:
		return waitFor(2*time.Second, func() bool {
			return j.spare(func(p migrate.Placement, id migrate.JobID) bool {
				pid := j.c.all[p.Node-1].mountProcess(id, p.Epoch)
				return pid != 0 && killAll([]int{pid})
			})
		})
	}
	return true
}

func waitFor(d time.Duration, f func() bool) bool {
	for deadline := time.Now().Add(d); time.Now().Before(deadline); time.Sleep(3 * time.Millisecond) {
		if f() {
			return true
		}
	}
	return false
}

// restart kills a machine's agent and starts it again.
func (c *cluster) restart(m *machine, down time.Duration) {
	c.t.Helper()
	m.agent.kill()
	time.Sleep(down)
	if m == c.head.machine {
		c.head.joinSelf()
	} else {
		m.startAgent()
	}
}

// record is what the home has decided about the job.
func (j *job) record() (migrate.Record, error) {
	var r migrate.Record
	names, err := filepath.Glob(filepath.Join(j.home.dir, "agent/jobs/1/home/records/*.json"))
	if err != nil {
		return r, err
	}
	if len(names) != 1 {
		return r, fmt.Errorf("records: %v; want one", names)
	}
	data, err := os.ReadFile(names[0])
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	return r, err
}

// committed waits until the job's move is committed and not over, if that comes.
func (j *job) committed() {
	waitFor(4*time.Second, func() bool {
		r, err := j.record()
		return err == nil && r.Prev != nil
	})
}

// spare calls f on a copy that is not the job, if there is one: that which comes,
// or the one that stayed behind. The home stands still meanwhile, so that it is none until f is done.
func (j *job) spare(f func(migrate.Placement, migrate.JobID) bool) bool {
	if r, err := j.record(); err != nil || r.Next == nil && r.Prev == nil {
		return false
	}
	home := j.home.agent.cmd.Process
	if err := home.Signal(syscall.SIGSTOP); err != nil {
		return false
	}
	defer home.Signal(syscall.SIGCONT)
	time.Sleep(2 * time.Millisecond) // a signal does not stop a thread within a system call, as a rename is
	r, err := j.record()
	switch {
	case err != nil:
		return false
	case r.Next != nil:
		return f(*r.Next, r.Job)
	case r.Prev != nil:
		return f(*r.Prev, r.Job)
	}
	return false
}

// mountProcess is who serves the home files of a copy, or 0.
func (m *machine) mountProcess(id migrate.JobID, epoch uint64) int {
	names, _ := filepath.Glob(filepath.Join(m.dir, fmt.Sprintf("agent/jobs/*/files/%s.%d/process.json", id, epoch)))
	for _, name := range names {
		var p struct{ PID int }
		if data, err := os.ReadFile(name); err == nil && json.Unmarshal(data, &p) == nil {
			return p.PID
		}
	}
	return 0
}

// groups are the machine's control groups that match a pattern.
func (m *machine) groups(pattern string) []string {
	// By way of the machine's own mounts.
	all, _ := filepath.Glob(filepath.Join("/proc", strconv.Itoa(m.pid), "root/sys/fs/cgroup", m.cgroup, pattern))
	return all
}

// procs are the processes in those groups.
func (m *machine) procs(pattern string) (pids []int) {
	for _, g := range m.groups(pattern) {
		data, _ := os.ReadFile(filepath.Join(g, "cgroup.procs")) // a group that goes has none
		for f := range strings.FieldsSeq(string(data)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// killAll tells whether there was somebody to kill.
func killAll(pids []int) bool {
	hit := false
	for _, pid := range pids {
		hit = syscall.Kill(pid, syscall.SIGKILL) == nil || hit
	}
	return hit
}

// quiet waits until the job runs on one node, and its last move is over to the
// last step; it returns the node.
func (j *job) quiet() api.NodeID {
	j.c.t.Helper()
	var at api.NodeID
	j.c.eventually(60*time.Second, "the job runs, and is not moving", func() error {
		select {
		case <-j.done:
			j.c.t.Fatalf("mosrun has ended: %v: %s", j.cmd.ProcessState, j.errs.String())
		default:
		}
		st, err := j.status()
		if err != nil {
			return err
		}
		r, err := j.record()
		if err != nil {
			return err
		}
		if st.State != api.JobRuns || r.Todo() != migrate.Nothing {
			return fmt.Errorf("mosps shows %+v, the record is %+v", st, r)
		}
		at = st.Node
		return nil
	})
	return at
}

// onlyCopy waits until the one node has the one copy of the job, and no node
// has anything else.
func (j *job) onlyCopy(at api.NodeID) {
	j.c.t.Helper()
	j.c.eventually(30*time.Second, fmt.Sprintf("there is one copy, on node %d", at), func() error {
		for i, m := range j.c.all {
			want := 0
			if i+1 == int(at) {
				want = 1
			}
			copies := m.groups("*/job")
			if len(copies) != want {
				return fmt.Errorf("%s has %v", m.name, copies)
			}
			for _, g := range copies {
				if events, err := os.ReadFile(filepath.Join(g, "cgroup.events")); err != nil || !strings.Contains(string(events), "populated 1") || !strings.Contains(string(events), "frozen 0") {
					return fmt.Errorf("%s: %q, %w", g, events, err)
				}
			}
			counters := 0
			for _, pid := range m.procs("*/job") { // the program has a leader above it
				if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); strings.HasPrefix(string(comm), "python") {
					counters++
				}
			}
			if counters != want {
				return fmt.Errorf("%d counters on %s", counters, m.name)
			}
		}
		return nil
	})
}

// goesOn checks that the job says more and has said everything once, to its
// terminal and to its file.
func (j *job) goesOn(dir string) {
	j.c.t.Helper()
	was := len(j.out.String())
	j.c.eventually(20*time.Second, "the job goes on", func() error {
		if len(j.out.String()) == was {
			return fmt.Errorf("after %.20q nothing comes", j.out.String()[max(0, was-20):])
		}
		return nil
	})
	file, err := os.ReadFile(filepath.Join(dir, "counted"))
	if err != nil {
		j.c.t.Fatal(err)
	}
	for what, text := range map[string]string{"output": j.out.String(), "file": string(file)} {
		lines := strings.SplitAfter(text, "\n")
		for i, line := range lines[:len(lines)-1] {
			if line != strconv.Itoa(i+1)+"\n" {
				j.c.t.Fatalf("line %d of the %s is %q", i+1, what, line)
			}
		}
	}
}

// What a job cannot outlive ends it: once, with a word why, and with nothing
// left of it on any machine.
func TestFaultsThatEndAJob(t *testing.T) {
	c := newCluster(t)
	for _, x := range []struct {
		name string
		node api.NodeID // where the job is
		kill func(*job, migrate.Record) []int
	}{
		{"the shim at home", 1, shimOf},
		{"the shim of a guest", 2, shimOf},
		{"the mount of a guest", 2, func(j *job, r migrate.Record) []int {
			return []int{j.c.all[r.At.Node-1].mountProcess(r.Job, r.At.Epoch)}
		}},
		{"the keeper of a guest's files", 2, func(j *job, _ migrate.Record) []int { return j.home.keepers() }},
		{"mosrun of a job at home", 1, mosrunOf},
		{"mosrun of a guest", 2, mosrunOf},
	} {
		j, _ := c.counter(c.all[0])
		if x.node != 1 {
			if err := j.migrate(x.node); err != nil {
				t.Fatal(err)
			}
		}
		j.quiet()
		r, err := j.record()
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if pids := x.kill(j, r); !killAll(pids) {
			t.Fatalf("%s: nobody to kill: %v", x.name, pids)
		}
		status := j.ends()
		t.Logf("%s: mosrun ended after %v with %d: %s", x.name, time.Since(began).Round(time.Millisecond), status, j.errs.String())
		if !strings.HasPrefix(x.name, "mosrun") && (status != 125 || strings.Count(j.errs.String(), "was lost: ") != 1) {
			t.Errorf("%s was killed: mosrun ended with %d and %q; want 125, and why the job was lost", x.name, status, j.errs.String())
		}
		c.nowhere(x.name)
		next := c.mosrun(c.all[0], c.dir, "sh", "-c", "echo next; exit 3")
		if status := next.ends(); status != 3 || next.out.String() != "next\n" {
			t.Errorf("after %s was killed the next job ended with %d, %q, %q", x.name, status, next.out.String(), next.errs.String())
		}
	}
	c.nothingLeft()
}

func shimOf(j *job, r migrate.Record) []int {
	return j.c.all[r.At.Node-1].procs(fmt.Sprintf("%s.*/shim", r.Job))
}

// mosrunOf is mosrun itself: nsenter and sh became it.
func mosrunOf(j *job, _ migrate.Record) []int { return []int{j.cmd.Process.Pid} }

// keepers are the machine's keepers of home files.
func (m *machine) keepers() (pids []int) {
	out, _ := exec.Command("pgrep", "-f", "homefiles-keeper "+m.dir).Output() // none is no error
	for f := range strings.FieldsSeq(string(out)) {
		if pid, err := strconv.Atoi(f); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// nowhere waits until no machine has a copy of any job.
func (c *cluster) nowhere(after string) {
	c.t.Helper()
	c.eventually(30*time.Second, "after "+after+" was killed the job is gone", func() error {
		for _, m := range c.all {
			if left := m.groups("*/cgroup.procs"); len(left) > 0 {
				return fmt.Errorf("%s: %v", m.name, left)
			}
		}
		return nil
	})
}
