package nodecli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// modePoll is how often expel and bring look whether they are done.
const modePoll = 500 * time.Millisecond

// modeTell is how often they say the same again.
const modeTell = 10 * time.Second

// modeVerb is a word of MOSIX's mosctl that changes what this node does with jobs.
type modeVerb struct {
	name, short string
	change      api.ModeChange
	// left, if set, is what is waited for: until it is 0.
	left func(api.ModeStatus) int
	what string // is left
}

// yes and no are what a modeVerb changes something to.
var yes, no = boolean(true), boolean(false)

func boolean(b bool) *bool { return &b }

var modeVerbs = []modeVerb{
	{name: "block", short: "Take no guests", change: api.ModeChange{Blocked: yes}},
	{name: "noblock", short: "Take guests (again)", change: api.ModeChange{Blocked: no, Leaving: no}},
	{name: "stay", short: "Let no job leave this node by itself", change: api.ModeChange{Stay: yes}},
	{name: "nostay", short: "Let jobs leave this node (again)", change: api.ModeChange{Stay: no}},
	{name: "lstay", short: "Let none of this home's jobs leave home by itself", change: api.ModeChange{LocalStay: yes}},
	{name: "nolstay", short: "Let this home's jobs leave it (again)", change: api.ModeChange{LocalStay: no, Bringing: no}},
	{name: "expel", short: "Send all guests away and wait until they have left; then take none, as after block",
		change: api.ModeChange{Blocked: yes, Leaving: yes}, left: func(s api.ModeStatus) int { return s.Guests }, what: "guests are left"},
	{name: "bring", short: "Fetch this home's jobs and wait until all are here; then keep them, as after lstay",
		change: api.ModeChange{LocalStay: yes, Bringing: yes}, left: func(s api.ModeStatus) int { return s.Away }, what: "jobs are away"},
}

// mosctlModeVerbs are those as commands.
func mosctlModeVerbs(env *Env) []*cobra.Command {
	var list []*cobra.Command
	for _, v := range modeVerbs {
		var socket string
		cmd := &cobra.Command{
			Use:   v.name,
			Short: v.short,
			Args:  usageArgs(cobra.NoArgs),
			RunE: func(c *cobra.Command, _ []string) error {
				return v.run(c.Context(), env, unixhttp.New(socket, "agent"))
			},
		}
		cmd.Flags().StringVar(&socket, "socket", api.AgentSocket, "the agent's unix socket")
		list = append(list, cmd)
	}
	return list
}

func (v modeVerb) run(ctx context.Context, env *Env, agent *unixhttp.Client) error {
	ask := func(f func(context.Context, *api.ModeStatus) error) (st api.ModeStatus, err error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return st, f(ctx, &st)
	}
	st, err := ask(func(ctx context.Context, st *api.ModeStatus) error {
		return agent.Post(ctx, api.PathMode, v.change, st)
	})
	if err != nil {
		return err
	}
	if v.left == nil {
		return nil
	}
	told, when := 0, time.Time{}
	for v.left(st) > 0 {
		if n := v.left(st); n != told || time.Since(when) > modeTell {
			told, when = n, time.Now()
			fmt.Fprint(env.Stderr, v.progress(st))
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.Unavailable, v.name, "jobs", fmt.Sprintf("%d %s", v.left(st), v.what), "it goes on without you")
		case <-time.After(modePoll):
		}
		next, err := ask(func(ctx context.Context, st *api.ModeStatus) error { return agent.Get(ctx, api.PathMode, st) })
		switch {
		case err == nil:
			st = next
		case ctx.Err() == nil:
			return err
		}
	}
	return nil
}

// progress is how many jobs are left, and why those that cannot move.
func (v modeVerb) progress(st api.ModeStatus) string {
	var text strings.Builder
	fmt.Fprintf(&text, "mosctl %s: %d %s\n", v.name, v.left(st), v.what)
	for _, job := range slices.Sorted(maps.Keys(st.Why)) {
		if why := st.Why[job]; why != "" {
			fmt.Fprintf(&text, "  %s: %s\n", job, why)
		}
	}
	return text.String()
}
