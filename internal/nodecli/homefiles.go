package nodecli

import (
	"github.com/spf13/cobra"

	"mosimg/agent/homefiles/keeper"
	"mosimg/agent/homefiles/mounts"
)

// The two processes of home files, which agents start and which outlive them.

func newKeeperCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use: keeper.Verb + " SOCKET", Hidden: true,
		Short: "Serve this machine's files to its jobs elsewhere",
		Args:  usageArgs(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			return keeper.Main(c.Context(), args[0], newLog(env.Stderr))
		},
	}
}

func newMountCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use: mounts.Verb + " CONFIG", Hidden: true,
		Short: "Show a guest its home's files",
		Args:  usageArgs(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			return mounts.Main(c.Context(), args[0], newLog(env.Stderr))
		},
	}
}
