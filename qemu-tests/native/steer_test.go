package native

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/api"
)

// steerings are what a user does with jobs and expects as of any program, in
// the cluster of TestProgramsMove.
var steerings = []struct {
	name string
	do   func(*cluster)
}{
	{"stdin", (*cluster).stdinMoves},
	{"end", (*cluster).endComesThrough},
	{"SIGTERM", (*cluster).signalFindsJob},
	{"ctrl-Z", (*cluster).jobStops},
	{"surroundings", (*cluster).surroundingsStay},
	{"start", (*cluster).startRefused},
	{"migrate", (*cluster).migrateRefused},
	{"other user", (*cluster).otherUserKeptOut},
}

// slowly is a reader that takes its time.
type slowly struct{ r io.Reader }

func (s slowly) Read(p []byte) (int, error) {
	time.Sleep(20 * time.Millisecond)
	return s.r.Read(p[:min(len(p), 64<<10)])
}

// mustMigrate moves the job.
func (j *job) mustMigrate(to api.NodeID) {
	j.c.t.Helper()
	if err := j.migrate(to); err != nil {
		j.c.t.Fatal(err)
	}
}

// script starts a shell as a job that prints "ready" and goes on when there is a
// file "go".
func (c *cluster) script(name, before, after string) *job {
	c.t.Helper()
	j := c.mosrun(c.all[0], c.folder(name), "sh", "-c", before+`; echo ready; while ! test -e go; do sleep 0.05; done; `+after)
	j.prints("ready\n")
	return j
}

// goesOn makes the file for which the script waits.
func (c *cluster) goesOn(name string) {
	c.t.Helper()
	if err := os.WriteFile(filepath.Join(c.dir, name, "go"), nil, 0o644); err != nil {
		c.t.Fatal(err)
	}
}

// Each byte of stdin comes to the program once and in order while it moves.
func (c *cluster) stdinMoves() {
	in := make([]byte, 20<<20)
	r := rand.NewChaCha8([32]byte{1})
	_, _ = r.Read(in) // never fails
	j := c.mosrunFrom(c.all[0], c.folder("stdin"), ":", slowly{bytes.NewReader(in)}, "cat")
	y := j.travels()
	c.t.Log(y)
	if status := j.ends(); status != 0 || j.out.String() != string(in) {
		c.t.Errorf("cat of %d bytes ended with %d and %d bytes, the same: %v; %q", len(in), status, len(j.out.String()), j.out.String() == string(in), j.errs.String())
	}
	if y.moves == 0 {
		c.t.Error("it was never moved")
	}
}

// A job's exit status, or the signal that killed it, is that of its mosrun:
// at home and from another node.
func (c *cluster) endComesThrough() {
	for i, tc := range []struct {
		end    string
		exit   int
		signal syscall.Signal
	}{{"exit 0", 0, 0}, {"exit 255", 255, 0}, {"kill -KILL $$", -1, syscall.SIGKILL}, {"kill -SEGV $$", -1, syscall.SIGSEGV}} {
		for _, moves := range []bool{false, true} {
			name := fmt.Sprintf("end%d-%v", i, moves)
			j := c.script(name, ":", tc.end)
			if moves {
				j.mustMigrate(2)
			}
			c.goesOn(name)
			exit := j.ends()
			var signal syscall.Signal
			if ws, ok := j.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
				signal = ws.Signal()
			}
			if exit != tc.exit || signal != tc.signal || j.errs.String() != "" {
				c.t.Errorf("%q (moved: %v) ended mosrun with %d, signal %v, %q", tc.end, moves, exit, signal, j.errs.String())
			}
		}
	}
}

// kill to mosrun reaches the job on its node.
func (c *cluster) signalFindsJob() {
	j := c.script("term", `trap 'echo caught; exit 9' TERM`, ":")
	j.mustMigrate(2)
	if err := j.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		c.t.Fatal(err)
	}
	if status := j.ends(); status != 9 || j.out.String() != "ready\ncaught\n" {
		c.t.Errorf("after SIGTERM mosrun ended with %d, %q; want the job's own 9", status, j.out.String())
	}
	j = c.script("term-plain", ":", ":")
	j.mustMigrate(3)
	if err := j.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		c.t.Fatal(err)
	}
	j.ends()
	if ws, ok := j.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() || ws.Signal() != syscall.SIGTERM {
		c.t.Errorf("a job that SIGTERM killed ended mosrun as %v", j.cmd.ProcessState)
	}
}

// state is the letter of a process's state.
func state(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return err.Error()
	}
	rest := string(data[bytes.LastIndexByte(data, ')')+1:])
	return strings.Fields(rest)[0]
}

// ctrl-Z stops the job where it is and mosrun with it; fg lets both go on.
func (c *cluster) jobStops() {
	j, dir := c.counter(c.all[0])
	for i, to := range []api.NodeID{2, 1} {
		j.mustMigrate(to)
		pid := j.cmd.Process.Pid
		if err := j.cmd.Process.Signal(syscall.SIGTSTP); err != nil {
			c.t.Fatal(err)
		}
		c.eventually(10*time.Second, "mosrun is stopped", func() error {
			if s := state(pid); s != "T" {
				return fmt.Errorf("its state is %s", s)
			}
			return nil
		})
		if st, err := j.status(); err != nil || st.State != api.JobStopped {
			c.t.Errorf("after ctrl-Z: %+v, %v", st, err)
		}
		counted := func() int {
			data, err := os.ReadFile(filepath.Join(dir, "counted"))
			if err != nil {
				c.t.Fatal(err)
			}
			return len(data)
		}
		before := counted()
		time.Sleep(300 * time.Millisecond) // what must not happen takes time
		if after := counted(); after != before {
			c.t.Errorf("round %d: a stopped job has written %d bytes", i, after-before)
		}
		if err := j.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			c.t.Fatal(err)
		}
		c.eventually(10*time.Second, "the job goes on", func() error {
			if counted() == before {
				return fmt.Errorf("it has written nothing")
			}
			return nil
		})
	}
	j.counted(dir)
}

// What a program has of its caller it has under mosrun, before and after a move.
func (c *cluster) surroundingsStay() {
	const show = `umask; pwd; ulimit -a; nice; cat /proc/self/oom_score_adj; id -G; env | grep -v '^_=' | sort; touch new$n; stat -c '%A %U' new$n; grep -E '^(Sig(Ign|Blk)|Uid|Gid)' /proc/self/status; ls -l ../surroundings-file`
	const set = `umask 027 && ulimit -n 333 && ulimit -c 0 && ulimit -s 4096 && export SAID='a b' EMPTY= && trap '' HUP INT && cd -P .`
	if err := os.WriteFile(filepath.Join(c.dir, "surroundings-file"), []byte("x"), 0o604); err != nil {
		c.t.Fatal(err)
	}
	dir := c.folder("surroundings")
	native, err := c.shell(c.all[0], dir, set, "nice", "-n", "5", "sh", "-c", "n=0; "+show).Output()
	if err != nil {
		c.t.Fatal(stderrOf(err))
	}
	want := string(native)
	for _, to := range []api.NodeID{1, 2, 3} {
		_ = os.Remove(filepath.Join(dir, "go")) // of the last round
		j := c.mosrunFrom(c.all[0], dir, set+` && renice -n 5 -p $$ >/dev/null`, nil, "sh", "-c",
			`n=`+strconv.Itoa(int(to))+`; `+show+`; echo --; while ! test -e go; do sleep 0.05; done; `+show)
		j.prints("--\n")
		if to != 1 {
			j.mustMigrate(to)
		}
		c.goesOn("surroundings")
		if status := j.ends(); status != 0 || j.errs.String() != "" {
			c.t.Errorf("on node %d it ended with %d, %q", to, status, j.errs.String())
		}
		before, after, _ := strings.Cut(j.out.String(), "--\n")
		for when, got := range map[string]string{"before": before, "after": after} {
			if diff := cmp.Diff(want, got); diff != "" {
				c.t.Errorf("%s the move to node %d (-without mosrun +with):\n%s", when, to, diff)
			}
		}
	}
}

// What cannot be started ends mosrun as it ends env, nohup and a shell.
func (c *cluster) startRefused() {
	dir := c.folder("start")
	if err := os.WriteFile(filepath.Join(dir, "plain"), []byte("no program"), 0o644); err != nil {
		c.t.Fatal(err)
	}
	for _, tc := range []struct {
		argv []string
		want int
		says string
	}{
		{[]string{"there-is-no-such-program"}, 127, "there-is-no-such-program"},
		{[]string{"./none"}, 127, "./none"},
		{[]string{"./plain"}, 126, "./plain"},
		{[]string{"/"}, 126, "/"},
		{[]string{"-r", "nowhere", "true"}, 125, "nowhere"},
		{[]string{}, 125, ""},
	} {
		j := c.mosrun(c.all[0], dir, tc.argv...)
		if status := j.ends(); status != tc.want || !strings.Contains(j.errs.String(), tc.says) || j.errs.String() == "" {
			c.t.Errorf("mosrun %q ended with %d, %q; want %d", tc.argv, status, j.errs.String(), tc.want)
		}
	}
}

// A move that cannot be is refused, with why, and the job runs on.
func (c *cluster) migrateRefused() {
	j, dir := c.counter(c.all[0])
	pid := strconv.Itoa(j.cmd.Process.Pid)
	for _, tc := range []struct {
		job, to string
		want    int
		says    string
	}{
		{"1-1-abcdef", "2", 5, "none of this name"},
		{"4000000", "2", 5, "none of this name"},
		{"../x", "2", 5, "has such a name"},
		{pid, "9", 5, "not a member"},
		{pid, "nowhere", 5, "not a member"},
		{pid, "home", 4, "already"},
		{pid, "1", 4, "already"},
	} {
		out, err := j.home.command(c.bin+"/mosagent", "migrate", "--socket", j.home.socket(), tc.job, tc.to).CombinedOutput()
		if got := exitOf(err); got != tc.want || !strings.Contains(string(out), tc.says) {
			c.t.Errorf("migrate %s %s = %d, %s; want %d, %q", tc.job, tc.to, got, out, tc.want, tc.says)
		}
	}
	j.mustMigrate(3)
	j.counted(dir)
}

func exitOf(err error) int {
	if err == nil {
		return 0
	}
	if ee, ok := err.(*exec.ExitError); ok { //nolint:errorlint // straight from exec
		return ee.ExitCode()
	}
	return -1
}

// A user neither sees nor steers nor reads another one's job.
func (c *cluster) otherUserKeptOut() {
	// Users can go where mosrun and the socket are.
	if err := os.Chmod(filepath.Dir(c.dir), 0o711); err != nil {
		c.t.Fatal(err)
	}
	j, dir := c.counter(c.all[0])
	st, err := j.status()
	if err != nil {
		c.t.Fatal(err)
	}
	as := func(argv ...string) (string, int) {
		out, err := j.home.command(append([]string{"setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"}, argv...)...).CombinedOutput()
		return string(out), exitOf(err)
	}
	tool := func(argv ...string) (string, int) {
		return as(append([]string{c.bin + "/mosagent", argv[0], "--socket", j.home.socket()}, argv[1:]...)...)
	}
	if out, status := tool("mosps", "--json"); status != 0 || strings.Contains(out, st.ID) || strings.Contains(out, "counter.py") {
		c.t.Errorf("mosps of another user = %d, %s", status, out)
	}
	for _, name := range []string{st.ID, strconv.Itoa(st.PID)} {
		if out, status := tool("migrate", name, "2"); status != 4 && status != 5 {
			c.t.Errorf("migrate %s by another user = %d, %s", name, status, out)
		}
		for path, method := range map[string]string{"": "GET", "/kill": "POST", "/move": "POST", "/attach": "GET"} {
			out, status := as("curl", "-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket", j.home.socket(), "-X", method,
				"-H", "Connection: Upgrade", "-H", "Upgrade: "+api.UpgradeJob, "-H", "Content-Type: application/json", "-d", `{"to":"2"}`, "http://agent"+api.PathJobs+"/"+name+path)
			if status != 0 || out != "403" && out != "404" {
				c.t.Errorf("%s %s of another user's job = %q, curl %d; want 403 or 404", method, path, out, status)
			}
		}
	}
	if out, status := as("kill", "-TERM", strconv.Itoa(st.PID)); status == 0 {
		c.t.Errorf("kill of another user's mosrun: %s", out)
	}
	if now, err := j.status(); err != nil || now.Node != 1 || now.Moves != 0 || now.State != api.JobRuns {
		c.t.Errorf("after all that: %+v, %v", now, err)
	}
	j.mustMigrate(2)
	j.counted(dir)
}
