package jobs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/agent/capsule/control"
	"mosimg/agent/jobs/wire"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

func TestResolve(t *testing.T) {
	nodes := []api.Member{
		{Node: 1, Name: "head", Liveness: api.Alive},
		{Node: 2, Name: "two", Liveness: api.Suspect, Since: time.Date(2026, 1, 1, 12, 30, 0, 0, time.UTC)},
		{Node: 3, Name: "4", Liveness: api.Left},
		{Node: 7, Name: "seven", Liveness: api.Alive, Migration: true},
	}
	for _, tc := range []struct {
		name string
		node api.NodeID // 0: not found
		use  string     // why no job can be moved there
	}{
		{"home", 1, "CRIU does not work there"},
		{"1", 1, "CRIU does not work there"},
		{"two", 2, "node 2 (two): it does not answer since 12:30:00"},
		{"3", 3, "it has left the cluster"},
		{"7", 7, ""},
		{"007", 7, ""},
		{"seven", 7, ""},
		{"4", 0, ""}, // a number is a number
		{"", 0, ""},
		{"Home", 0, ""},
		{"99999999999999999999", 0, ""},
	} {
		m, err := resolve(nodes, 1, tc.name)
		if m.Node != tc.node || (err == nil) != (tc.node != 0) || err != nil && fault.KindOf(err) != fault.NotFound {
			t.Errorf("resolve(%q) = node %d, %v; want node %d", tc.name, m.Node, err, tc.node)
		}
		if err != nil {
			continue
		}
		err = takesMoves(m)
		if (err == nil) != (tc.use == "") || err != nil && !strings.Contains(err.Error(), tc.use) {
			t.Errorf("takesMoves(%q) = %v; want %q", tc.name, err, tc.use)
		}
	}
	// A job can come home to a machine that is not a member now.
	if m, err := resolve(nil, 1, "home"); err != nil || m.Node != 1 || takesMoves(m) != nil {
		t.Errorf("home without a cluster: %+v, %v", m, err)
	}
}

func TestSilence(t *testing.T) {
	const patience = migrate.DefaultLease + lostMargin
	for d, want := range map[time.Duration]silence{
		0: silenceNone, noteAfter - 1: silenceNone, noteAfter: silenceNote,
		// A guest lives for its lease, and the job is not lost before that is over for certain.
		migrate.DefaultLease: silenceNote, patience - 1: silenceNote, patience: silenceLost,
	} {
		if got := silenceAfter(d, patience); got != want {
			t.Errorf("after %v: %s; want %s", d, got, want)
		}
	}
}

func TestState(t *testing.T) {
	at := migrate.NewRecord("j", 1, 1).Confirm()
	moving, err := at.Reserve(2)
	if err != nil {
		t.Fatal(err)
	}
	committed, err := moving.Commit()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		rec             migrate.Record
		silent, stopped bool
		want            api.JobState
	}{
		{at, false, false, api.JobRuns},
		{at, false, true, api.JobStopped},
		{at, true, true, api.JobWaits},
		{moving, false, false, api.JobMoves},
		{committed, false, true, api.JobMoves},
		{committed, true, false, api.JobWaits},
		{at.Finish(migrate.End{}), true, true, api.JobEnded},
	} {
		if got := stateOf(tc.rec, tc.silent, tc.stopped); got != tc.want {
			t.Errorf("stateOf(%+v, %t, %t) = %s; want %s", tc.rec, tc.silent, tc.stopped, got, tc.want)
		}
	}
}

// What the kernel says of a process is what prlimit and ps say.
func TestFacts(t *testing.T) {
	cmd := exec.Command("sh", "-c", "exec -a ') 1 2 (' sleep 100", "sh")
	if _, err := exec.LookPath("bash"); err == nil {
		cmd = exec.Command("bash", "-c", "ulimit -S -n 77; ulimit -c 3; exec -a ') 1 2 (' nice -n 4 sleep 100")
	}
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	p, err := openProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	var f facts
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if f, err = p.facts(); err != nil || f.nice == 4 {
			break
		}
	}
	if err != nil || f.euid != os.Geteuid() || f.nice != 4 || f.began == 0 || len(f.limits) != 16 {
		t.Fatalf("facts: %+v, %v", f, err)
	}
	if l := f.limits[7]; l.Cur != 77 || l.Resource != 7 || f.limits[4].Max != 3*512 && f.limits[4].Max != 3*1024 {
		t.Errorf("limits of files and core: %+v, %+v", l, f.limits[4])
	}
	// Its end is noticed, and what is left in /proc is nobody's.
	ended := make(chan error)
	go func() { ended <- p.awaitEnd(t.Context()) }()
	select {
	case err := <-ended:
		t.Fatalf("it has not ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	cmd.Process.Kill()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("its end is not noticed")
	}
	cmd.Wait()
	if _, err := openProcess(cmd.Process.Pid); err == nil {
		t.Error("a process that is gone was found")
	}
	// Nor is waiting for another one for ever.
	if p, err = openProcess(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := p.awaitEnd(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("awaitEnd of this process: %v", err)
	}
}

func TestParseLimits(t *testing.T) {
	const head = "Limit                     Soft Limit           Hard Limit           Units     \n"
	got, err := parseLimits(head +
		"Max cpu time              unlimited            18446744073709551615 seconds   \n" +
		"Max nice priority         0                    5                    \n")
	want := []control.Limit{{Resource: 0, Cur: math.MaxUint64, Max: math.MaxUint64}, {Resource: 1, Cur: 0, Max: 5}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	for _, bad := range []string{"", head, head + "Max cpu time\n", head + "Max cpu time              x                    1                    seconds\n"} {
		if got, err := parseLimits(bad); err == nil {
			t.Errorf("parseLimits(%q) = %v; want an error", bad, got)
		}
	}
}

// The job gets each byte of stdin once, however pieces come again.
func TestInput(t *testing.T) {
	in := newInput(100, false)
	get := func(at uint64) string {
		data, _, _, err := in.next(at)
		if err != nil {
			return err.Error()
		}
		return string(data)
	}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ok(in.receive(100, []byte("abcdef")))
	ok(in.receive(102, []byte("cdefgh"))) // comes again, and goes on
	ok(in.receive(90, []byte("xx")))      // long taken
	if got := get(100); got != "abcdefgh" {
		t.Errorf("kept %q", got)
	}
	if _, err := in.take(103); err != nil || get(103) != "defgh" || get(107) != "h" {
		t.Errorf("after 103: %q, %v", get(103), err)
	}
	// The job had more than this mosrun's connection gave us.
	if _, err := in.take(200); err != nil || get(200) != "" {
		t.Errorf("after 200: %q, %v", get(200), err)
	}
	ok(in.receive(108, bytes.Repeat([]byte("y"), 92)))
	ok(in.receive(199, []byte("yz")))
	if get(200) != "z" {
		t.Errorf("after 200: %q", get(200))
	}
	for name, err := range map[string]error{
		"a gap":               in.receive(202, []byte("x")),
		"an end too early":    in.receive(200, nil),
		"an end too late":     in.receive(202, nil),
		"more than is wanted": in.receive(201, make([]byte, wire.StdinWindow)),
	} {
		if err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if _, err := in.take(150); err == nil {
		t.Error("a job that has forgotten what it had is believed")
	}
	if _, _, _, err := in.next(150); err == nil {
		t.Error("a node that has more than it was sent is believed")
	}
	ok(in.receive(201, nil))
	ok(in.receive(201, nil))
	if err := in.receive(201, []byte("x")); err == nil {
		t.Error("stdin goes on after its end")
	}
	if _, end, _, _ := in.next(201); !end {
		t.Error("the end is not known")
	}
}

// FuzzAttach: nothing that a user's program says can harm the agent.
func FuzzAttach(f *testing.F) {
	message := func(ms ...func(io.Writer) error) []byte {
		var b bytes.Buffer
		for _, m := range append([]func(io.Writer) error{func(w io.Writer) error { return wire.WriteJSON(w, wire.KindHello, wire.Hello{Stdin: 5}) }}, ms...) {
			if err := m(&b); err != nil {
				f.Fatal(err)
			}
		}
		return b.Bytes()
	}
	f.Add(message(func(w io.Writer) error { return wire.WriteData(w, wire.KindStdin, 5, []byte("abc")) }))
	f.Add(message(func(w io.Writer) error { return wire.WriteAck(w, wire.KindStdout, wire.Closed) }))
	f.Add(message(func(w io.Writer) error { return wire.WriteJSON(w, wire.KindSignal, wire.Signal{Number: -1}) }))
	f.Add(message(func(w io.Writer) error { return wire.Write(w, wire.KindStop, nil) }, func(w io.Writer) error { return wire.Write(w, wire.KindDone, nil) }))
	journal, err := migrate.OpenJournal[migrate.Record](f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	home, err := migrate.NewHome(migrate.HomeConfig{Self: 1, Journal: journal})
	if err != nil {
		f.Fatal(err)
	}
	s := &Service{conf: Config{Home: home}, log: slog.New(slog.DiscardHandler), jobs: map[migrate.JobID]*job{}}
	f.Fuzz(func(t *testing.T, in []byte) {
		j := s.newJob(Info{Job: "1-2-abc"})
		ours, theirs := net.Pipe()
		go io.Copy(io.Discard, theirs)
		go func() {
			theirs.Write(in)
			theirs.Close()
		}()
		if err := j.attach(t.Context(), ours); err == nil {
			t.Errorf("%q ends a job that has not ended", in)
		}
		if j.session != nil || j.taken || len(j.orders) > 2*lastSignal+1 {
			t.Errorf("left behind: session %t, taken %t, %d orders", j.session != nil, j.taken, len(j.orders))
		}
	})
}

func FuzzProcess(f *testing.F) {
	for _, name := range []string{"stat", "status", "limits"} {
		data, err := os.ReadFile("/proc/self/" + name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(data))
	}
	f.Fuzz(func(t *testing.T, s string) {
		_, _, _ = parseStat(s)
		_, _ = parseEUID(s)
		limits, err := parseLimits(s)
		for i, l := range limits {
			if err == nil && l.Resource != i {
				t.Error(fmt.Sprint(limits))
			}
		}
	})
}
