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
			ctx := c.Context()
			port, err := labport.OpenWait(ctx)
			if err == nil {
				defer port.Close()
				err = labport.Serve(ctx, port, newLog(env.Stderr))
			}
			if ctx.Err() != nil {
				return nil // told to end
			}
			return err
		},
	}
}
