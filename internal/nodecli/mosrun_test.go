package nodecli

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"mosimg/agent/jobs/client/clienttest"
	"mosimg/agent/jobs/wire"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// The test's own binary is mosrun when it is called so.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "mosrun", "mosmon":
		os.Exit(Main(context.Background(), OS()))
	}
	os.Exit(m.Run())
}

// mosrunCmd is mosrun as a process of its own.
func mosrunCmd(t *testing.T, agent *clienttest.Agent, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, self)
	cmd.Args = append([]string{"mosrun", "--socket", agent.Socket}, args...)
	return cmd
}

// script runs a shell script in which $MOSRUN is mosrun.
func script(t *testing.T, agent *clienttest.Agent, text string) (stdout, stderr string, state *os.ProcessState) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "mosrun")
	if err := os.Symlink(self, link); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", text)
	cmd.Env = append(os.Environ(), "MOSRUN="+link+" --socket "+agent.Socket)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	_ = cmd.Run() // the state says it
	if cmd.ProcessState == nil {
		t.Fatal("bash was not run")
	}
	return out.String(), errs.String(), cmd.ProcessState
}

// A shell must not see whether a program runs by itself or as a job.
func TestMosrunIsAsTheProgramItself(t *testing.T) {
	agent := clienttest.New(t)
	for _, text := range []string{
		`$MOSRUN echo a b "" c`,
		`$MOSRUN sh -c 'echo out; echo err >&2; exit 3'; echo $?`,
		`echo in | $MOSRUN cat`,
		`$MOSRUN cat < /dev/null`,
		`$MOSRUN cat <&-; :`,
		`$MOSRUN sh -c 'exit 9' >&-; echo $?`,
		`$MOSRUN sh -c 'exit 9' >&- 2>&- <&-; echo $?`,
		`$MOSRUN sh -c 'kill -TERM $$'; echo $?`,
		`$MOSRUN sh -c 'kill -KILL $$'; echo $?`,
		`$MOSRUN sh -c 'kill -SEGV $$'; echo $?`,
		`$MOSRUN sh -c 'kill -QUIT $$'; echo $?`,
		`$MOSRUN yes | head -1; echo ${PIPESTATUS[*]}`,
		`$MOSRUN sh -c 'trap "" PIPE; while echo y; do :; done 2>/dev/null; exit 7' | head -1; echo ${PIPESTATUS[*]}`,
		`$MOSRUN sh -c 'yes | head -1; echo still >&2' | true; :`,
		`seq 100000 | $MOSRUN tac | md5sum`,
		`$MOSRUN no-such-program; echo $?`,
		`$MOSRUN /no/such/program; echo $?`,
		`$MOSRUN /etc/passwd; echo $?`,
		`$MOSRUN /; echo $?`,
		`A=$(printf 'x\377y') $MOSRUN sh -c 'printf %s "$A" | od -c'`,
		`$MOSRUN printf %s "$(printf 'caf\351')" | od -c`,
		`export BIG=$(head -c 100000 /dev/zero | tr '\0' x); for i in $(seq 15); do export BIG$i=$BIG; done; $MOSRUN env | wc -c | sed 's/.*/big/'`,
		`cd /usr/lib && $MOSRUN pwd`,
		`$MOSRUN -- echo -n x`,
		`$MOSRUN -h -L echo --help -3`,
		`$MOSRUN head -c 1000000 /dev/zero > >(sleep 0.3; wc -c); wait $!`,
	} {
		native := strings.ReplaceAll(strings.ReplaceAll(strings.ReplaceAll(text, "$MOSRUN -- ", ""), "$MOSRUN -h -L ", ""), "$MOSRUN ", "")
		out, err := exec.Command("bash", "-c", native).Output()
		if ee := (*exec.ExitError)(nil); err != nil && !errors.As(err, &ee) {
			t.Fatal(err)
		}
		stdout, stderr, state := script(t, agent, text)
		if stdout != string(out) {
			t.Errorf("%s: stdout %q, stderr %q; natively %q", text, stdout, stderr, out)
		}
		if !state.Success() {
			t.Errorf("%s: %s", text, state)
		}
	}
}

func TestMosrunStatuses(t *testing.T) {
	refuse := func(s api.JobStart) error {
		switch s.Node {
		case "7":
			return fault.New(fault.Unavailable, "place", "node 7", "it does not answer", "")
		case "8":
			return fault.New(fault.NotFound, "place", "node 8", "no node has this number", "")
		}
		if s.Dir == "/usr/lib" {
			return fault.New(fault.Refused, "change to", s.Dir, syscall.ENOENT, "")
		}
		return nil
	}
	agent := clienttest.New(t, func(a *clienttest.Agent) { a.Refuse = refuse })
	for _, tc := range []struct {
		text, want, stderr string
	}{
		{`$MOSRUN -7 true; echo $?`, "125\n", "does not answer"},
		{`$MOSRUN -F -7 echo ok`, "ok\n", "runs at home"},
		{`$MOSRUN -8 true; echo $?`, "125\n", "no node has this number"},
		{`$MOSRUN; echo $?`, "125\n", "no program"},
		{`$MOSRUN -t true; echo $?`, "125\n", "a terminal for the job comes later"},
		{`$MOSRUN -c true; echo $?`, "125\n", "the balancer has no use for it"},
		{`$MOSRUN --nonsense true; echo $?`, "125\n", "--help"},
		{`$MOSRUN --socket=/nowhere true; echo $?`, "125\n", "not running"},
		{`mkdir /tmp/$$ && cd /tmp/$$ && rmdir /tmp/$$ && $MOSRUN true; echo $?`, "126\n", "working directory"},
		{`cd /usr/lib && $MOSRUN true; echo $?`, "126\n", "/usr/lib"},
		{`$MOSRUN echo x > /dev/full; echo $?`, "125\n", "write standard output: no space left on device"},
		{`$MOSRUN echo x < / ; echo $?`, "x\n0\n", ""},
		{`ulimit -f 1; $MOSRUN sh -c 'ulimit -f unlimited; head -c 100000 /dev/zero' > /tmp/$$; echo $?; rm /tmp/$$`, "125\n", "file too large"},
		{`ulimit -v 2000000; $MOSRUN echo little`, "little\n", ""},
	} {
		stdout, stderr, _ := script(t, agent, tc.text)
		if stdout != tc.want || !strings.Contains(stderr, tc.stderr) || tc.stderr == "" && stderr != "" {
			t.Errorf("%s: %q, stderr %q; want %q and %q", tc.text, stdout, stderr, tc.want, tc.stderr)
		}
		if lines := strings.Count(stderr, "\n"); lines > 1 {
			t.Errorf("%s: %d lines on stderr:\n%s", tc.text, lines, stderr)
		}
	}
}

// What the shell has set up is what the agent is told.
func TestMosrunTellsWhatItInherits(t *testing.T) {
	agent := clienttest.New(t)
	_, stderr, _ := script(t, agent, `cd /usr; umask 027; ulimit -Sn 77; ulimit -c 0; trap '' HUP INT; exec nice -n 5 env -i A=b PATH=$PATH $MOSRUN true x </dev/null`)
	if len(agent.Jobs()) != 1 {
		t.Fatalf("no job: %s", stderr)
	}
	s := agent.Jobs()[0].Start
	nice, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		t.Fatal(err)
	}
	s.Token = ""
	limits := map[int]api.JobLimit{}
	for _, l := range s.Limits {
		limits[l.Resource] = l
	}
	s.Limits = nil
	s.Groups = nil // this test's own
	want := api.JobStart{Argv: []string{"true", "x"}, Env: []string{"A=b", "PATH=" + os.Getenv("PATH")}, Dir: "/usr", Umask: 0o27, Nice: min(19, 20-nice+5), Ignored: []int{1, 2}, NoStdin: true, Best: true}
	if d := cmp.Diff(want, s); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	if got := limits[unix.RLIMIT_NOFILE].Cur; got != 77 {
		t.Errorf("soft limit of open files %d; want 77", got)
	}
	if got := limits[unix.RLIMIT_CORE]; got.Cur != 0 || got.Max != 0 {
		t.Errorf("limit of cores %+v; want 0", got)
	}
	var as unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_AS, nil, &as); err == nil && as.Cur == math.MaxUint64 && limits[unix.RLIMIT_AS].Cur != math.MaxUint64 {
		t.Errorf("an unlimited address space becomes %+v", limits[unix.RLIMIT_AS])
	}
	if len(limits) != rlimits {
		t.Errorf("%d limits; want %d", len(limits), rlimits)
	}
}

// Bytes through a mosrun process whose agent fails are all there, once.
func TestMosrunSurvivesItsAgent(t *testing.T) {
	cut := 0
	agent := clienttest.New(t, func(a *clienttest.Agent) {
		a.Cut = func() int { cut += 300_001; return cut }
		a.LoseAnswers = 1
	})
	data := bytes.Repeat([]byte("0123456789abcdef\n"), 10<<20/17)
	cmd := mosrunCmd(t, agent, "cat")
	cmd.Stdin = bytes.NewReader(data)
	h := sha256.New()
	cmd.Stdout = h
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for len(agent.Jobs()) == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	for range 3 {
		time.Sleep(100 * time.Millisecond)
		agent.Down()
		time.Sleep(50 * time.Millisecond)
		agent.Up()
	}
	if err := cmd.Wait(); err != nil || errs.Len() > 0 {
		t.Errorf("mosrun: %v, %q", err, errs.String())
	}
	if want := sha256.Sum256(data); [32]byte(h.Sum(nil)) != want {
		t.Error("the output is not the input")
	}
	if n := len(agent.Jobs()); n != 1 {
		t.Errorf("%d jobs; want 1", n)
	}
	t.Logf("attached %d times", agent.Jobs()[0].Attached())
}

// A signal to mosrun is one to the job, and its death is the job's.
func TestMosrunSignals(t *testing.T) {
	agent := clienttest.New(t)
	heard := make(chan os.Signal, 1)
	signal.Notify(heard, syscall.SIGHUP, syscall.SIGQUIT) // what nohup or a shell made us ignore, mosrun would ignore as well
	defer signal.Stop(heard)
	for _, tc := range []struct {
		sig   syscall.Signal
		group bool
	}{{syscall.SIGTERM, false}, {syscall.SIGINT, true}, {syscall.SIGHUP, true}, {syscall.SIGQUIT, true}, {syscall.SIGUSR1, false}, {syscall.SIGABRT, false}} {
		cmd := mosrunCmd(t, agent, "sh", "-c", "echo up; exec sleep 100")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var errs bytes.Buffer
		cmd.Stderr = &errs
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
			t.Fatal(err)
		}
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid)); err != nil || string(comm) != "sh\n" {
			t.Errorf("its name in ps is %q, %v; want the program's", comm, err)
		}
		if err := cmd.Process.Signal(tc.sig); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // the state says it
		ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
		if !ws.Signaled() || ws.Signal() != tc.sig || ws.CoreDump() || errs.Len() > 0 {
			t.Errorf("%v: mosrun ended with %v, %q; want death by it, without a core or a word", tc.sig, cmd.ProcessState, errs.String())
		}
		jobs := agent.Jobs()
		got := jobs[len(jobs)-1].Signals()
		if d := cmp.Diff([]wire.Signal{{Number: int(tc.sig), Group: tc.group}}, got); d != "" {
			t.Errorf("%v (-want +got):\n%s", tc.sig, d)
		}
	}
}

// nohup's HUP, and the INT of a shell's background job, are not for the job.
func TestMosrunKeepsIgnoredSignals(t *testing.T) {
	agent := clienttest.New(t)
	_, stderr, state := script(t, agent, `trap '' HUP INT; $MOSRUN sh -c 'echo up; sleep 0.5; exit 4' & read -t 0.2; kill -HUP $!; kill -INT $!; wait $!`)
	if state.ExitCode() != 4 {
		t.Errorf("%s, %q; want status 4", state, stderr)
	}
	if got := agent.Jobs()[0].Signals(); len(got) != 0 {
		t.Errorf("signals %v reached the job; want none", got)
	}
}

// A lost job has a status and words of its own.
func TestMosrunLost(t *testing.T) {
	agent := clienttest.New(t)
	cmd := mosrunCmd(t, agent, "sh", "-c", "echo up; exec sleep 100")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	cmd.Stderr = &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	agent.Down()
	agent.Forget()
	agent.Up()
	_ = cmd.Wait() // the state says it
	if cmd.ProcessState.ExitCode() != exitMosrun || !strings.HasPrefix(errs.String(), "mosrun: job 1-1 was lost: ") {
		t.Errorf("%v, %q", cmd.ProcessState, errs.String())
	}
}

func TestParseRun(t *testing.T) {
	for _, tc := range []struct {
		args    string
		want    runFlags
		program string
	}{
		{"prog -h -3", runFlags{}, "prog -h -3"},
		{"-h prog", runFlags{home: true}, "prog"},
		{"-b -- -prog", runFlags{}, "-prog"},
		{"-r host prog a", runFlags{node: "host"}, "prog a"},
		{"-rhost prog", runFlags{node: "host"}, "prog"},
		{"-12 prog", runFlags{node: "12"}, "prog"},
		{"-10.0.0.7 prog", runFlags{node: "10.0.0.7"}, "prog"},
		{"-FL -j1-4,7 -m512 prog", runFlags{force: true, locked: true, memMiB: 512, list: []nodeRange{{1, 4}, {7, 7}}}, "prog"},
		{"-LFj 2 prog", runFlags{force: true, locked: true, list: []nodeRange{{2, 2}}}, "prog"},
		{"-L -l prog", runFlags{}, "prog"},
		{"- x", runFlags{}, "- x"},
		{"--help", runFlags{help: true}, ""},
	} {
		got, program, err := parseRun(strings.Fields(tc.args))
		tc.want.socket = api.AgentSocket
		if err != nil || strings.Join(program, " ") != tc.program {
			t.Errorf("%s: program %q, %v; want %q", tc.args, program, err, tc.program)
		}
		if d := cmp.Diff(tc.want, got, cmp.AllowUnexported(runFlags{}, nodeRange{})); d != "" {
			t.Errorf("%s (-want +got):\n%s", tc.args, d)
		}
	}
	for _, args := range []string{"", "-h", "-r", "-0 p", "-3x p", "-j p", "-j 0 p", "-j 4-2 p", "-j 1,,2 p", "-m 0 -j1 p", "-m x -j1 p", "-m 5 -h p", "-m 5 -3 p", "-h -3 p", "-b -j1 p", "-q p", "-x p", "--socket", "-99999999999 p"} {
		if f, program, err := parseRun(strings.Fields(args)); fault.KindOf(err) != fault.Usage {
			t.Errorf("%q: %+v, %q, %v; want an error of kind Usage", args, f, program, err)
		}
	}
}

func FuzzParseRun(f *testing.F) {
	f.Add("-LFj 1-4,7 -m 5 prog -x")
	f.Add("--socket=/x -10.0.0.7 -- p")
	f.Fuzz(func(t *testing.T, line string) {
		args := strings.Split(line, " ")
		flags, program, err := parseRun(args)
		if err == nil && !flags.help && len(program) == 0 {
			t.Errorf("%q: no program and no error", line)
		}
		if len(program) > 0 && strings.Join(args[len(args)-len(program):], " ") != strings.Join(program, " ") {
			t.Errorf("%q: the program's words became %q", line, program)
		}
	})
}

func TestCandidates(t *testing.T) {
	members := []api.Member{
		{Node: 1, Self: true, Liveness: api.Alive, Load: &api.LoadVector{MemFree: 1 << 30}},
		{Node: 2, Liveness: api.Alive, Load: &api.LoadVector{MemFree: 4 << 30}},
		{Node: 3, Liveness: api.Dead, Load: &api.LoadVector{MemFree: 4 << 30}},
		{Node: 4, Liveness: api.Alive},
		{Node: 9, Liveness: api.Alive, Load: &api.LoadVector{MemFree: 4 << 30}},
	}
	for _, tc := range []struct {
		list   []nodeRange
		memMiB int64
		want   string
	}{
		{[]nodeRange{{1, 4}}, 0, "[1 2 4]"},
		{[]nodeRange{{1, 4}}, 2048, "[2]"},
		{[]nodeRange{{3, 3}, {9, 9}, {8, 10}}, 0, "[9]"},
		{[]nodeRange{{3, 3}}, 0, "[]"},
	} {
		got := []api.NodeID{}
		for _, m := range candidates(members, tc.list, tc.memMiB) {
			got = append(got, m.Node)
		}
		if fmt.Sprint(got) != tc.want {
			t.Errorf("candidates(%v, %d MiB) = %v; want %s", tc.list, tc.memMiB, got, tc.want)
		}
	}
}

func TestParseStatus(t *testing.T) {
	umask, ignored, err := parseStatus(strings.NewReader("Name:\tx\nUmask:\t0027\nSigIgn:\t8000000000001003\n"))
	if err != nil || umask != 0o27 || fmt.Sprint(ignored) != "[1 2 13 64]" {
		t.Errorf("parseStatus = %o, %v, %v", umask, ignored, err)
	}
	for _, text := range []string{"", "Umask: 0022\n", "SigIgn: 0\n", "Umask: x\nSigIgn: 0\n", "Umask: 1\nSigIgn: -\n"} {
		if _, _, err := parseStatus(strings.NewReader(text)); err == nil {
			t.Errorf("parseStatus(%q) is no error", text)
		}
	}
}
