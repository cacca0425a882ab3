package nodecli

import (
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"mosimg/agent/boot"
	"mosimg/internal/fault"
)

// newPowerCmd makes the verb that asks process 1 to end this machine.
func newPowerCmd(verb, short string) func(*Env) *cobra.Command {
	return func(*Env) *cobra.Command {
		return &cobra.Command{
			Use:   verb,
			Short: short,
			Args:  usageArgs(cobra.NoArgs),
			RunE: func(*cobra.Command, []string) error {
				// Another init may understand these signals as something else.
				if !boot.IsInit() {
					return fault.New(fault.Refused, verb, "this machine", "its process 1 is not mosimg's init", "use the system's own "+verb)
				}
				if err := unix.Kill(1, boot.SignalFor[verb]); err != nil {
					return fault.New(fault.Refused, verb, "this machine", err, "run this as root")
				}
				return nil
			},
		}
	}
}
