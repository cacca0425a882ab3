// Package trace is the boot trace: one log line for each stage that a machine
// passes on its way from the first DHCP packet to membership. The stages of
// one machine share its MAC, so `grep MAC` tells its story.
package trace

import "log/slog"

// Stage is a step of a boot, in this order.
type Stage string

const (
	Discover Stage = "discover" // first DHCP packet
	Offer    Stage = "offer"    // an address and what to boot
	Lease    Stage = "lease"    // the address is given
	// BootServer: UEFI asked port 4011 again, after a proxy offer.
	BootServer Stage = "boot-server"
	TFTP       Stage = "tftp"      // a boot loader was fetched by TFTP
	Loader     Stage = "loader"    // a boot loader was fetched by HTTP
	Script     Stage = "script"    // the machine's iPXE script was fetched
	Kernel     Stage = "kernel"    // the kernel was fetched
	Initramfs  Stage = "initramfs" // the initramfs was fetched
	Enrol      Stage = "enrol"     // the agent asked to be let in
	Member     Stage = "member"    // the agent polled as a member
)

// Event writes one stage of the machine with this MAC. mac may be "" when the
// machine is known by its address only.
func Event(log *slog.Logger, stage Stage, mac string, args ...any) {
	if log == nil {
		return
	}
	log.Info("boot", append([]any{slog.String("stage", string(stage)), slog.String("mac", mac)}, args...)...)
}
