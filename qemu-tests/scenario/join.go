package scenario

import (
	"context"
	"fmt"

	"mosimg/internal/api"
)

func biosJoin(ctx context.Context, r *Run) error { return r.join(ctx, bios) }
func uefiJoin(ctx context.Context, r *Run) error { return r.join(ctx, uefi) }

// join boots a machine and checks what the cluster knows of it then.
func (r *Run) join(ctx context.Context, name string) error {
	rec, err := r.member(ctx, name)
	if err != nil {
		return err
	}
	set := r.Lab.Set()
	switch {
	case rec.Node < 2:
		return fmt.Errorf("%s is node %d; want a number after the head's", name, rec.Node)
	case rec.Role != "node":
		return fmt.Errorf("%s has role %q; want node", name, rec.Role)
	case rec.Image != set.Manifest.ID:
		return fmt.Errorf("%s says that it runs image %.12s; it was offered %.12s", name, rec.Image, set.Manifest.ID)
	case rec.Fingerprint == "" || rec.Address == "":
		return fmt.Errorf("%s has fingerprint %q and address %q; want both", name, rec.Fingerprint, rec.Address)
	case rec.Inventory == nil:
		return fmt.Errorf("%s sent no inventory", name)
	case rec.Inventory.Kernel != set.Manifest.KernelRelease:
		return fmt.Errorf("%s runs kernel %s; the image has %s", name, rec.Inventory.Kernel, set.Manifest.KernelRelease)
	case rec.Inventory.MemoryBytes < 128<<20:
		return fmt.Errorf("%s reports %d bytes of memory", name, rec.Inventory.MemoryBytes)
	}
	for _, n := range rec.Inventory.NICs {
		if n.MAC == rec.MAC {
			return r.oneNumberEach(ctx)
		}
	}
	return fmt.Errorf("the card %s that %s booted from is not in its inventory %+v", rec.MAC, name, rec.Inventory.NICs)
}

// oneNumberEach checks that no two machines have the same number.
func (r *Run) oneNumberEach(ctx context.Context) error {
	v, err := r.view(ctx)
	if err != nil {
		return err
	}
	owner := make(map[api.NodeID]string)
	for _, rec := range v.Nodes {
		if rec.Node != 0 && owner[rec.Node] != "" {
			return fmt.Errorf("node number %d belongs to %s and to %s", rec.Node, owner[rec.Node], rec.MAC)
		}
		owner[rec.Node] = rec.MAC
	}
	return nil
}
