package scenario

import (
	"context"
	"fmt"
	"slices"

	"mosimg/internal/api"
	"mosimg/qemu-tests/lab"
)

func headRestart(ctx context.Context, r *Run) error {
	for _, name := range []string{bios, uefi} {
		if _, err := r.member(ctx, name); err != nil {
			return err
		}
	}
	before, err := r.memory(ctx)
	if err != nil {
		return err
	}
	err = r.step("the head's process is killed and comes back", func() (string, error) {
		pid, err := r.killHead(ctx)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("process %d", pid), r.unharmed(ctx, before)
	})
	if err != nil {
		return err
	}
	return r.step("the head's machine loses power and comes back", func() (string, error) {
		r.Lab.Head().PowerOff()
		if err := r.Lab.StartHead(ctx); err != nil {
			return "", err
		}
		return "", r.unharmed(ctx, before)
	})
}

// kept is what a head must never forget about a machine.
type kept struct {
	Node        api.NodeID
	Name        string
	MAC         string
	Address     string
	State       api.NodeState
	Role        string
	Fingerprint string
}

// memory is what the head remembers of the machines that are not heads. Its
// own agent is diskless too and has a new key after each boot.
func (r *Run) memory(ctx context.Context) ([]kept, error) {
	v, err := r.view(ctx)
	if err != nil {
		return nil, err
	}
	return remembered(v), nil
}

func remembered(v lab.View) []kept {
	var all []kept
	for _, n := range v.Nodes {
		if n.Role == "head" {
			n.Fingerprint = ""
		}
		all = append(all, kept{n.Node, n.Name, n.MAC, n.Address, n.State, n.Role, n.Fingerprint})
	}
	slices.SortFunc(all, func(a, b kept) int { return int(a.Node) - int(b.Node) })
	return all
}

// unharmed waits until every member is one again. A node keeps its key only
// if it did not reboot, and talks to the head only if the head's authority is
// the one it was booted with: so equal fingerprints of living members mean
// that the authority, the approvals and the certificates were kept.
func (r *Run) unharmed(ctx context.Context, before []kept) error {
	nodes := []*lab.Machine{r.Lab.Head(), r.Lab.Machine(bios), r.Lab.Machine(uefi)}
	return r.Lab.Until(ctx, "everything is as before the restart", func(v lab.View) (string, error) {
		if v.Err != nil {
			return "the head is not back", nil
		}
		if now := remembered(v); !slices.Equal(before, now) {
			return fmt.Sprintf("the head remembered %+v and now says %+v", before, now), nil
		}
		for _, m := range nodes {
			x, ok := v.Member(m)
			if !ok || x.Liveness != api.Alive || x.Load == nil || x.AgeMillis > 5000 {
				return fmt.Sprintf("%s is not heard: %+v", m.Name(), x), nil
			}
		}
		return "", nil
	})
}

// killHead kills the head's process, and returns its number.
func (r *Run) killHead(ctx context.Context) (int, error) {
	pids, err := r.Lab.Processes(ctx, "mosimg", "head")
	if err != nil {
		return 0, err
	}
	if len(pids) != 1 {
		return 0, fmt.Errorf("the head runs %d processes `mosimg head`; want 1", len(pids))
	}
	_, err = r.Lab.Output(ctx, "sh", "-c", fmt.Sprintf("kill -9 %d", pids[0]))
	return pids[0], err
}
