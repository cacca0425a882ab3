package nodecli

import (
	"fmt"

	"github.com/spf13/cobra"

	"mosimg/agent/jobs/client"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

func newMigrateCmd(env *Env) *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "migrate {JOB|PID} {NODE|NAME|home}",
		Short: "Move a job to another machine",
		Long: `migrate moves one of your jobs, root any, and returns when it runs there or the move was
called off; then the job runs on where it was. The job is named as mosps shows it, or by
the pid of its mosrun; the node by its number or name.

Exit status: 0 moved, 2 wrong words, 4 refused (why is said), 5 no such job or
node, 6 the node or the agent does not answer.`,
		Example: `  migrate 1-7 3
  migrate $! node3
  migrate 1-7 home`,
		Args: usageArgs(cobra.ExactArgs(2)),
		RunE: func(c *cobra.Command, args []string) error {
			switch args[1] {
			case "balance":
				return fault.New(fault.Usage, "migrate", args[0]+" "+args[1], "its node looks each second by itself whether another one is better", "mosps -w shows why a job stays")
			case "out", "freeze", "continue", "checkpoint", "chkstop", "chkexit":
				return fault.New(fault.Usage, "migrate", args[0]+" "+args[1], "only moves to a node or home are there", "kill -TSTP and -CONT to its mosrun freeze a job and let it run on")
			}
			status, err := client.Agent{Socket: socket}.Move(c.Context(), args[0], args[1])
			if err != nil {
				if c.Context().Err() != nil {
					return fault.New(fault.Unavailable, "migrate", args[0], "you did not wait for the end of the move", "it goes on; mosps shows the job")
				}
				return err
			}
			text, err := client.Moved(status)
			if err == nil {
				fmt.Fprintln(env.Stdout, text)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&socket, "socket", api.AgentSocket, "the agent's unix socket")
	return cmd
}
