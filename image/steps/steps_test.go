package steps

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"mosimg/image/cache"
	"mosimg/internal/fault"
)

// bench is a cache, and steps that count how often they run.
type bench struct {
	t     *testing.T
	cache *cache.Cache
	mu    sync.Mutex
	runs  map[string]int // guarded by mu
	why   map[string][]string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	c, err := cache.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return &bench{t: t, cache: c, runs: map[string]int{}, why: map[string][]string{}}
}

// step writes content, and what its needs wrote, into a file.
func (b *bench) step(name, input, content string, needs ...*Step) *Step {
	return &Step{
		Name: name, Inputs: map[string]string{"in": input}, Needs: needs,
		Run: func(_ context.Context, job *Job) error {
			b.mu.Lock()
			b.runs[name]++
			b.mu.Unlock()
			for _, n := range needs {
				data, err := os.ReadFile(job.Need(n).Path("out"))
				if err != nil {
					return err
				}
				content += "+" + string(data)
			}
			return os.WriteFile(job.Path("out"), []byte(content), 0o644)
		},
	}
}

func (b *bench) run(goals ...*Step) (map[string]*Result, error) {
	b.mu.Lock()
	b.runs, b.why = map[string]int{}, map[string][]string{}
	b.mu.Unlock()
	return New(b.cache, "test", func(e Event) {
		if e.Kind == Started {
			b.why[e.Step] = e.Why
		}
	}).Run(b.t.Context(), goals...)
}

func (b *bench) mustRun(goals ...*Step) map[string]*Result {
	b.t.Helper()
	r, err := b.run(goals...)
	if err != nil {
		b.t.Fatal(err)
	}
	return r
}

func (b *bench) wantRuns(what string, want map[string]int) {
	b.t.Helper()
	if diff := cmp.Diff(want, b.runs); diff != "" {
		b.t.Errorf("%s: steps that ran (-want +got):\n%s", what, diff)
	}
}

// chain is a -> b -> c, with what a reads and writes.
func (b *bench) chain(input, content string) *Step {
	a := b.step("a", input, content)
	return b.step("c", "1", "c", b.step("b", "1", "b", a), a)
}

func TestStepsRunOnceAndAreReused(t *testing.T) {
	b := newBench(t)
	r := b.mustRun(b.chain("1", "x"))
	b.wantRuns("cold", map[string]int{"a": 1, "b": 1, "c": 1})
	data, err := os.ReadFile(r["c"].Path("out"))
	if err != nil || string(data) != "c+b+x+x" {
		t.Errorf("result = %q, %v; want c+b+x+x", data, err)
	}
	b.mustRun(b.chain("1", "x"))
	b.wantRuns("nothing changed", map[string]int{})
	b.mustRun(b.chain("2", "y"))
	b.wantRuns("input and output changed", map[string]int{"a": 1, "b": 1, "c": 1})
	b.mustRun(b.chain("1", "x"))
	b.wantRuns("back to a known input", map[string]int{})
	b.mustRun(b.chain("3", "x"))
	b.wantRuns("input changed, output did not", map[string]int{"a": 1})
}

// A user who wonders why something is built again gets the reason by name.
func TestExplanations(t *testing.T) {
	b := newBench(t)
	s := func(in map[string]string) *Step {
		s := b.step("a", "", "x")
		s.Inputs = in
		return s
	}
	b.mustRun(s(map[string]string{"package criu": "4.1", "source x.go": strings.Repeat("a", 64), "old": "1"}))
	want := map[string][]string{"a": {"it was not built for this profile before"}}
	if diff := cmp.Diff(want, b.why); diff != "" {
		t.Errorf("first build (-want +got):\n%s", diff)
	}
	last := b.mustRun(s(map[string]string{"package criu": "4.2", "source x.go": strings.Repeat("b", 64), "new": "1"}))
	want = map[string][]string{"a": {"new: new", "package criu changed from 4.1 to 4.2", "source x.go changed", "gone: old"}}
	if diff := cmp.Diff(want, b.why); diff != "" {
		t.Errorf("second build (-want +got):\n%s", diff)
	}
	if err := os.RemoveAll(last["a"].Dir); err != nil {
		t.Fatal(err)
	}
	b.mustRun(s(map[string]string{"package criu": "4.2", "source x.go": strings.Repeat("b", 64), "new": "1"}))
	want = map[string][]string{"a": {"its result is no longer in the cache"}}
	if diff := cmp.Diff(want, b.why); diff != "" {
		t.Errorf("cache lost (-want +got):\n%s", diff)
	}
}

// New code of a step must not meet results of the old code.
func TestCodeIsAnInput(t *testing.T) {
	b := newBench(t)
	with := func(code, test string) *Step {
		s := b.step("a", "1", "x")
		s.Code = []fs.FS{fstest.MapFS{"a.go": {Data: []byte(code)}, "a_test.go": {Data: []byte(test)}}}
		return s
	}
	b.mustRun(with("v1", "t1"))
	b.mustRun(with("v1", "t2"))
	b.wantRuns("only a test changed", map[string]int{})
	b.mustRun(with("v2", "t2"))
	b.wantRuns("code changed", map[string]int{"a": 1})
	if why := strings.Join(b.why["a"], ";"); !strings.Contains(why, "mosimg's own code changed") {
		t.Errorf("why = %q", why)
	}
}

// Bits rot and power fails: a damaged result is noticed and made again.
func TestDamagedResultIsMadeAgain(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"changed":   func(p string) error { return os.WriteFile(p, []byte("bad"), 0o644) },
		"truncated": func(p string) error { return os.Truncate(p, 0) },
		"removed":   os.Remove,
	} {
		b := newBench(t)
		r := b.mustRun(b.chain("1", "x"))
		if err := damage(r["a"].Path("out")); err != nil {
			t.Fatal(err)
		}
		// c is built again and reads a.
		if err := os.RemoveAll(r["c"].Dir); err != nil {
			t.Fatal(err)
		}
		r = b.mustRun(b.chain("1", "x"))
		b.wantRuns(name, map[string]int{"a": 1, "c": 1})
		if data, err := os.ReadFile(r["c"].Path("out")); err != nil || string(data) != "c+b+x+x" {
			t.Errorf("%s: result = %q, %v", name, data, err)
		}
		if err := r["a"].Verify(t.Context()); err != nil {
			t.Errorf("%s: Verify = %v", name, err)
		}
	}
	// A damaged record is as no record.
	b := newBench(t)
	r := b.mustRun(b.chain("1", "x"))
	if err := os.WriteFile(r["b"].Path(resultName), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(r["b"].Dir); err != nil {
		t.Fatal(err)
	}
	b.mustRun(b.chain("1", "x"))
	b.wantRuns("record damaged", map[string]int{"b": 1})
}

func TestFaultCancelsTheOthersAndLeavesNothing(t *testing.T) {
	b := newBench(t)
	var ended atomic.Bool
	started := make(chan struct{})
	waits := &Step{Name: "waits", Run: func(ctx context.Context, job *Job) error {
		defer ended.Store(true)
		close(started)
		if err := os.WriteFile(job.Path("half"), nil, 0o644); err != nil {
			return err
		}
		<-ctx.Done()
		return ctx.Err()
	}}
	fails := &Step{Name: "fails", Run: func(context.Context, *Job) error {
		<-started // else the other one may never begin
		return fault.New(fault.Untrusted, "fetch", "x", "bad", "")
	}}
	after := b.step("after", "1", "x", fails)
	_, err := b.run(waits, after)
	if fault.KindOf(err) != fault.Untrusted || !strings.Contains(err.Error(), "fetch x") {
		t.Errorf("Run = %v; want the fault of the step that failed", err)
	}
	if !ended.Load() {
		t.Error("Run returned while a step was still at work")
	}
	b.wantRuns("after a fault", map[string]int{})
	left, err := os.ReadDir(b.cache.Path("tmp"))
	if err != nil || len(left) != 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
	if cache.Exists(b.cache.Path("steps", "waits")) || cache.Exists(b.cache.Path("steps", "fails")) {
		t.Error("an unfinished step left a result")
	}
}

func TestFaultsWithoutAKindNameTheStep(t *testing.T) {
	b := newBench(t)
	for _, tc := range []struct {
		err  error
		kind fault.Kind
	}{
		{errors.New("odd"), fault.Internal},
		{&fs.PathError{Op: "write", Path: "x", Err: errors.New("no space")}, fault.Environment},
	} {
		_, err := b.run(&Step{Name: "s", Run: func(context.Context, *Job) error { return tc.err }})
		if fault.KindOf(err) != tc.kind || !strings.Contains(err.Error(), "build s: ") {
			t.Errorf("Run = %v (kind %d); want kind %d and the step's name", err, fault.KindOf(err), tc.kind)
		}
	}
}

// Two builds with one cache at the same time must both succeed.
func TestConcurrentBuildsShareACache(t *testing.T) {
	b := newBench(t)
	var all sync.WaitGroup
	errs := make(chan error, 8)
	for range cap(errs) {
		all.Go(func() {
			c, err := cache.Open(b.cache.Dir())
			if err == nil {
				var r map[string]*Result
				if r, err = New(c, "test", nil).Run(t.Context(), b.chain("1", "x")); err == nil {
					var data []byte
					if data, err = os.ReadFile(r["c"].Path("out")); err == nil && string(data) != "c+b+x+x" {
						err = fmt.Errorf("result %q", data)
					}
				}
			}
			errs <- err
		})
	}
	all.Wait()
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestReadOnlyCacheIsAFault(t *testing.T) {
	b := newBench(t)
	if err := os.WriteFile(filepath.Join(b.cache.Dir(), "steps", "a"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := b.run(b.step("a", "1", "x"))
	if fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "store the result of a") {
		t.Errorf("Run = %v; want an environment fault", err)
	}
}
