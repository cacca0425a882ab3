package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// drainPoll is how often drain looks whether the guests have left.
const drainPoll = time.Second

func (n *nodeCmd) drainCmd() *cobra.Command {
	var limit time.Duration
	c := &cobra.Command{
		Use:   "drain NODE",
		Short: "Have a machine's guests go on elsewhere, and wait until they have",
		Long: `Drain makes a machine send its guests, the jobs of other machines, to where there is
room, and take none until undrain. It waits until the last has left; then the
machine can be switched off. Jobs that were started on it stay: it is their home.

Exit status: 0 no guest is left, 4 the machine is no member, 5 there is none, 6 it
does not answer, or guests are left after --timeout (mosps -w at their homes says why);
it goes on sending them away.`,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return n.drain(c.Context(), args[0], limit) },
	}
	c.Flags().DurationVar(&limit, "timeout", 5*time.Minute, "how long to wait; 0s is not at all")
	return c
}

func (n *nodeCmd) drain(ctx context.Context, what string, limit time.Duration) error {
	actx, cancel := context.WithTimeout(ctx, askTime)
	var rec api.NodeRecord
	err := n.head().Post(actx, api.PathNodeAct, api.NodeAct{Action: "drain", Node: what}, &rec)
	cancel()
	if err != nil {
		return err
	}
	if limit <= 0 {
		fmt.Fprintf(n.env.Stdout, "%s is %s\n", label(rec), stateWord(rec))
		return nil
	}
	ctx, cancel = context.WithTimeout(ctx, limit)
	defer cancel()
	told := ""
	for {
		left, state, err := n.guests(ctx, rec)
		if err != nil && ctx.Err() == nil {
			return err
		}
		if err == nil && state == "" && left == 0 {
			fmt.Fprintf(n.env.Stdout, "%s has no guests\n", label(rec))
			return nil
		}
		if state == "" {
			state = fmt.Sprintf("%d guests are left", left)
		}
		if state != told && ctx.Err() == nil {
			told = state
			fmt.Fprintf(n.env.Stderr, "%s: %s\n", label(rec), state)
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.Unavailable, "drain", label(rec), told, "it goes on; mosps -w at the guests' homes says why they stay")
		case <-time.After(drainPoll):
		}
	}
}

// guests is how many guests a machine that is leaving still has, or what has to
// happen before that is known.
func (n *nodeCmd) guests(ctx context.Context, rec api.NodeRecord) (left int, state string, err error) {
	var table api.MemberTable
	if err := unixhttp.New(n.agent, "agent").Get(ctx, api.PathMembers, &table); err != nil {
		return 0, "", err
	}
	for _, m := range table.Members {
		switch {
		case m.Node != rec.Node:
			continue
		case m.Liveness == api.Dead || m.Liveness == api.Left:
			return 0, "", fault.New(fault.Unavailable, "drain", label(rec), fmt.Sprintf("it is %s", m.Liveness), "its guests have ended with it; it is drained when it comes back")
		case m.Load == nil || !m.Load.Leaving:
			return 0, "it has not heard of it yet", nil
		}
		return m.Load.Guests, "", nil
	}
	return 0, "", fault.New(fault.Unavailable, "drain", label(rec), "it is not a member now", "it is drained when it comes back")
}
