package nodecli

import (
	"encoding/json"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"mosimg/agent/jobs/client"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/table"
)

func newMospsCmd(env *Env) *cobra.Command {
	var why, guests, asJSON bool
	var socket string
	cmd := &cobra.Command{
		Use:   "mosps",
		Short: "List your jobs and where they are",
		Long: `mosps shows one line for each of your jobs, for root of everybody's, that were
started on this machine: the job and the pid of its mosrun, where it is and since when, how
often it has moved, its resident memory, and what it does: runs, stopped (by
ctrl-Z), moves, waits (its node does not answer), ended.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if guests && os.Geteuid() != 0 {
				return fault.New(fault.Refused, "list", "guests", "they are other homes' jobs, shown to root only", "run this as root")
			}
			agent := client.Agent{Socket: socket}
			jobs, err := agent.List(c.Context())
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(env.Stdout)
				e.SetIndent("", "  ")
				return e.Encode(jobs)
			}
			// Without the names the numbers have to do.
			members, _ := agent.Members(c.Context())
			look := table.Jobs{Names: table.Names(members), Now: time.Now(), Why: why, Users: os.Geteuid() == 0}
			if out, ok := terminal(env.Stdout); ok {
				look.Width, _ = size(out)
			}
			text := look.Text(jobs.Jobs)
			if guests {
				look.Guests = true
				text += "\n" + look.Text(jobs.Guests)
			}
			_, err = io.WriteString(env.Stdout, text)
			return err
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&why, "why", "w", false, "add why a job does not move, and do not cut lines")
	f.BoolVarP(&guests, "all", "a", false, "add the guests: other homes' jobs on this machine (root)")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	f.StringVar(&socket, "socket", api.AgentSocket, "the agent's unix socket")
	return cmd
}
