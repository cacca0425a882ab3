package nodecli

import (
	"github.com/spf13/cobra"

	"mosimg/internal/labport"
)

func newLabportCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:    "labport",
		Short:  "Serve the lab's command port (init starts it with mosimg.debug only)",
		Hidden: true,
		Args:   usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			port, err := labport.OpenWait(c.Context())
			if err != nil {
				return err
			}
			defer port.Close()
			return labport.Serve(c.Context(), port, newLog(env.Stderr))
		},
	}
}
