package nodecli

import "github.com/spf13/cobra"

// mosctlVerbs are mosctl's, each a command of its own.
var mosctlVerbs = []func(*Env) []*cobra.Command{
	mosctlQuestions,
	mosctlModeVerbs,
}

func newMosctlCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "mosctl",
		Short: "Ask about nodes, and steer what this one does with jobs",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	for _, verbs := range mosctlVerbs {
		cmd.AddCommand(verbs(env)...)
	}
	return cmd
}
