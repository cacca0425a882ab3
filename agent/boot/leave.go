package boot

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/unixhttp"
)

const (
	// leaveLimit is how long the machine's end waits for its guests to leave: a
	// second press of the button, or a second signal, ends the wait.
	leaveLimit = time.Minute
	leavePoll  = 250 * time.Millisecond
	leaveAsk   = 2 * time.Second // an agent that hangs holds up nothing
)

// sendGuestsAway lets the jobs of other machines that run here go on elsewhere,
// before the machine ends and they with it.
func sendGuestsAway(ctx context.Context, agent *unixhttp.Client, log *slog.Logger) {
	ask := func(f func(context.Context, *api.ModeStatus) error) (st api.ModeStatus, err error) {
		ctx, cancel := context.WithTimeout(ctx, leaveAsk)
		defer cancel()
		return st, f(ctx, &st)
	}
	leaving := true
	st, err := ask(func(ctx context.Context, st *api.ModeStatus) error {
		return agent.Post(ctx, api.PathMode, api.ModeChange{Leaving: &leaving}, st)
	})
	if err != nil {
		log.Warn("guests are not sent away", "why", err)
		return
	}
	for told := 0; st.Guests > 0; {
		if st.Guests != told {
			told = st.Guests
			log.Info("guests leave first", "left", st.Guests, "hurry", "press the button again")
		}
		select {
		case <-ctx.Done():
			log.Warn("guests end with this machine", "left", st.Guests, "why", fmt.Sprint(st.Why))
			return
		case <-time.After(leavePoll):
		}
		next, err := ask(func(ctx context.Context, st *api.ModeStatus) error { return agent.Get(ctx, api.PathMode, st) })
		if err != nil {
			if ctx.Err() != nil {
				continue
			}
			log.Warn("whether guests are left is not known", "why", err)
			return
		}
		st = next
	}
}
