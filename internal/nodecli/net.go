package nodecli

import (
	"github.com/spf13/cobra"

	"mosimg/agent/netup"
)

func newNetCmd(env *Env) *cobra.Command {
	var cfg netup.Config
	cmd := &cobra.Command{
		Use:   "net",
		Short: "Bring up and keep the network of a machine that mosimg booted",
		Long: `net finds the network card, waits for carrier, gets an address by DHCP or sets a
static one, and keeps it. init starts it; on a host with an own network set-up
it must not run.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			cfg.Log = newLog(env.Stderr)
			return netup.Run(c.Context(), cfg)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Card, "card", "", "name or MAC of the card (default: every wired one)")
	f.StringVar(&cfg.Address, "address", "", "static `ADDRESS/PREFIX` instead of DHCP")
	f.StringVar(&cfg.StatusFile, "status", netup.StatusFile, "where the agent reads how far the network is")
	return cmd
}
