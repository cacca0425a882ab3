package nodecli

import (
	"github.com/spf13/cobra"

	"mosimg/agent/boot"
	"mosimg/internal/fault"
)

func newInitCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "init",
		Short: "Boot this machine (process 1 of a node)",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if env.Pid != 1 {
				return fault.New(fault.Usage, "run", "init", "this is not process 1", "init is started by the kernel only")
			}
			boot.Main()
			return nil
		},
	}
}
