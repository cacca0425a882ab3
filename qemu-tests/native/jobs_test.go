package native

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/internal/api"
)

// cluster is a head and two nodes, all members, on which jobs can move.
type cluster struct {
	*world
	head *head
	all  []*machine // by node number, from 1
}

// Where tests move jobs by hand, nobody else does.
func newCluster(t *testing.T) *cluster {
	t.Helper()
	return newClusterOf(t, "--balance=off")
}

// newClusterOf is newCluster with other flags of its agents.
func newClusterOf(t *testing.T, flags ...string) *cluster {
	t.Helper()
	if os.Getenv("MOSIMG_CRIU") == "" {
		t.Skip("moves jobs: set MOSIMG_CRIU to a CRIU bundle (mosimg criu)")
	}
	w := newWorld(t)
	w.flags = flags
	c := &cluster{world: w, head: w.head("head", 1, "10.77.0.1/24")}
	c.head.joinSelf()
	c.all = []*machine{c.head.machine, w.machine("a", 2), w.machine("b", 3)}
	c.head.record(c.head.mac, "a member", alive)
	for _, m := range c.all[1:] {
		c.head.mustNode("approve", "--next", "1", "--for", "1m")
		m.boot(true)
		c.head.record(m.mac, "a member", alive)
	}
	for _, m := range c.all {
		m.sees(1, 2, 3)
		c.eventually(30*time.Second, m.name+" knows that CRIU works", func() error {
			t, err := m.members()
			for _, x := range t.Members {
				if !x.Migration {
					return fmt.Errorf("node %d: no", x.Node)
				}
			}
			return err
		})
	}
	t.Cleanup(func() { c.nothingLeft() })
	return c
}

// nothingLeft checks that no job has left a process, a mount, a folder or a
// control group on any machine.
func (c *cluster) nothingLeft() {
	if c.t.Failed() {
		c.sweep()
		return
	}
	c.eventually(15*time.Second, "nothing is left of any job", func() error {
		for _, m := range c.all {
			for _, pattern := range []string{"node/capsules/*", "node/images/*", "node/journal/*", "files/*", "home/records/*", "home/info/*"} {
				if left, _ := filepath.Glob(filepath.Join(m.dir, "agent/jobs/*", pattern)); len(left) > 0 {
					return fmt.Errorf("%s: %v", m.name, left)
				}
			}
			if left, _ := m.command("sh", "-c", "ls -d /sys/fs/cgroup/"+m.cgroup+"/*/").Output(); len(left) > 0 {
				return fmt.Errorf("%s: control groups %s", m.name, left)
			}
			mounts, err := m.command("cat", "/proc/self/mountinfo").Output()
			if err != nil {
				return err
			}
			if bytes.Contains(mounts, []byte("fuse.mosimg")) {
				return fmt.Errorf("%s: home files are mounted", m.name)
			}
		}
		return nil
	})
	c.sweep()
}

// sweep removes what even a failed test must not leave on this machine.
func (c *cluster) sweep() {
	for _, m := range c.all {
		if m.agent != nil {
			m.agent.kill()
		}
		_ = m.command("sh", "-c", removeGroups(m.cgroup)).Run() // as far as it goes
	}
	out, _ := exec.Command("pgrep", "-f", "homefiles-(keeper|mount) .*"+c.dir).Output()
	for pid := range strings.FieldsSeq(string(out)) {
		if n, err := strconv.Atoi(pid); err == nil {
			if p, err := os.FindProcess(n); err == nil {
				p.Kill()
			}
		}
	}
}

// job is a mosrun that runs.
type job struct {
	c    *cluster
	cmd  *exec.Cmd
	out  buffer
	errs buffer
	done chan struct{}
	home *machine
}

// mosrun starts a job on a machine, in a folder.
func (c *cluster) mosrun(on *machine, dir string, argv ...string) *job {
	c.t.Helper()
	return c.mosrunFrom(on, dir, ":", nil, argv...)
}

// mosrunFrom is mosrun by a shell that has run a script before, and with a stdin.
func (c *cluster) mosrunFrom(on *machine, dir, script string, stdin io.Reader, argv ...string) *job {
	c.t.Helper()
	j := &job{c: c, home: on, done: make(chan struct{})}
	j.cmd = c.shell(on, dir, script, append([]string{c.bin + "/mosagent", "mosrun", "--socket", on.socket()}, argv...)...)
	j.cmd.Stdin, j.cmd.Stdout, j.cmd.Stderr = stdin, &j.out, &j.errs
	j.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // as a shell does, so that ctrl-Z can stop it
	if err := j.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	go func() {
		j.cmd.Wait()
		close(j.done)
	}()
	c.t.Cleanup(func() {
		j.cmd.Process.Kill()
		<-j.done
	})
	return j
}

// shell is a command on a machine that a shell becomes, in a folder and after a script.
func (c *cluster) shell(on *machine, dir, script string, argv ...string) *exec.Cmd {
	// nsenter begins in /.
	return on.command(append([]string{"sh", "-c", `cd "$0" && ` + script + ` && exec "$@"`, dir}, argv...)...)
}

// status is what mosps shows of the job.
func (j *job) status() (api.JobStatus, error) {
	out, err := j.home.command(j.c.bin+"/mosagent", "mosps", "--json", "--socket", j.home.socket()).Output()
	if err != nil {
		return api.JobStatus{}, fmt.Errorf("mosps: %s", stderrOf(err))
	}
	var t api.JobTable
	if err := json.Unmarshal(out, &t); err != nil {
		return api.JobStatus{}, err
	}
	for _, x := range t.Jobs {
		if x.PID == j.cmd.Process.Pid {
			return x, nil
		}
	}
	return api.JobStatus{}, fmt.Errorf("mosps shows no job of mosrun %d: %s", j.cmd.Process.Pid, out)
}

// migrate moves the job as a user does.
func (j *job) migrate(to api.NodeID) error {
	out, err := j.home.command(j.c.bin+"/mosagent", "migrate", "--socket", j.home.socket(), strconv.Itoa(j.cmd.Process.Pid), strconv.Itoa(int(to))).CombinedOutput()
	if err != nil {
		return fmt.Errorf("migrate to %d: %w: %s", to, err, out)
	}
	return nil
}

// prints waits until the job has printed something.
func (j *job) prints(want string) {
	j.c.t.Helper()
	j.c.eventually(20*time.Second, "the job prints "+want, func() error {
		select {
		case <-j.done:
			return fmt.Errorf("mosrun has ended: %v: %s", j.cmd.ProcessState, j.errs.String())
		default:
		}
		if out := j.out.String(); !strings.Contains(out, want) {
			return fmt.Errorf("it has printed %.200q", out)
		}
		return nil
	})
}

// ends waits for the end and returns mosrun's exit status.
func (j *job) ends() int {
	j.c.t.Helper()
	select {
	case <-j.done:
	case <-time.After(60 * time.Second):
		j.c.t.Fatalf("mosrun does not end; it has said %q", j.errs.String())
	}
	return j.cmd.ProcessState.ExitCode()
}

// counterProgram counts to stdout and, by a pipe and a thread, into a file
// until there is a file stop.
const counterProgram = `import os, sys, threading, time
r, w = os.pipe()
def second():
    with os.fdopen(r) as lines, open("counted", "w") as log:
        for line in lines:
            log.write(line)
            log.flush()
t = threading.Thread(target=second)
t.start()
i = 0
while not os.path.exists("stop"):
    i += 1
    os.write(w, b"%d\n" % i)
    print(i, flush=True)
    time.sleep(0.005)
os.close(w)
t.join()
sys.exit(7)
`

// counter starts the counter in a folder of its own.
func (c *cluster) counter(on *machine) (*job, string) {
	c.t.Helper()
	dir, err := os.MkdirTemp(c.dir, "counter")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "counter.py"), []byte(counterProgram), 0o644)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	j := c.mosrun(on, dir, "python3", "counter.py")
	j.prints("20\n")
	return j, dir
}

// counted ends a counter and checks every number.
func (j *job) counted(dir string) {
	j.c.t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "stop"), nil, 0o644); err != nil {
		j.c.t.Fatal(err)
	}
	if status := j.ends(); status != 7 {
		j.c.t.Errorf("mosrun ended with %d, %q; want 7", status, j.errs.String())
	}
	file, err := os.ReadFile(filepath.Join(dir, "counted"))
	if err != nil {
		j.c.t.Fatal(err)
	}
	for what, text := range map[string]string{"output": j.out.String(), "file": string(file)} {
		for i, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
			if line != strconv.Itoa(i+1) {
				j.c.t.Fatalf("line %d of the %s is %q", i+1, what, line)
			}
		}
	}
	if string(file) != j.out.String() {
		j.c.t.Errorf("the file has %d bytes, the output %d", len(file), len(j.out.String()))
	}
}

// A running program moves round the cluster and does not notice.
func TestJobMovesRound(t *testing.T) {
	c := newCluster(t)
	j, dir := c.counter(c.all[0])
	var downtimes []time.Duration
	for i := range 9 {
		to := api.NodeID([]int{2, 3, 1}[i%3])
		if err := j.migrate(to); err != nil {
			t.Fatal(err)
		}
		st, err := j.status()
		if err != nil {
			t.Fatal(err)
		}
		if st.Node != to || st.Moves != i+1 || st.State != api.JobRuns {
			t.Fatalf("after move %d: %+v; want it on node %d", i+1, st, to)
		}
		downtimes = append(downtimes, st.Downtime.Round(time.Millisecond))
	}
	t.Logf("downtimes %v", downtimes)
	j.counted(dir)
}
