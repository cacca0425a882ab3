package nodecli

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"mosimg/agent/criu"
	"mosimg/internal/fault"
)

func newProbeCRIUCmd(env *Env) *cobra.Command {
	var dir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "probe-criu",
		Short: "Try out whether live migration works on this machine",
		Long: `probe-criu dumps and restores a small process, as the agent does when it starts,
and says whether CRIU works here. The exit status is 0 when it does.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			st := criu.Probe(c.Context(), dir, os.TempDir(), newLog(env.Stderr))
			if asJSON {
				e := json.NewEncoder(env.Stdout)
				e.SetIndent("", "  ")
				if err := e.Encode(st.CRIUStatus); err != nil {
					return err
				}
			}
			if !st.Usable {
				return fault.New(fault.Environment, "try", "criu", st.Reason, "this machine takes only jobs placed at start")
			}
			if !asJSON {
				fmt.Fprintf(env.Stdout, "CRIU %s works on this machine\n", st.Version)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&dir, "criu", "", "folder of the CRIU bundle (default: "+criu.Bundle+", then an installed criu)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the result as JSON")
	return cmd
}
