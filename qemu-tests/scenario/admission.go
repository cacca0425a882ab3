package scenario

import (
	"context"
	"fmt"
	"time"

	"mosimg/internal/api"
	"mosimg/qemu-tests/lab"
)

// watchTime is how long something is watched that must not happen. A machine
// asks again after at most a few seconds, and gossip spreads in less.
const watchTime = 6 * time.Second

func unapproved(ctx context.Context, r *Run) error {
	if err := r.head(ctx); err != nil {
		return err
	}
	m := r.Lab.Machine(fourth)
	if err := r.pending(ctx, m); err != nil {
		return err
	}
	err := r.step(fourth+" is denied and stays out", func() (string, error) {
		if err := r.Lab.Deny(ctx, m); err != nil {
			return "", err
		}
		return "", r.staysOut(ctx, m, api.Denied)
	})
	if err != nil {
		return err
	}
	return r.step(fourth+" is approved after all and joins", func() (string, error) {
		if err := r.Lab.Approve(ctx, m); err != nil {
			return "", err
		}
		rec, err := r.Lab.AwaitMember(ctx, m)
		return fmt.Sprintf("node %d", rec.Node), err
	})
}

// pending boots a machine that nobody approved and checks that it waits.
func (r *Run) pending(ctx context.Context, m *lab.Machine) error {
	if v, err := r.view(ctx); err != nil {
		return err
	} else if rec, known := v.Record(m); known && rec.State != api.Pending {
		// An earlier scenario let it in: make it a stranger again.
		m.PowerOff()
		if _, err := r.Lab.Output(ctx, "/usr/bin/mosimg", "node", "rm", m.MAC()); err != nil {
			return err
		}
	}
	return r.step(m.Name()+" boots and stays pending", func() (string, error) {
		if m.VM() == nil {
			if err := m.PowerOn(ctx); err != nil {
				return "", err
			}
		}
		if _, err := r.Lab.AwaitState(ctx, m, api.Pending); err != nil {
			return "", err
		}
		return fmt.Sprintf("watched for %.0f s", watchTime.Seconds()), r.staysOut(ctx, m, api.Pending)
	})
}

// staysOut checks for a while that a machine is in a state and no member.
func (r *Run) staysOut(ctx context.Context, m *lab.Machine, state api.NodeState) error {
	err := r.Lab.Until(ctx, fmt.Sprintf("%s is %s", m.Name(), state), func(v lab.View) (string, error) {
		if rec, ok := v.Record(m); !ok || rec.State != state {
			return fmt.Sprintf("the head says %q", rec.State), nil
		}
		return "", nil
	})
	if err != nil {
		return err
	}
	return r.Lab.Never(ctx, watchTime, m.Name()+" got in", func(v lab.View) string {
		if rec, _ := v.Record(m); rec.State != state {
			return fmt.Sprintf("the head says %q, want %s", rec.State, state)
		}
		if x, ok := v.Member(m); ok && x.Liveness != api.Dead && x.Liveness != api.Left {
			return fmt.Sprintf("mosmon shows it as %s", x.Liveness)
		}
		for _, x := range v.Members.Members {
			if rec, _ := v.Record(m); rec.Address != "" && x.Address == rec.Address && x.Liveness == api.Alive {
				return "mosmon shows its address " + x.Address + " as alive"
			}
		}
		return ""
	})
}

func revoked(ctx context.Context, r *Run) error {
	if _, err := r.member(ctx, bios); err != nil { // one who must not suffer
		return err
	}
	rec, err := r.member(ctx, fourth)
	if err != nil {
		return err
	}
	m, bystander := r.Lab.Machine(fourth), r.Lab.Machine(bios)
	err = r.step(fourth+" is thrown out and disappears", func() (string, error) {
		if err := r.Lab.Deny(ctx, m); err != nil {
			return "", err
		}
		return "", r.Lab.Until(ctx, fourth+" is no member any more", func(v lab.View) (string, error) {
			if x, ok := v.Member(m); ok && x.Liveness != api.Dead && x.Liveness != api.Left {
				return fmt.Sprintf("mosmon shows it as %s", x.Liveness), nil
			}
			return "", nil
		})
	})
	if err != nil {
		return err
	}
	return r.step(fourth+"'s gossip is not heard", func() (string, error) {
		if err := m.Running(); err != nil {
			return "", fmt.Errorf("%s must be running for this to mean anything: %w", fourth, err)
		}
		var seq uint64
		return fmt.Sprintf("watched for %.0f s", watchTime.Seconds()),
			r.Lab.Never(ctx, watchTime, fourth+" was heard again", func(v lab.View) string {
				if now, ok := v.Record(m); !ok || now.Node != rec.Node || (now.State != api.Revoked && now.State != api.Denied) {
					return fmt.Sprintf("the head shows it as %+v", now)
				}
				if x, ok := v.Member(bystander); !ok || x.Liveness != api.Alive {
					return fmt.Sprintf("%s suffered: %+v", bios, x)
				}
				x, ok := v.Member(m)
				if !ok {
					return ""
				}
				if x.Liveness == api.Alive {
					return "mosmon shows it as alive"
				}
				if x.Load != nil && seq != 0 && x.Load.Seq > seq {
					return "its load was heard anew"
				} else if x.Load != nil {
					seq = x.Load.Seq
				}
				return ""
			})
	})
}
