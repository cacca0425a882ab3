// Package steps runs the steps of a build. A step is keyed by the hash of
// everything that its result depends on: its inputs, the results of the steps
// that it needs, and the code that runs it. A step whose key is known is not
// run again, and the engine can say which input changed when it is.
//
// Results are folders in the cache. What is downstream depends on what a step
// produced, not on what it was made from: an edit that changes no output byte
// ends there.
package steps

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"sync"
	"time"

	"mosimg/image/cache"
	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
)

// Step is one step of a build.
type Step struct {
	Name string
	// Inputs are what the result depends on, by a name that a user
	// understands ("package criu", "source agent/boot/boot.go").
	Inputs map[string]string
	// Code is the source of the packages that do the work.
	Code  []fs.FS
	Needs []*Step
	// Run makes the result: files in job.Dir.
	Run func(ctx context.Context, job *Job) error
}

// Job is what a running step works with.
type Job struct {
	Dir  string // for the result
	Tmp  string // for unfinished work; removed afterwards
	need map[string]*Result
	tell func(string)
}

// Need is the result of a step that was named in Needs.
func (j *Job) Need(s *Step) *Result { return j.need[s.Name] }

// Path is the place of a file of the result.
func (j *Job) Path(name string) string { return filepath.Join(j.Dir, name) }

// Progress shows a line about long work.
func (j *Job) Progress(format string, args ...any) { j.tell(fmt.Sprintf(format, args...)) }

// Result is what a step made.
type Result struct {
	Step   string          `json:"-"`
	Dir    string          `json:"-"`
	Reused bool            `json:"-"`
	Why    []string        `json:"-"` // why it was built: the inputs that changed
	Took   time.Duration   `json:"-"`
	Files  []imageset.File `json:"files"` // sorted by name
	Digest string          `json:"digest"`

	again func(context.Context) (*Result, error)
	once  sync.Once
	err   error
}

// Path is the place of a file of the result.
func (r *Result) Path(name string) string { return filepath.Join(r.Dir, name) }

// File is the entry of that name; the zero File when there is none.
func (r *Result) File(name string) imageset.File {
	for _, f := range r.Files {
		if f.Name == name {
			return f
		}
	}
	return imageset.File{}
}

// Event tells about the progress of a step.
type Event struct {
	Step   string
	Kind   Kind
	Text   string   // Progress: the line
	Why    []string // Started, Done: why the step is built
	Took   time.Duration
	Reused bool
}

// Kind is the kind of an Event.
type Kind int

// The kinds of events.
const (
	Started Kind = iota
	Progress
	Done
)

// Engine runs steps.
type Engine struct {
	Cache *cache.Cache
	// Scope separates the memories of what was built last: the profile.
	Scope string
	// Report, if not nil, hears of every event, one at a time.
	Report func(Event)

	mu   sync.Mutex // one report at a time
	room chan struct{}
}

// New makes an Engine.
func New(c *cache.Cache, scope string, report func(Event)) *Engine {
	// Some steps wait for the network or for one processor: one more than
	// there are processors keeps the machine busy.
	return &Engine{Cache: c, Scope: scope, Report: report, room: make(chan struct{}, runtime.NumCPU()+1)}
}

func (e *Engine) report(ev Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.Report != nil {
		e.Report(ev)
	}
}

// Run runs the steps and what they need, side by side where it can. After the
// first fault the others are cancelled; it returns when all have ended.
func (e *Engine) Run(ctx context.Context, goals ...*Step) (map[string]*Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type future struct {
		done   chan struct{}
		result *Result
	}
	futures := make(map[*Step]*future)
	var all sync.WaitGroup
	var start func(*Step) *future
	start = func(s *Step) *future {
		if f := futures[s]; f != nil {
			return f
		}
		f := &future{done: make(chan struct{})}
		futures[s] = f
		needs := make([]*future, len(s.Needs))
		for i, n := range s.Needs {
			needs[i] = start(n)
		}
		all.Go(func() {
			defer close(f.done)
			need := make(map[string]*Result)
			for i, n := range needs {
				<-n.done
				if n.result == nil {
					return // its fault has been told
				}
				need[s.Needs[i].Name] = n.result
			}
			r, err := e.step(ctx, s, need)
			if err != nil {
				cancel(err)
				return
			}
			f.result = r
		})
		return f
	}
	for _, s := range goals {
		start(s)
	}
	all.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	results := make(map[string]*Result)
	for s, f := range futures {
		results[s.Name] = f.result
	}
	return results, nil
}

// step reuses the result of a step or makes it.
func (e *Engine) step(ctx context.Context, s *Step, need map[string]*Result) (*Result, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	inputs, err := s.inputs(need)
	if err != nil {
		return nil, err
	}
	key := hashInputs(s.Name, inputs)
	dir := e.Cache.Path("steps", s.Name, key)
	build := func(ctx context.Context, why []string) (*Result, error) { return e.build(ctx, s, need, dir, why) }
	if r, err := load(dir); err == nil {
		cache.Use(dir)
		r.Step, r.Reused = s.Name, true
		r.again = func(ctx context.Context) (*Result, error) {
			return build(ctx, []string{"its result in the cache is damaged"})
		}
		e.remember(s, inputs)
		e.report(Event{Step: s.Name, Kind: Done, Reused: true})
		return r, nil
	}
	r, err := build(ctx, e.changes(s, inputs))
	if err != nil {
		return nil, err
	}
	e.remember(s, inputs)
	return r, nil
}

// build runs a step and puts its result into the cache.
func (e *Engine) build(ctx context.Context, s *Step, need map[string]*Result, dir string, why []string) (*Result, error) {
	// Before taking room: a damaged result is built again, which takes some too.
	for _, n := range need {
		if err := n.Verify(ctx); err != nil {
			return nil, err
		}
	}
	select {
	case e.room <- struct{}{}:
		defer func() { <-e.room }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	began := time.Now()
	e.report(Event{Step: s.Name, Kind: Started, Why: why})
	tmp, err := e.Cache.TempDir(s.Name)
	if err != nil {
		return nil, fault.New(fault.Environment, "build", s.Name, err, "")
	}
	defer tmp.Remove()
	job := &Job{
		Dir: filepath.Join(tmp.Path, "result"), Tmp: filepath.Join(tmp.Path, "tmp"), need: need,
		tell: func(text string) { e.report(Event{Step: s.Name, Kind: Progress, Text: text}) },
	}
	if err := errors.Join(os.Mkdir(job.Dir, 0o755), os.Mkdir(job.Tmp, 0o755)); err != nil {
		return nil, fault.New(fault.Environment, "build", s.Name, err, "")
	}
	if err := s.Run(ctx, job); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, inStep(s.Name, err)
	}
	r, err := seal(job.Dir)
	if err == nil {
		err = publish(job.Dir, dir)
	}
	if err != nil {
		return nil, fault.New(fault.Environment, "store the result of", s.Name, err, "")
	}
	r.Step, r.Dir, r.Why, r.Took = s.Name, dir, why, time.Since(began)
	r.once.Do(func() {}) // it was hashed a moment ago
	e.report(Event{Step: s.Name, Kind: Done, Why: why, Took: r.Took})
	return r, nil
}

// inStep names the step in an error that has no fault of its own.
func inStep(name string, err error) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	kind := fault.Internal
	var p *fs.PathError
	if errors.As(err, &p) {
		kind = fault.Environment
	}
	return fault.New(kind, "build", name, err, "")
}

const resultName = "result.json"

// seal hashes the files of a new result and writes its record.
func seal(dir string) (*Result, error) {
	r := &Result{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		sum, size, err := imageset.HashFile(path)
		r.Files = append(r.Files, imageset.File{Name: filepath.ToSlash(name), Size: size, SHA256: sum})
		return err
	})
	if err != nil {
		return nil, err
	}
	r.Digest = digest(r.Files)
	data, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return r, os.WriteFile(filepath.Join(dir, resultName), data, 0o644)
}

func digest(files []imageset.File) string {
	h := sha256.New()
	for _, f := range files {
		fmt.Fprintf(h, "%s %s\n", f.SHA256, f.Name)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// publish moves a finished result to its place. Another build may have been
// faster: its result is as good.
func publish(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	err := os.Rename(from, to)
	if err != nil && cache.Exists(filepath.Join(to, resultName)) {
		return nil
	}
	return err
}

func load(dir string) (*Result, error) {
	data, err := os.ReadFile(filepath.Join(dir, resultName))
	if err != nil {
		return nil, err
	}
	r := &Result{Dir: dir}
	if err := json.Unmarshal(data, r); err != nil || r.Digest != digest(r.Files) {
		return nil, fmt.Errorf("%s is damaged: %w", dir, errors.Join(err))
	}
	return r, nil
}

// Verify makes sure that the files of a reused result are what they were, and
// makes them again if not. It costs once; who reads a result calls it first.
func (r *Result) Verify(ctx context.Context) error {
	r.once.Do(func() { r.err = r.verify(ctx) })
	return r.err
}

func (r *Result) verify(ctx context.Context) error {
	intact := true
	for _, f := range r.Files {
		sum, _, err := imageset.HashFile(r.Path(f.Name))
		intact = intact && err == nil && sum == f.SHA256
	}
	if intact {
		return nil
	}
	if err := os.RemoveAll(r.Dir); err != nil {
		return fault.New(fault.Environment, "remove damaged", r.Dir, err, "")
	}
	fresh, err := r.again(ctx)
	if err != nil {
		return err
	}
	if fresh.Digest != r.Digest {
		return fault.New(fault.Internal, "build", r.Step, "it gave another result than last time from the same inputs", "run the build again")
	}
	return nil
}

// inputs is everything that decides about the result.
func (s *Step) inputs(need map[string]*Result) (map[string]string, error) {
	in := make(map[string]string, len(s.Inputs)+len(need)+1)
	maps.Copy(in, s.Inputs)
	for name, r := range need {
		in["result of "+name] = r.Digest
	}
	h := sha256.New()
	for _, code := range s.Code {
		err := fs.WalkDir(code, ".", func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || strings.HasSuffix(path, "_test.go") {
				return err
			}
			data, err := fs.ReadFile(code, path)
			fmt.Fprintf(h, "%s %d\n%s", path, len(data), data)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	in["mosimg's own code"] = hex.EncodeToString(h.Sum(nil))
	return in, nil
}

func hashInputs(name string, in map[string]string) string {
	h := sha256.New()
	fmt.Fprintf(h, "step %q\n", name)
	for _, k := range sortedKeys(in) {
		fmt.Fprintf(h, "%q %q\n", k, in[k])
	}
	return hex.EncodeToString(h.Sum(nil))
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// lastPath is where the inputs of the last build of a step are kept.
func (e *Engine) lastPath(s *Step) string {
	return e.Cache.Path("index", "last-"+hashInputs(e.Scope, map[string]string{"step": s.Name})[:16]+".json")
}

func (e *Engine) remember(s *Step, inputs map[string]string) {
	if data, err := json.Marshal(inputs); err == nil {
		_ = atomicfile.Write(e.lastPath(s), data, 0o644) // only for explanations
	}
}

// changes says in which inputs this build differs from the last one.
func (e *Engine) changes(s *Step, now map[string]string) []string {
	data, err := os.ReadFile(e.lastPath(s))
	var last map[string]string
	if err != nil || json.Unmarshal(data, &last) != nil {
		return []string{"it was not built for this profile before"}
	}
	return diff(last, now)
}

func diff(last, now map[string]string) []string {
	var out []string
	for _, k := range sortedKeys(now) {
		old, had := last[k]
		switch {
		case !had:
			out = append(out, "new: "+k)
		case old != now[k] && len(old) < 60 && len(now[k]) < 60:
			out = append(out, fmt.Sprintf("%s changed from %s to %s", k, old, now[k]))
		case old != now[k]:
			out = append(out, k+" changed")
		}
	}
	for _, k := range sortedKeys(last) {
		if _, has := now[k]; !has {
			out = append(out, "gone: "+k)
		}
	}
	if len(out) == 0 {
		out = []string{"its result is no longer in the cache"}
	}
	return out
}
