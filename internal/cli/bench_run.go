package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"mosimg/agent/jobs/runbench"
	"mosimg/internal/fault"
)

// newBenchRunCmd is `mosimg bench run`.
func newBenchRunCmd(env *Env) *cobra.Command {
	var mosagent string
	var starts, runs int
	var work time.Duration
	var asJSON bool
	c := &cobra.Command{
		Use:   "run",
		Short: "Seconds that mosrun adds: a program that does nothing, and one that only computes",
		Long: `Run starts /bin/true by mosrun in turns with starting it plainly and with a shell
that starts it; and a program that computes for a while, in a job and beside it,
which tells its own CPU and wall-clock time. The home is this machine, by the
services that an agent has, with a socket of their own; jobs stay here. It needs
root, and mosagent, which is mosrun.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			const op, object = "read flags of", "mosimg bench run"
			var bad fault.List
			if starts < 1 {
				bad.Addf("--starts must be 1 or more")
			}
			if runs < 1 {
				bad.Addf("--runs must be 1 or more")
			}
			if work < 100*time.Millisecond || work > 10*time.Minute {
				bad.Addf("--work must be 100ms to 10m")
			}
			if err := bad.Err(fault.Usage, op, object, ""); err != nil {
				return err
			}
			all, err := benchRun(c.Context(), env, mosagent, starts, runs, work)
			if err != nil {
				return err
			}
			return printBench(env, all, asJSON)
		},
	}
	f := c.Flags()
	f.StringVar(&mosagent, "mosagent", "", "the agent's program (default: beside mosimg, or in PATH)")
	f.IntVar(&starts, "starts", 50, "pairs of starts")
	f.IntVar(&runs, "runs", 7, "pairs of computations")
	f.DurationVar(&work, "work", 3*time.Second, "how long one computes, about")
	f.BoolVar(&asJSON, "json", false, "print the rows as JSON")
	return c
}

func benchRun(ctx context.Context, env *Env, mosagent string, starts, runs int, work time.Duration) (all []*pairs, err error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b, err := runbench.New(ctx, mosagent)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	const nothing = "/bin/true"
	plain := &pairs{name: "run-start", unit: "s", peerName: nothing}
	shell := &pairs{name: "run-start", unit: "s", peerName: "sh that starts " + nothing}
	for range starts {
		job, _, err := b.Job(ctx, nothing)
		if err != nil {
			return nil, err
		}
		alone, _, err := b.Plain(ctx, nothing)
		if err != nil {
			return nil, err
		}
		// With something to do after it the shell forks.
		by, _, err := b.Plain(ctx, "/bin/sh", "-c", nothing+"; :")
		if err != nil {
			return nil, err
		}
		plain.add(job.Seconds(), alone.Seconds())
		shell.add(job.Seconds(), by.Seconds())
	}
	all = append(all, plain, shell)
	for _, kind := range []string{runbench.Hash, runbench.Syscalls} {
		times, err := runbench.Calibrate(kind, work)
		if err != nil {
			return nil, err
		}
		cpu := &pairs{name: "run-" + kind + "-cpu", unit: "s", peerName: "the same program without mosrun"}
		wall := &pairs{name: "run-" + kind + "-wall", unit: "s", peerName: cpu.peerName}
		do := func(start func(context.Context, ...string) (time.Duration, string, error)) (cpu, wall float64, err error) {
			_, out, err := start(ctx, exe, runbench.Verb, kind, strconv.Itoa(times))
			if err != nil {
				return 0, 0, err
			}
			return runbench.ParseWork(out)
		}
		for run := range runs {
			jobCPU, jobWall, err := do(b.Job)
			if err != nil {
				return nil, err
			}
			ownCPU, ownWall, err := do(b.Plain)
			if err != nil {
				return nil, err
			}
			cpu.add(jobCPU, ownCPU)
			wall.add(jobWall, ownWall)
			fmt.Fprintf(env.Stderr, "run %d, %s: CPU %.3f s in a job, %.3f s without; wall %.3f s, %.3f s\n", run+1, kind, jobCPU, ownCPU, jobWall, ownWall)
		}
		all = append(all, cpu, wall)
	}
	return all, nil
}

// newBenchWorkCmd is the program that bench run computes with.
func newBenchWorkCmd(*Env) *cobra.Command {
	return &cobra.Command{
		Use: runbench.Verb, Hidden: true,
		Args: usageArgs(cobra.ExactArgs(2)),
		RunE: func(_ *cobra.Command, args []string) error { return runbench.Work(args[0], args[1]) },
	}
}
