package client_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/agent/jobs/client"
	"mosimg/agent/jobs/client/clienttest"
	"mosimg/agent/jobs/wire"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// token is a fresh one; ours only have to differ.
func token() string {
	const hex = "0123456789abcdef"
	b := make([]byte, 32)
	for i := range b {
		b[i] = hex[rand.IntN(16)]
	}
	return string(b)
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// ran is a session under way and the far ends of its descriptors.
type ran struct {
	*client.Session
	job            string
	stdin          *os.File
	stdout, stderr *os.File
	result         chan client.Result
	notes          chan string
}

// start runs argv as a job with pipes.
func start(t *testing.T, agent *clienttest.Agent, argv ...string) *ran {
	t.Helper()
	a := client.Agent{Socket: agent.Socket}
	id, err := a.Start(t.Context(), api.JobStart{Token: token(), Argv: argv, Env: os.Environ(), Dir: "/"})
	if err != nil {
		t.Fatal(err)
	}
	return attach(t, agent, id)
}

func attach(t *testing.T, agent *clienttest.Agent, id string) *ran {
	t.Helper()
	r := &ran{job: id, result: make(chan client.Result, 1), notes: make(chan string, 16)}
	in, inW := pipe(t)
	outR, out := pipe(t)
	errR, errs := pipe(t)
	r.stdin, r.stdout, r.stderr = inW, outR, errR
	s, err := client.New(client.Config{
		Agent: client.Agent{Socket: agent.Socket}, Job: id,
		Stdin: int(in.Fd()), Stdout: int(out.Fd()), Stderr: int(errs.Fd()),
		Note: func(n string) { r.notes <- n },
	})
	if err != nil {
		t.Fatal(err)
	}
	r.Session = s
	go func() {
		res, err := s.Run(t.Context())
		if err != nil {
			t.Error(err)
		}
		r.result <- res
		in.Close()
		out.Close()
		errs.Close()
	}()
	return r
}

// wait is how the session ended.
func (r *ran) wait(t *testing.T) client.Result {
	t.Helper()
	select {
	case res := <-r.result:
		return res
	case <-time.After(30 * time.Second):
		t.Fatal("the session does not end")
		panic("unreachable")
	}
}

// discard lets a stream flow.
func discard(f *os.File) { go io.Copy(io.Discard, f) }

// Ten megabytes there and back, through connections that break at any byte
// and an agent that goes away and comes back, are the same ten megabytes.
func TestNoByteIsLostOrDoubled(t *testing.T) {
	for seed, tc := range []struct {
		size, cut int // a connection breaks after 1 to cut bytes
		restarts  int
	}{
		{size: 10 << 20},
		{size: 10 << 20, cut: 3_000_000},
		{size: 1 << 20, cut: 150_000},
		{size: 200_000, cut: 90_000}, // a message of 64 KiB seldom gets through
		{size: 10 << 20, cut: 2_000_000, restarts: 5},
	} {
		cuts := rand.New(rand.NewPCG(uint64(seed), 1))
		agent := clienttest.New(t, func(a *clienttest.Agent) {
			if tc.cut > 0 {
				a.Cut = func() int { return 1 + cuts.IntN(tc.cut) }
			}
		})
		pieces := rand.New(rand.NewPCG(uint64(seed), 2))
		data := make([]byte, tc.size)
		rand.NewChaCha8([32]byte{byte(seed)}).Read(data)
		r := start(t, agent, "sh", "-c", "tee /dev/stderr")
		go func() {
			for rest := data; len(rest) > 0; {
				n := min(len(rest), 1+pieces.IntN(300_000))
				r.stdin.Write(rest[:n])
				rest = rest[n:]
			}
			r.stdin.Close()
		}()
		sums := make(chan [32]byte, 2)
		for _, f := range []*os.File{r.stdout, r.stderr} {
			go func() {
				h := sha256.New()
				io.Copy(h, f)
				sums <- [32]byte(h.Sum(nil))
			}()
		}
		for range tc.restarts {
			time.Sleep(50 * time.Millisecond) // faults have no event to wait for
			agent.Down()
			time.Sleep(30 * time.Millisecond)
			agent.Up()
		}
		res := r.wait(t)
		if res.Exit != 0 || res.Signal != 0 || res.Lost != "" || res.Stdout != nil || res.Stderr != nil {
			t.Errorf("seed %d: %+v; want an end with status 0", seed, res)
		}
		want := sha256.Sum256(data)
		for range 2 {
			if got := <-sums; got != want {
				t.Errorf("seed %d: an output is not what was put in", seed)
			}
		}
		// mosrun does not wait until the agent has read it.
		for end := time.Now().Add(10 * time.Second); !agent.Jobs()[0].Done() && time.Now().Before(end); {
			time.Sleep(10 * time.Millisecond)
		}
		if !agent.Jobs()[0].Done() {
			t.Errorf("seed %d: the agent was not told that the end was taken", seed)
		}
		t.Logf("seed %d: attached %d times", seed, agent.Jobs()[0].Attached())
	}
}

// A program whose one stream nobody reads may write to the other: `2>&1 |`
// consumers that read in turn must not hang.
func TestASlowStreamDoesNotHoldUpTheOther(t *testing.T) {
	agent := clienttest.New(t)
	r := start(t, agent, "sh", "-c", "head -c 900000 /dev/zero; echo now >&2; read x; echo $x >&2")
	line := make([]byte, 4)
	r.stderr.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(r.stderr, line); err != nil || string(line) != "now\n" {
		t.Fatalf("stderr beside an unread stdout: %q, %v", line, err)
	}
	if _, err := io.WriteString(r.stdin, "on\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r.stderr, line[:3]); err != nil || string(line[:3]) != "on\n" {
		t.Fatalf("stdin beside an unread stdout: %q, %v", line, err)
	}
	discard(r.stdout)
	discard(r.stderr)
	if res := r.wait(t); res.Exit != 0 {
		t.Errorf("%+v", res)
	}
}

// What is not written out is not acknowledged: a mosrun that is killed has
// taken no more from the job than its user saw.
func TestEndWaitsForTheReader(t *testing.T) {
	agent := clienttest.New(t)
	r := start(t, agent, "sh", "-c", "head -c 300000 /dev/zero; exit 3")
	discard(r.stderr)
	r.stdin.Close()
	select {
	case res := <-r.result:
		t.Fatalf("ended with unread output: %+v", res)
	case <-time.After(300 * time.Millisecond):
	}
	if agent.Jobs()[0].Done() {
		t.Error("the agent may forget a job whose output was not taken")
	}
	agent.Down() // it has said all that we need
	got := make(chan int64, 1)
	go func() {
		n, _ := io.Copy(io.Discard, r.stdout)
		got <- n
	}()
	res := r.wait(t)
	if n := <-got; n != 300000 || res.Exit != 3 {
		t.Errorf("%d bytes and %+v; want 300000 and status 3", n, res)
	}
}

// The reader of a pipe goes away: the job must learn it as it would have without us.
func TestBrokenPipe(t *testing.T) {
	for name, argv := range map[string][]string{
		"SIGPIPE": {"yes"},
		// Programs that ignore the signal (Python's, Go's) see an error.
		"EPIPE": {"sh", "-c", "trap '' PIPE; while echo y; do :; done 2>/dev/null; exit 7"},
	} {
		agent := clienttest.New(t)
		r := start(t, agent, argv...)
		discard(r.stderr)
		if _, err := io.ReadFull(r.stdout, make([]byte, 2)); err != nil {
			t.Fatal(err)
		}
		agent.Down() // and whoever attaches next hears of it too
		r.stdout.Close()
		agent.Up()
		res := r.wait(t)
		if !errors.Is(res.Stdout, syscall.EPIPE) || res.Stderr != nil {
			t.Errorf("%s: stdout %v, stderr %v; want EPIPE of stdout", name, res.Stdout, res.Stderr)
		}
		if name == "SIGPIPE" && res.Signal != int(syscall.SIGPIPE) || name == "EPIPE" && res.Exit != 7 {
			t.Errorf("%s: %+v", name, res)
		}
	}
}

func TestFullDisk(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip(err)
	}
	defer full.Close()
	agent := clienttest.New(t)
	a := client.Agent{Socket: agent.Socket}
	id, err := a.Start(t.Context(), api.JobStart{Token: token(), Argv: []string{"echo", "x"}, Env: os.Environ(), Dir: "/"})
	if err != nil {
		t.Fatal(err)
	}
	s, err := client.New(client.Config{Agent: a, Job: id, Stdin: -1, Stdout: int(full.Fd()), Stderr: 2})
	if err != nil {
		t.Fatal(err)
	}
	res, err := s.Run(t.Context())
	if err != nil || !errors.Is(res.Stdout, syscall.ENOSPC) || res.Exit != 0 {
		t.Errorf("%+v, %v; want ENOSPC of stdout", res, err)
	}
}

// Signals reach the program once, also those given while the agent is away.
func TestSignals(t *testing.T) {
	agent := clienttest.New(t)
	r := start(t, agent, "sh", "-c", "trap 'echo usr1' USR1; echo ready; while :; do sleep 0.02; done")
	discard(r.stderr)
	expect := func(want string) {
		t.Helper()
		r.stdout.SetReadDeadline(time.Now().Add(10 * time.Second))
		buf := make([]byte, len(want))
		if _, err := io.ReadFull(r.stdout, buf); err != nil || string(buf) != want {
			t.Fatalf("the job says %q, %v; want %q", buf, err, want)
		}
	}
	expect("ready\n")
	r.Signal(int(syscall.SIGUSR1), false)
	expect("usr1\n")
	agent.Down()
	r.Signal(int(syscall.SIGUSR1), false)
	r.Signal(int(syscall.SIGUSR1), false) // pending already
	agent.Up()
	expect("usr1\n")
	r.Signal(int(syscall.SIGTERM), true)
	if res := r.wait(t); res.Signal != int(syscall.SIGTERM) {
		t.Errorf("%+v; want an end by SIGTERM", res)
	}
	got := agent.Jobs()[0].Signals()
	want := []wire.Signal{{Number: 10}, {Number: 10}, {Number: 15, Group: true}}
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] || got[2] != want[2] {
		t.Errorf("signals %v; want %v", got, want)
	}
}

func TestStopAndCont(t *testing.T) {
	agent := clienttest.New(t)
	r := start(t, agent, "sleep", "100")
	discard(r.stdout)
	discard(r.stderr)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := r.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	r.Cont()
	// Without an agent a stop is not confirmed, and taken back by a cont.
	agent.Down()
	select {
	case <-r.notes: // a stop before that may have been sent, and would be sent again
	case <-time.After(20 * time.Second):
		t.Fatal("no word about an agent that is away")
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := r.Stop(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Stop without an agent: %v; want the deadline", err)
	}
	r.Cont()
	agent.Up()
	r.Signal(int(syscall.SIGKILL), true)
	if res := r.wait(t); res.Signal != int(syscall.SIGKILL) {
		t.Errorf("%+v; want an end by SIGKILL", res)
	}
	if stops, conts := agent.Jobs()[0].Stops(); stops != 1 || conts < 1 {
		t.Errorf("%d stops and %d conts; want one stop", stops, conts)
	}
}

// An agent that is back without the job ends the wait; one that is away does not, but
// the user is told.
func TestLost(t *testing.T) {
	agent := clienttest.New(t)
	r := start(t, agent, "sleep", "100")
	discard(r.stdout)
	discard(r.stderr)
	agent.Down()
	select {
	case n := <-r.notes:
		if n != "the agent does not answer; the job goes on, waiting" {
			t.Errorf("note %q", n)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("no word about an agent that is away")
	}
	agent.Forget()
	agent.Up()
	if res := r.wait(t); !strings.Contains(res.Lost, "no job") {
		t.Errorf("%+v; want a job that is lost because the agent does not know it", res)
	}
	if len(r.notes) != 0 {
		t.Errorf("a second note: %q", <-r.notes)
	}
}

// An answer that is lost must not start the program twice.
func TestStartIsAskedAgain(t *testing.T) {
	agent := clienttest.New(t, func(a *clienttest.Agent) { a.LoseAnswers = 3 })
	r := start(t, agent, "true")
	discard(r.stdout)
	discard(r.stderr)
	r.wait(t)
	if n := len(agent.Jobs()); n != 1 {
		t.Errorf("%d jobs were started; want 1", n)
	}
}

func TestStartRefused(t *testing.T) {
	agent := clienttest.New(t)
	a := client.Agent{Socket: agent.Socket}
	_, err := a.Start(t.Context(), api.JobStart{Token: token(), Argv: []string{"/no/such"}, Dir: "/"})
	if fault.KindOf(err) != fault.NotFound {
		t.Errorf("an unknown program: %v; want kind NotFound", err)
	}
	agent.Down()
	begin := time.Now()
	_, err = a.Start(t.Context(), api.JobStart{Token: token(), Argv: []string{"true"}, Dir: "/"})
	if fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), "not running") || time.Since(begin) > 5*time.Second {
		t.Errorf("no agent: %v after %v; want Unavailable at once", err, time.Since(begin))
	}
	for _, id := range []string{"", "..", "a/b", "7 8", "7-1?x"} {
		if _, err := a.Show(t.Context(), id); fault.KindOf(err) != fault.NotFound {
			t.Errorf("Show(%q): %v; want kind NotFound", id, err)
		}
	}
}

// A stdin that is more than a window and is never read does not fill memory,
// and its writer waits.
func TestStdinIsReadAsFarAsTheWindow(t *testing.T) {
	agent := clienttest.New(t)
	r := start(t, agent, "sleep", "100")
	discard(r.stdout)
	discard(r.stderr)
	r.stdin.SetWriteDeadline(time.Now().Add(time.Second))
	n, _ := r.stdin.Write(bytes.Repeat([]byte("x"), 4<<20))
	// The window, and the pipes before and behind it.
	if most := wire.StdinWindow + 2*64<<10; n < wire.StdinWindow || n > most {
		t.Errorf("%d bytes were taken; want %d to %d", n, wire.StdinWindow, most)
	}
	r.Signal(9, true)
	r.wait(t)
}
