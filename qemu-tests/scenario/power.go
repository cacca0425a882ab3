package scenario

import (
	"context"
	"fmt"
	"time"

	"mosimg/internal/api"
)

// deadWithin is how long the cluster may believe in a machine that lost its
// power: failure detection takes a probe, its helpers' probes and a time of
// suspicion.
const deadWithin = 20 * time.Second

func comeBack(ctx context.Context, r *Run) error {
	if _, err := r.member(ctx, bios); err != nil {
		return err
	}
	return r.powerCycle(ctx, bios)
}

// powerCycle takes a member's power away and gives it back.
func (r *Run) powerCycle(ctx context.Context, name string) error {
	m := r.Lab.Machine(name)
	before, err := r.member(ctx, name)
	if err != nil {
		return err
	}
	err = r.step(name+" loses power and is shown dead", func() (string, error) {
		m.PowerOff()
		off := time.Now()
		ctx, cancel := context.WithTimeoutCause(ctx, deadWithin, fmt.Errorf("not after %.0f s", deadWithin.Seconds()))
		defer cancel()
		err := r.Lab.AwaitLiveness(ctx, m, api.Dead)
		return fmt.Sprintf("%.0f s after the power", time.Since(off).Seconds()), err
	})
	if err != nil {
		return err
	}
	return r.step(name+" is switched on and comes back", func() (string, error) {
		if err := m.PowerOn(ctx); err != nil {
			return "", err
		}
		after, err := r.Lab.AwaitMember(ctx, m)
		if err != nil {
			return "", err
		}
		if after.Node != before.Node || after.Name != before.Name {
			return "", fmt.Errorf("%s was node %d (%s) and is now node %d (%s)", name, before.Node, before.Name, after.Node, after.Name)
		}
		if after.Fingerprint == before.Fingerprint {
			return "", fmt.Errorf("%s has the key %s of before: a diskless machine cannot", name, after.Fingerprint)
		}
		return fmt.Sprintf("node %d again", after.Node), nil
	})
}
