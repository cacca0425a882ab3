package nodecli

import (
	"context"
	"encoding/json"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mosimg/agent/console"
	"mosimg/internal/api"
	"mosimg/internal/unixhttp"
)

func newStatusCmd(env *Env) *cobra.Command {
	var asJSON bool
	var socket string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how far this machine is on its way into the cluster",
		Long: `status shows what the agent on this machine says of itself: whether it is a member
and if not why, its address, its key's fingerprint, its head, and whether live
migration works here. It is what the console shows.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			st, err := agentStatus(c.Context(), socket)
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(env.Stdout)
				e.SetIndent("", "  ")
				return e.Encode(st)
			}
			_, err = io.WriteString(env.Stdout, strings.Trim(console.Block(st), "\n")+"\n")
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the status as JSON")
	cmd.Flags().StringVar(&socket, "socket", api.AgentSocket, "the agent's unix socket")
	return cmd
}

func agentStatus(ctx context.Context, socket string) (api.AgentStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var st api.AgentStatus
	return st, unixhttp.New(socket, "agent").Get(ctx, api.PathStatus, &st)
}
