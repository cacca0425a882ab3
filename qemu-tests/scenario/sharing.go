package scenario

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"mosimg/internal/api"
)

const (
	// loops is how many programs want a CPU, on three machines with one each.
	loops = 6
	// loopSeconds is how long one of them computes on a machine of its own.
	loopSeconds = 120
	// levelWithin is how long the cluster may take to share them out. All its CPUs
	// may be emulated by two.
	levelWithin = 2 * time.Minute
	// leaveWithin is how long a machine that leaves may take to send its guests away.
	leaveWithin = 2 * time.Minute
)

// sharing is what the cluster is for.
func sharing(ctx context.Context, r *Run) error {
	for _, name := range []string{bios, uefi} {
		if _, err := r.member(ctx, name); err != nil {
			return err
		}
	}
	return r.share(ctx)
}

// share starts more programs than one machine has CPUs, as the ordinary user of the
// head, and watches where they go while machines come and go. The lab's two nodes
// are members, and at the end one of them is switched off.
func (r *Run) share(ctx context.Context) error {
	n1, err := r.member(ctx, bios)
	if err != nil {
		return err
	}
	n2, err := r.member(ctx, uefi)
	if err != nil {
		return err
	}
	program, err := r.loopProgram(ctx)
	if err != nil {
		return err
	}
	var runs []*command
	defer func() {
		for _, run := range runs {
			run.end()
		}
	}()
	level := func(what string, among ...api.NodeID) error {
		return r.step(what, func() (string, error) { return r.awaitLevel(ctx, runs, among) })
	}
	all := []api.NodeID{1, n1.Node, n2.Node}
	if err := r.step(fmt.Sprintf("%d times mosrun awk '%s' &", loops, program), func() (string, error) {
		for range loops {
			runs = append(runs, r.startAsDemo(ctx, "mosrun", "awk", program))
		}
		return r.awaitLoops(ctx, runs)
	}); err != nil {
		return err
	}
	if err := level("they level out by themselves", all...); err != nil {
		return err
	}
	if err := r.showAsDemo(ctx, "mosps"); err != nil {
		return err
	}
	if err := r.show(ctx, "mosmon", "--once"); err != nil {
		return err
	}
	if err := r.step("one is moved by hand", func() (string, error) { return r.moveOne(ctx, n2.Node) }); err != nil {
		return err
	}
	if err := r.countRound(ctx, n1.Node, n2.Node); err != nil {
		return err
	}
	if err := r.leave(ctx, bios, runs); err != nil {
		return err
	}
	if err := level("all go on, on the machines that are left", 1, n2.Node); err != nil {
		return err
	}
	if err := r.showAsDemo(ctx, "mosps"); err != nil {
		return err
	}
	return r.step("pkill awk ends all", func() (string, error) { return r.endLoops(ctx, runs) })
}

// loopProgram is the tutorial's program, of a length that fits this machine.
func (r *Run) loopProgram(ctx context.Context) (string, error) {
	program := func(n int) string {
		return fmt.Sprintf("BEGIN {for(i=0;i<10000;i++)for(j=0;j<%d;j++);}", n)
	}
	const enough = 2 * time.Second // of computing, beside which starting awk is little
	for n := 100; ; n *= 2 {
		began := time.Now()
		if _, err := r.asDemo(ctx, "", "awk", program(n)); err != nil {
			return "", err
		}
		if took := time.Since(began); took >= enough {
			return program(int(float64(n) * loopSeconds / took.Seconds())), nil
		}
	}
}

// awaitLoops waits until all are jobs that run.
func (r *Run) awaitLoops(ctx context.Context, runs []*command) (string, error) {
	err := r.poll(ctx, time.Minute, runs, func(jobs []api.JobStatus) error {
		if len(jobs) != len(runs) {
			return fmt.Errorf("mosps shows %d jobs", len(jobs))
		}
		return nil
	})
	return "", err
}

// awaitLevel waits until the loops are spread over these nodes and no others, none
// with two more than another.
func (r *Run) awaitLevel(ctx context.Context, runs []*command, among []api.NodeID) (comment string, err error) {
	err = r.poll(ctx, levelWithin, runs, func(jobs []api.JobStatus) error {
		at := make(map[api.NodeID]int)
		moves := 0
		for _, j := range jobs {
			at[j.Node]++
			moves += j.Moves
			if j.State != api.JobRuns {
				return fmt.Errorf("job %s %s", j.ID, j.State)
			}
		}
		counts := make([]int, len(among))
		sum := 0
		for i, n := range among {
			counts[i] = at[n]
			sum += at[n]
		}
		comment = fmt.Sprintf("%v on nodes %v, %d moves", counts, among, moves)
		if sum != len(runs) || slices.Max(counts)-slices.Min(counts) > 1 {
			return errors.New(comment)
		}
		return nil
	})
	return comment, err
}

// poll looks at the loops until check is content. A loop that ends meanwhile is an error.
func (r *Run) poll(ctx context.Context, limit time.Duration, runs []*command, check func([]api.JobStatus) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		for _, run := range runs {
			select {
			case <-run.done:
				return fmt.Errorf("a mosrun has ended: %v, %w: %s", run.exit, errOrNone(run.err), run.errs.String())
			default:
			}
		}
		jobs, err := r.jobsOfDemo(ctx)
		if err == nil {
			if err = check(slices.DeleteFunc(jobs, isNoLoop)); err == nil {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not within %.0f s: %w", limit.Seconds(), err)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

func isNoLoop(j api.JobStatus) bool { return len(j.Argv) == 0 || j.Argv[0] != "awk" }

// moveOne moves a loop by hand to a node that it is not on.
func (r *Run) moveOne(ctx context.Context, to api.NodeID) (string, error) {
	jobs, err := r.jobsOfDemo(ctx)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(jobs, func(j api.JobStatus) bool { return !isNoLoop(j) && j.Node != to })
	if i < 0 {
		return "", fmt.Errorf("none is elsewhere than on node %d: %+v", to, jobs)
	}
	j := jobs[i]
	if _, err := r.asDemo(ctx, "", "migrate", strconv.Itoa(j.PID), strconv.Itoa(int(to))); err != nil {
		return "", err
	}
	now, err := r.jobsOfDemo(ctx)
	if err != nil {
		return "", err
	}
	for _, k := range now {
		if k.ID == j.ID && k.Moves > j.Moves {
			return fmt.Sprintf("pid %d from node %d to node %d", j.PID, j.Node, to), nil
		}
	}
	return "", fmt.Errorf("after the move mosps shows %+v", now)
}

// leave drains a machine that has guests, and switches it off by its button.
func (r *Run) leave(ctx context.Context, name string, runs []*command) error {
	m := r.Lab.Machine(name)
	rec, err := r.member(ctx, name)
	if err != nil {
		return err
	}
	err = r.step(name+" holds jobs", func() (comment string, err error) {
		return "", r.poll(ctx, levelWithin, runs, func(jobs []api.JobStatus) error {
			if !slices.ContainsFunc(jobs, func(j api.JobStatus) bool { return j.Node == rec.Node }) {
				return fmt.Errorf("none is on node %d", rec.Node)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	if err := r.step(name+" is drained", func() (string, error) {
		out, err := r.Lab.Output(ctx, "mosimg", "node", "drain", strconv.Itoa(int(rec.Node)))
		return strings.TrimSpace(string(out)), err
	}); err != nil {
		return err
	}
	err = r.step(name+" is shut down by its power button", func() (string, error) {
		ctx, cancel := context.WithTimeout(ctx, leaveWithin)
		defer cancel()
		if err := m.VM().PressPower(ctx); err != nil {
			return "", err
		}
		select {
		case <-m.VM().Done():
		case <-ctx.Done():
			return "", fmt.Errorf("it is still on: %w", ctx.Err())
		}
		m.PowerOff() // the lab then knows that it is off
		return "", nil
	})
	if err != nil {
		return err
	}
	// The next scenario wants a machine that takes guests.
	_, err = r.Lab.Output(ctx, "mosimg", "node", "undrain", strconv.Itoa(int(rec.Node)))
	return err
}

// endLoops ends them as a user does who knows nothing of nodes.
func (r *Run) endLoops(ctx context.Context, runs []*command) (string, error) {
	if _, err := r.asDemo(ctx, "", "pkill", "awk"); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for i, run := range runs {
		select {
		case <-run.done:
		case <-ctx.Done():
			return "", fmt.Errorf("%d of %d have ended: %w", i, len(runs), ctx.Err())
		}
		if run.err != nil || run.exit.Status != 128+int(syscall.SIGTERM) {
			return "", fmt.Errorf("a mosrun ended with %v, %w, and said %q; want death by SIGTERM", run.exit, errOrNone(run.err), run.errs.String())
		}
	}
	for {
		jobs, err := r.jobsOfDemo(ctx)
		if err != nil {
			return "", err
		}
		if len(jobs) == 0 {
			return fmt.Sprintf("%d jobs", len(runs)), nil
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("mosps still shows %+v", jobs)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// showAsDemo prints the real output of a command of the head's user.
func (r *Run) showAsDemo(ctx context.Context, argv ...string) error {
	out, err := r.asDemo(ctx, "", argv...)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(r.Out, "demo$ %s\n%s\n", strings.Join(argv, " "), bytes.TrimRight([]byte(out), "\n"))
	return err
}
