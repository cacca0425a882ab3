package cli

import (
	"fmt"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

// benchRow is one figure beside a peer's, measured in the same run.
type benchRow struct {
	Name     string  `json:"name"`
	Unit     string  `json:"unit"`
	Ours     float64 `json:"ours"`
	PeerName string  `json:"peer_name"`
	Peer     float64 `json:"peer"`
	// Ratio is ours to the peer's. With seconds, less is better.
	Ratio float64 `json:"ratio"`
}

// pairs are the samples of one row: run i of ours was next to run i of the
// peer's, so that what else the computer did touched both.
type pairs struct {
	name, unit, peerName string
	ours, peer           []float64
}

func (p *pairs) add(ours, peer float64) {
	p.ours, p.peer = append(p.ours, ours), append(p.peer, peer)
}

// row reduces the samples: medians, and the median of the pairs' ratios.
func (p *pairs) row() benchRow {
	var ratios []float64
	for i := range p.ours {
		ratios = append(ratios, p.ours[i]/p.peer[i])
	}
	return benchRow{Name: p.name, Unit: p.unit, Ours: median(p.ours), PeerName: p.peerName, Peer: median(p.peer), Ratio: median(ratios)}
}

// median of at least one value; of an even number the mean of the middle two.
func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}

// newBenchCmd is `mosimg bench`: figures, each beside a peer's.
func newBenchCmd(env *Env) *cobra.Command {
	c := &cobra.Command{
		Use:   "bench",
		Short: "Measure beside a peer, in one run, as a ratio",
		Long: `Bench runs our part and a peer's in turns on this computer and prints the medians
and the ratio. It says nothing about other computers; docs/measurements.md has
the figures of one, with the commands.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(newBenchBuildCmd(env), newBenchBootCmd(env), newBenchTFTPCmd(env), newBenchHTTPCmd(env), newBenchMigrateCmd(env), newBenchHomefsCmd(env), newBenchRunCmd(env))
	return c
}

// printBench writes the rows as a table or as JSON.
func printBench(env *Env, all []*pairs, asJSON bool) error {
	var rows []benchRow
	for _, p := range all {
		if len(p.ours) > 0 {
			rows = append(rows, p.row())
		}
	}
	if asJSON {
		return printJSON(env.Stdout, rows)
	}
	t := tabwriter.NewWriter(env.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tUNIT\tOURS\tPEER\tRATIO\tPEER IS")
	for _, r := range rows {
		fmt.Fprintf(t, "%s\t%s\t%.2f\t%.2f\t%.2f\t%s\n", r.Name, r.Unit, r.Ours, r.Peer, r.Ratio, r.PeerName)
	}
	return t.Flush()
}
