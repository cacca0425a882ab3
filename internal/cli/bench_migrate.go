package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"mosimg/agent/migrate/movebench"
	"mosimg/internal/fault"
)

// newBenchMigrateCmd is `mosimg bench migrate`.
func newBenchMigrateCmd(env *Env) *cobra.Command {
	var bundle string
	var sizes []int
	var runs int
	var asJSON bool
	c := &cobra.Command{
		Use:   "migrate",
		Short: "Seconds that a moved process stands still: our move beside criu dump, tar and criu restore",
		Long: `Migrate moves a process of 1, 64 and 512 MiB between two nodes on this machine, over
TLS on loopback, in turns with doing it by hand: criu dump into a tmpfs, tar
over the same kind of connection, criu restore. The process looks at the clock
each millisecond and tells how long it stood still. Beside the total is a plain
TCP copy of the same bytes. It needs root, and CRIU as a bundle (mosimg criu).`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if runs < 1 {
				return fault.New(fault.Usage, "read flags of", "mosimg bench migrate", "--runs must be 1 or more", "")
			}
			for _, s := range sizes {
				if s < 1 {
					return fault.New(fault.Usage, "read flags of", "mosimg bench migrate", "--sizes must be 1 or more", "")
				}
			}
			all, err := benchMigrate(c.Context(), env, bundle, sizes, runs)
			if err != nil {
				return err
			}
			return printBench(env, all, asJSON)
		},
	}
	f := c.Flags()
	f.StringVar(&bundle, "criu", "", "folder of the CRIU bundle (default: /"+criuInImage+")")
	f.IntSliceVar(&sizes, "sizes", []int{1, 64, 512}, "sizes of the process, in MiB")
	f.IntVar(&runs, "runs", 3, "moves of each kind and size")
	f.BoolVar(&asJSON, "json", false, "print the rows as JSON")
	return c
}

func benchMigrate(ctx context.Context, env *Env, bundle string, sizes []int, runs int) (all []*pairs, err error) {
	b, err := movebench.New(ctx, bundle)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	for _, mib := range sizes {
		byHand := "criu dump, tar over TLS, criu restore"
		down := &pairs{name: fmt.Sprintf("migrate-downtime-%dMiB", mib), unit: "s", peerName: byHand}
		total := &pairs{name: fmt.Sprintf("migrate-total-%dMiB", mib), unit: "s", peerName: byHand}
		bytes := &pairs{name: fmt.Sprintf("migrate-copy-%dMiB", mib), unit: "s", peerName: "plain TCP copy of the same bytes"}
		size := int64(mib) << 20
		for run := range runs {
			ours, err := b.Ours(ctx, size)
			if err != nil {
				return nil, fmt.Errorf("our move of %d MiB: %w", mib, err)
			}
			hand, err := b.ByHand(ctx, size)
			if err != nil {
				return nil, fmt.Errorf("move of %d MiB by hand: %w", mib, err)
			}
			plain, err := movebench.Copy(size)
			if err != nil {
				return nil, err
			}
			down.add(ours.Downtime.Seconds(), hand.Downtime.Seconds())
			total.add(ours.Total.Seconds(), hand.Total.Seconds())
			bytes.add(ours.Total.Seconds(), plain.Seconds())
			fmt.Fprintf(env.Stderr, "run %d, %d MiB: stood still %.3f s, by hand %.3f s\n", run+1, mib, ours.Downtime.Seconds(), hand.Downtime.Seconds())
		}
		all = append(all, down, total, bytes)
	}
	return all, nil
}

// newTickerCmd is the process that bench migrate moves.
func newTickerCmd(*Env) *cobra.Command {
	return &cobra.Command{
		Use: movebench.Verb, Hidden: true,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error { return movebench.Ticker(args[0]) },
	}
}
