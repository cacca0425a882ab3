package jobs_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/agent/jobs"
	"mosimg/agent/jobs/client"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// mosrunMain is a mosrun of its own process: it starts the job that its second
// argument describes by the socket of the first, says how that went, and waits
// for the end of its stdin.
func mosrunMain(args []string) int {
	var req api.JobStart
	if err := json.Unmarshal([]byte(args[1]), &req); err != nil {
		fmt.Println(err)
		return 2
	}
	id, err := client.Agent{Socket: args[0]}.Start(context.Background(), req)
	if err != nil {
		id = "error: " + err.Error()
	}
	fmt.Println(id)
	io.Copy(io.Discard, os.Stdin)
	return 0
}

// other is a mosrun of its own process.
type other struct {
	cmd *exec.Cmd
	id  string
}

// other starts a job in a process of a user.
func (h *home) other(cred *syscall.Credential, req api.JobStart, prepare ...string) *other {
	h.t.Helper()
	exe := filepath.Join(h.dir, "test")
	if _, err := os.Stat(exe); err != nil {
		data, err := os.ReadFile("/proc/self/exe")
		if err == nil {
			err = os.WriteFile(exe, data, 0o755)
		}
		if err != nil {
			h.t.Fatal(err)
		}
	}
	body, err := json.Marshal(req)
	if err != nil {
		h.t.Fatal(err)
	}
	argv := append(slices.Clone(prepare), exe, "test-program", "mosrun", h.socket, string(body))
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred, Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = h.t.Output()
	in, err := cmd.StdinPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { in.Close(); cmd.Process.Kill(); cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		h.t.Fatal(err)
	}
	return &other{cmd, strings.TrimSpace(line)}
}

func (o *other) kill() {
	o.cmd.Process.Kill()
	o.cmd.Wait()
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("other users' processes need root")
	}
}

func alice() *syscall.Credential {
	return &syscall.Credential{Uid: 12345, Gid: 12345, Groups: []uint32{12345, 20001, 20002}}
}

// A job has what its mosrun has, by the kernel's word, and no more.
func TestJobHasItsCallersRights(t *testing.T) {
	needRoot(t)
	f := newFleet(t)
	h := newHome(t, f)
	req := request()
	req.Nice = 5
	req.Limits = []api.JobLimit{{Resource: unix.RLIMIT_NOFILE, Cur: 50, Max: 60}}
	m := h.other(alice(), req, "prlimit", "--nofile=100:200", "--core=7:9")
	f.mu.Lock()
	spec, ok := f.specs[migrate.JobID(m.id)]
	f.mu.Unlock()
	if !ok {
		t.Fatalf("not started: %s", m.id)
	}
	if spec.UID != 12345 || spec.GID != 12345 || !slices.Equal(spec.Groups, []uint32{12345, 20001, 20002}) || spec.Nice != 5 {
		t.Errorf("the job is %d:%d %v, nice %d", spec.UID, spec.GID, spec.Groups, spec.Nice)
	}
	for _, want := range []control.Limit{
		{Resource: unix.RLIMIT_NOFILE, Cur: 50, Max: 60}, // as asked
		{Resource: unix.RLIMIT_CORE, Cur: 7, Max: 9},     // not named, and so the caller's and not the agent's
	} {
		if !slices.Contains(spec.Limits, want) {
			t.Errorf("limits %v; want %v among them", spec.Limits, want)
		}
	}
	for _, tc := range []struct {
		name string
		set  func(*api.JobStart)
		want string
	}{
		{"a group", func(r *api.JobStart) { r.Groups = []uint32{12345, 0} }, "group 0: the caller is not in it"},
		{"a higher limit", func(r *api.JobStart) { r.Limits = []api.JobLimit{{Resource: unix.RLIMIT_NOFILE, Cur: 1, Max: 201}} }, "above the caller's maximum of 200"},
		{"an unknown limit", func(r *api.JobStart) { r.Limits = []api.JobLimit{{Resource: 99}} }, "there is no such resource"},
		{"nice", func(r *api.JobStart) { r.Nice = -1 }, "the caller's is 0"},
	} {
		req := request()
		tc.set(&req)
		if m := h.other(alice(), req, "prlimit", "--nofile=100:200"); !strings.Contains(m.id, tc.want) {
			t.Errorf("%s: %q; want %q in it", tc.name, m.id, tc.want)
		}
	}
}

// askMain asks an agent something as the user whose process it is: socket, verb, job.
func askMain(args []string) int {
	ctx := context.Background()
	a := client.Agent{Socket: args[0]}
	var err error
	switch args[1] {
	case "list":
		var table api.JobTable
		table, err = a.List(ctx)
		for _, j := range table.Jobs {
			fmt.Println(j.ID)
		}
	case "show":
		_, err = a.Show(ctx, args[2])
	case "move":
		_, err = a.Move(ctx, args[2], "2")
	case "kill":
		err = a.Kill(ctx, args[2])
	case "attach":
		s, serr := client.New(client.Config{Agent: a, Job: args[2], Stdin: -1, Stdout: 1, Stderr: 2})
		if serr != nil {
			fmt.Println(serr)
			return 2
		}
		var res client.Result
		if res, err = s.Run(ctx); err == nil {
			err = errors.New(res.Lost)
		}
	}
	if err != nil {
		fmt.Println(fault.KindOf(err), err)
	}
	return 0
}

// A user sees and steers own jobs only; root all.
func TestOthersJobs(t *testing.T) {
	needRoot(t)
	f := newFleet(t)
	h := newHome(t, f)
	m := h.other(alice(), request())
	ask := func(uid uint32, verb string) string {
		cmd := exec.Command(filepath.Join(h.dir, "test"), "test-program", "ask", h.socket, verb, m.id)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Error(err)
		}
		return strings.TrimSpace(string(out))
	}
	const bob = 12346
	for _, verb := range []string{"show", "move", "kill", "attach"} {
		if got := ask(bob, verb); !strings.Contains(got, "it is another user's") {
			t.Errorf("%s another's job: %q", verb, got)
		}
	}
	for uid, want := range map[uint32]string{bob: "", 12345: m.id, 0: m.id} {
		if got := ask(uid, "list"); got != want {
			t.Errorf("user %d sees %q; want %q", uid, got, want)
		}
	}
	st, err := h.agent().Show(t.Context(), fmt.Sprint(m.cmd.Process.Pid))
	if err != nil || st.ID != m.id || st.UID != 12345 || st.PID != m.cmd.Process.Pid {
		t.Errorf("the job by its mosrun's pid: %+v, %v", st, err)
	}
	if got := ask(12345, "kill"); got != "" {
		t.Errorf("kill of an own job: %q", got)
	}
}

// The answer to a start may be lost, by an agent that is restarted too: who asks
// again gets the job that was begun.
func TestSameRequestIsTheSameJob(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	req := request()
	ids := make(chan string, 5)
	for range cap(ids) {
		go func() {
			id, err := h.agent().Start(t.Context(), req)
			if err != nil {
				t.Error(err)
			}
			ids <- id
		}()
	}
	id := <-ids
	for range cap(ids) - 1 {
		if again := <-ids; again != id {
			t.Errorf("started as %s and as %s", id, again)
		}
	}
	h.stop()
	h.start()
	if again := h.run(req); again != id {
		t.Errorf("after a restart of the agent: %s; want %s", again, id)
	}
	if f.only(id) == nil {
		t.Error("there is not one copy of the job")
	}
	if want := fmt.Sprintf("1-%d-%s", os.Getpid(), req.Token[:6]); id != want {
		t.Errorf("the job is called %s; want %s", id, want)
	}
	m := h.attach(id, h.socket)
	m.stdin.Close()
	if res, _, _ := m.wait(); res.Exit != 3 {
		t.Errorf("the job ended as %+v", res)
	}
}

// What cannot be started leaves nothing, and says by its errno whether there is
// no such program (127) or it cannot be run (126).
func TestProgramThatCannotRun(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	f.refuse = fault.New(fault.NotFound, "run", "nosuch", unix.ENOENT, "")
	req := request()
	_, err := h.agent().Start(t.Context(), req)
	if fault.KindOf(err) != fault.NotFound || errnoOf(err) != unix.ENOENT {
		t.Errorf("start: %v; want errno %d", err, unix.ENOENT)
	}
	if left, _ := filepath.Glob(filepath.Join(h.dir, "*", "*.json")); len(left) > 0 {
		t.Errorf("journalled: %v", left)
	}
	f.mu.Lock()
	f.refuse = nil
	f.mu.Unlock()
	id := h.run(req) // of the same token, when it is there
	if err := h.agent().Kill(t.Context(), id); err != nil {
		t.Error(err)
	}
}

// errnoOf is what an agent says that a system call gave.
func errnoOf(err error) unix.Errno {
	var remote *unixhttp.Remote
	if !errors.As(err, &remote) {
		return 0
	}
	return remote.Errno
}

func TestStartRefusals(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	for _, tc := range []struct {
		name string
		set  func(*api.JobStart)
		kind fault.Kind
		want string
	}{
		{"no program", func(r *api.JobStart) { r.Argv = nil }, fault.Usage, "no program is named"},
		{"short token", func(r *api.JobStart) { r.Token = "abc" }, fault.Usage, "32 small hex digits"},
		{"token as a path", func(r *api.JobStart) { r.Token = "../../../../../../../../../etc/x" }, fault.Usage, "32 small hex digits"},
		{"relative folder", func(r *api.JobStart) { r.Dir = "tmp" }, fault.Usage, "not an absolute path"},
		{"zero byte", func(r *api.JobStart) { r.Env = []string{"A=\x00"} }, fault.Usage, "env: a zero byte"},
		{"umask", func(r *api.JobStart) { r.Umask = 0o1000 }, fault.Usage, "umask"},
		{"all at once", func(r *api.JobStart) { r.Nice, r.Umask, r.Ignored = 20, -1, []int{65} }, fault.Usage, "3 faults"},
		{"limit above itself", func(r *api.JobStart) { r.Limits = []api.JobLimit{{Resource: 7, Cur: 2, Max: 1}} }, fault.Usage, "above its own maximum"},
		{"no such node", func(r *api.JobStart) { r.Node = "nope" }, fault.NotFound, "it is not a member"},
		{"a node that is down", func(r *api.JobStart) { r.Node = "4" }, fault.Unavailable, "it is down"},
	} {
		req := request()
		tc.set(&req)
		_, err := h.agent().Start(t.Context(), req)
		if fault.KindOf(err) != tc.kind || err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v (kind %d); want kind %d and %q", tc.name, err, fault.KindOf(err), tc.kind, tc.want)
		}
	}
	if f.mu.Lock(); len(f.specs) > 0 {
		t.Errorf("started: %v", f.specs)
	}
	f.mu.Unlock()
	// A node without CRIU takes jobs at their start.
	req := request()
	req.Node = "old"
	id := h.run(req)
	if st, err := h.agent().Show(t.Context(), id); err != nil || st.Node != 5 || st.Epoch != 2 {
		t.Errorf("started on node 5: %+v, %v", st, err)
	}
	if err := h.agent().Kill(t.Context(), id); err != nil {
		t.Error(err)
	}
}

func TestRootsJobsStayHome(t *testing.T) {
	needRoot(t)
	f := newFleet(t)
	h := newHome(t, f)
	h.stop()
	h.conf = func(c *jobs.Config) { c.RootJobs = false }
	h.start()
	req := request()
	req.Node = "2"
	if _, err := h.agent().Start(t.Context(), req); fault.KindOf(err) != fault.Refused || !strings.Contains(err.Error(), "root's jobs stay at home") {
		t.Errorf("start: %v", err)
	}
	id := h.run(request())
	if _, err := h.agent().Move(t.Context(), id, "2"); fault.KindOf(err) != fault.Refused || !strings.Contains(err.Error(), "root's jobs stay at home") {
		t.Errorf("move: %v", err)
	}
	if err := h.agent().Kill(t.Context(), id); err != nil {
		t.Error(err)
	}
}

// A job does not outlive its mosrun, wherever it is and whether or not the
// agent was there to see it; nothing of it is left.
func TestMosrunDies(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	atHome, away, later := h.other(nil, request()), h.other(nil, request()), h.other(nil, request())
	if _, err := h.agent().Move(t.Context(), away.id, "2"); err != nil {
		t.Fatal(err)
	}
	gone := func(o *other) {
		t.Helper()
		until(t, "job "+o.id+" is gone", func() bool {
			_, err := h.agent().Show(t.Context(), o.id)
			return fault.KindOf(err) == fault.NotFound && f.only(o.id) == nil
		})
	}
	atHome.kill()
	away.kill()
	gone(atHome)
	gone(away)
	if f.only(later.id) == nil {
		t.Fatal("another mosrun's job is gone too")
	}
	h.stop()
	later.kill()
	h.start()
	gone(later)
	if left, _ := filepath.Glob(filepath.Join(h.dir, "*", "*.json")); len(left) > 0 {
		t.Errorf("journalled: %v", left)
	}
}

// A job whose end was not taken yet waits for its mosrun, also over a restart.
func TestEndWaitsForMosrun(t *testing.T) {
	f := newFleet(t)
	h := newHome(t, f)
	id := h.run(request())
	f.only(id).set(func(s *standIn) {
		s.out[0] = []byte("last words")
		s.finish(migrate.End{Exit: 5})
	})
	ended := func() bool {
		st, err := h.agent().Show(t.Context(), id)
		return err == nil && st.State == api.JobEnded
	}
	until(t, "it has ended", ended)
	h.stop()
	h.start()
	time.Sleep(50 * time.Millisecond)
	if !ended() {
		t.Error("after a restart the end is forgotten")
	}
	res, stdout, _ := h.attach(id, h.socket).wait()
	if res.Exit != 5 || string(stdout) != "last words" {
		t.Errorf("the job ended as %+v with %q", res, stdout)
	}
}

// Members of the cluster have no business here: they speak to package migrate.
func TestMembersAreRefused(t *testing.T) {
	f := newFleet(t)
	s, err := jobs.New(jobs.Config{Self: 1, Dir: t.TempDir(), Home: emptyHome(t), Capsule: f.capsule, Nodes: members})
	if err != nil {
		t.Fatal(err)
	}
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, api.PathJobs, nil))
	if w.Code != http.StatusForbidden {
		t.Errorf("a caller who is not local gets status %d", w.Code)
	}
}

func emptyHome(t *testing.T) *migrate.Home {
	t.Helper()
	journal, err := migrate.OpenJournal[migrate.Record](t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	h, err := migrate.NewHome(migrate.HomeConfig{Self: 1, Journal: journal})
	if err != nil {
		t.Fatal(err)
	}
	return h
}
