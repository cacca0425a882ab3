package cli

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mosimg/internal/bootargs"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/qemu-tests/lab"
	"mosimg/qemu-tests/vm"
)

// newBenchBootCmd is `mosimg bench boot`: a network boot beside a boot of the
// same kernel and initramfs that QEMU puts into memory.
func newBenchBootCmd(env *Env) *cobra.Command {
	var images string
	var runs int
	var asJSON bool
	c := &cobra.Command{
		Use:   "boot",
		Short: "Seconds from power on to the head's door: PXE beside direct kernel boot",
		Long: `Boot switches one machine after the other on in a lab: by PXE with BIOS, by PXE
with UEFI, and with kernel and initramfs given by QEMU (no firmware, no network
boot). The clock stops at the first packet to the head's API, since a machine
that was not booted by the head is not let in; for PXE it stops once more when
the machine is a member.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if runs < 1 {
				return fault.New(fault.Usage, "read flags of", "mosimg bench boot", "--runs must be 1 or more", "")
			}
			dir, err := filepath.Abs(images)
			if err != nil {
				return err
			}
			all, err := benchBoot(c.Context(), env, dir, runs)
			if err != nil {
				return err
			}
			return printBench(env, all, asJSON)
		},
	}
	f := c.Flags()
	f.StringVar(&images, "images", "out", "image set to boot")
	f.IntVar(&runs, "runs", 3, "boots of each kind")
	f.BoolVar(&asJSON, "json", false, "print the rows as JSON")
	return c
}

func benchBoot(ctx context.Context, env *Env, images string, runs int) (all []*pairs, err error) {
	set, err := imageset.Open(images)
	if err != nil {
		return nil, err
	}
	// The direct machine knows everything but a nonce and a CA: it gets as
	// far as the head's door.
	direct := bootargs.Args{Role: "node", Head: "https://" + strings.Split(lab.HeadAddress, "/")[0] + ":4660",
		CA: "sha256:" + strings.Repeat("0", 64), Nonce: "none", Image: set.Manifest.ID, BootMAC: lab.NodeMAC(3)}
	words := append([]string{"console=ttyS0"}, set.Manifest.KernelArgs...)
	cfg := lab.Config{Images: images, Nodes: []lab.NodeConfig{
		{Name: "bios", Firmware: vm.BIOS},
		{Name: "uefi", Firmware: vm.UEFI},
		{Name: "direct", Args: strings.Join(append(words, direct.Words()...), " ")},
	}}
	lb, err := lab.New(cfg, env.Stderr, nil)
	if err != nil {
		return nil, err
	}
	defer func() { lb.Close(err) }()
	if err := lb.StartHead(ctx); err != nil {
		return nil, err
	}
	if err := lb.Adopt(ctx, 2, time.Hour); err != nil {
		return nil, err
	}
	const peer = "qemu -kernel -initrd, same image"
	door := map[string]*pairs{}
	member := map[string]*pairs{}
	for _, name := range []string{"bios", "uefi"} {
		door[name] = &pairs{name: "boot-" + name + "-to-head", unit: "s", peerName: peer}
		member[name] = &pairs{name: "boot-" + name + "-to-member", unit: "s", peerName: peer + ", to head"}
		all = append(all, door[name], member[name])
	}
	for range runs {
		d, err := bootOnce(ctx, lb, "direct", false)
		if err != nil {
			return nil, err
		}
		for _, name := range []string{"bios", "uefi"} {
			b, err := bootOnce(ctx, lb, name, true)
			if err != nil {
				return nil, err
			}
			door[name].add(b.door, d.door)
			member[name].add(b.member, d.door)
		}
	}
	return all, nil
}

// bootTimes are seconds since power on.
type bootTimes struct{ door, member float64 }

// bootOnce boots a machine that is off and switches it off again.
func bootOnce(ctx context.Context, lb *lab.Lab, name string, joins bool) (bootTimes, error) {
	m := lb.Machine(name)
	if err := m.PowerOn(ctx); err != nil {
		return bootTimes{}, err
	}
	defer m.PowerOff()
	if err := m.AwaitStage(ctx, lab.Enrolling); err != nil {
		return bootTimes{}, err
	}
	t := bootTimes{door: m.Took(lab.Enrolling).Seconds()}
	if !joins {
		return t, nil
	}
	if _, err := lb.AwaitMember(ctx, m); err != nil {
		return t, err
	}
	t.member = m.Joined().Seconds()
	return t, nil
}
