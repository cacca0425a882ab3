package scenario

import (
	"context"
	"fmt"

	"mosimg/internal/api"
	"mosimg/qemu-tests/lab"
)

// demo is the tour that `make demo` gives.
func demo(ctx context.Context, r *Run) error {
	if err := r.head(ctx); err != nil {
		return err
	}
	if err := r.step("adoption window for two machines", func() (string, error) {
		return "", r.Lab.Adopt(ctx, 2, adoption)
	}); err != nil {
		return err
	}
	if err := r.step("a BIOS and a UEFI machine boot by PXE and join", func() (string, error) { return r.joinBoth(ctx) }); err != nil {
		return err
	}
	if err := r.step("three machines with their loads", func() (string, error) { return r.threeWithLoads(ctx) }); err != nil {
		return err
	}
	m := r.Lab.Machine(fourth)
	if err := r.pending(ctx, m); err != nil {
		return err
	}
	if err := r.show(ctx, "mosimg", "node", "ls"); err != nil {
		return err
	}
	if err := r.step(fourth+" is approved and joins", func() (string, error) {
		if err := r.Lab.Approve(ctx, m); err != nil {
			return "", err
		}
		rec, err := r.Lab.AwaitMember(ctx, m)
		return fmt.Sprintf("node %d", rec.Node), err
	}); err != nil {
		return err
	}
	if err := r.powerCycle(ctx, bios); err != nil {
		return err
	}
	return r.show(ctx, "mosmon", "--once")
}

// joinBoth boots the first two nodes at once.
func (r *Run) joinBoth(ctx context.Context) (string, error) {
	n1, n2 := r.Lab.Machine(bios), r.Lab.Machine(uefi)
	if err := r.Lab.JoinAll(ctx, n1, n2); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s after %.0f s, %s after %.0f s", n1.Firmware(), n1.Joined().Seconds(), n2.Firmware(), n2.Joined().Seconds()), nil
}

// threeWithLoads shows the cluster through its own tools, and checks what
// they show.
func (r *Run) threeWithLoads(ctx context.Context) (string, error) {
	machines := []*lab.Machine{r.Lab.Head(), r.Lab.Machine(bios), r.Lab.Machine(uefi)}
	err := r.Lab.Until(ctx, "three machines show their loads", func(v lab.View) (string, error) {
		for _, m := range machines {
			x, ok := v.Member(m)
			switch {
			case !ok || x.Liveness != api.Alive:
				return m.Name() + " is not shown as alive", nil
			case x.Load == nil || x.Load.CPUs < 1 || x.Load.MemTotal <= 0:
				return fmt.Sprintf("%s's load is %+v", m.Name(), x.Load), nil
			}
		}
		return "", nil
	})
	if err != nil {
		return "", err
	}
	if err := r.show(ctx, "mosimg", "node", "ls"); err != nil {
		return "", err
	}
	return "", r.show(ctx, "mosmon", "--once")
}
