package cli

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"mosimg/agent/jobs/client"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/table"
)

// jobCmd is what the sub-verbs of `mosimg job` share.
type jobCmd struct {
	env    *Env
	socket string
	asJSON bool
}

// newJobCmd is `mosimg job`: the jobs of this machine.
func newJobCmd(env *Env) *cobra.Command {
	j := &jobCmd{env: env}
	c := &cobra.Command{
		Use:   "job",
		Short: "List, show, move and kill jobs",
		Long: `Job talks to the agent on this machine about the jobs that mosrun started here: your
own, or for root everybody's. JOB is a job's name, or the pid of its mosrun.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.PersistentFlags().StringVar(&j.socket, "socket", api.AgentSocket, "socket of the agent on this machine")
	ls := &cobra.Command{
		Use: "ls", Short: "List jobs, where they are and why they stay there", Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return j.list(c.Context()) },
	}
	show := &cobra.Command{
		Use: "show JOB", Short: "Show all that is known of one job", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return j.show(c.Context(), args[0]) },
	}
	migrate := &cobra.Command{
		Use: "migrate JOB {NODE|NAME|home}", Short: "Move a job, and wait until it is there", Args: usageArgs(cobra.ExactArgs(2)),
		RunE: func(c *cobra.Command, args []string) error { return j.migrate(c.Context(), args[0], args[1]) },
	}
	for _, v := range []*cobra.Command{ls, show, migrate} {
		v.Flags().BoolVar(&j.asJSON, "json", false, "print JSON")
	}
	c.AddCommand(ls, show, migrate, &cobra.Command{
		Use: "kill JOB...", Short: "Kill jobs, wherever they are", Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return j.killAll(c.Context(), args) },
	})
	return c
}

func (j *jobCmd) agent() client.Agent { return client.Agent{Socket: j.socket} }

// look is how jobs are shown. Where the names of nodes are not known their numbers have
// to do.
func (j *jobCmd) look(ctx context.Context) table.Jobs {
	look := table.Jobs{Now: time.Now(), Why: true, Users: os.Geteuid() == 0}
	if members, err := j.agent().Members(ctx); err == nil {
		look.Names = table.Names(members)
	}
	return look
}

func (j *jobCmd) list(ctx context.Context) error {
	jobs, err := j.agent().List(ctx)
	if err != nil {
		return err
	}
	if j.asJSON {
		return printJSON(j.env.Stdout, jobs)
	}
	_, err = io.WriteString(j.env.Stdout, j.look(ctx).Text(jobs.Jobs))
	return err
}

func (j *jobCmd) show(ctx context.Context, job string) error {
	s, err := j.agent().Show(ctx, job)
	if err != nil {
		return err
	}
	if j.asJSON {
		return printJSON(j.env.Stdout, s)
	}
	return showJob(j.env.Stdout, s, j.look(ctx))
}

func showJob(w io.Writer, s api.JobStatus, look table.Jobs) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(k, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", k, fmt.Sprintf(format, args...)) }
	row("job", "%s", s.ID)
	row("command", "%s", table.Command(s))
	row("state", "%s", s.State)
	row("mosrun", "pid %d, user %s", s.PID, table.User(s.UID))
	row("home", "node %d (%s)", s.Home, look.Node(s.Home))
	row("is at", "node %d (%s) since %s", s.Node, look.Where(s), s.Since.Format(time.RFC3339))
	row("started", "%s", s.Started.Format(time.RFC3339))
	row("moves", "%d, epoch %d", s.Moves, s.Epoch)
	if s.Downtime > 0 {
		row("last move", "stood still %d ms", s.Downtime.Milliseconds())
	}
	row("memory", "%s in %d processes", table.Bytes(s.Bytes), s.Processes)
	row("cpu", "%.1f s", s.CPUSeconds)
	row("why not", "%s", table.Printable(table.Why(s)))
	return t.Flush()
}

func (j *jobCmd) migrate(ctx context.Context, job, to string) error {
	s, err := j.agent().Move(ctx, job, to)
	if err != nil {
		return err
	}
	text, err := client.Moved(s)
	switch {
	case err != nil:
		return err
	case j.asJSON:
		return printJSON(j.env.Stdout, s)
	}
	_, err = fmt.Fprintln(j.env.Stdout, text)
	return err
}

// killAll does what it can: one unknown job does not keep the others alive.
func (j *jobCmd) killAll(ctx context.Context, jobs []string) error {
	var l fault.List
	for _, job := range jobs {
		if err := j.agent().Kill(ctx, job); err != nil {
			l.Add(err)
			continue
		}
		fmt.Fprintf(j.env.Stdout, "job %s is killed\n", job)
	}
	return l.All("kill", strings.Join(jobs, " "))
}
