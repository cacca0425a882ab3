// Package cli is the mosimg command as a library: one file for each verb.
// Results go to stdout, everything else to stderr, and the exit status says
// what kind of failure it was (internal/fault).
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"mosimg/internal/fault"
	"mosimg/internal/version"
)

// Env is what a command sees of the world, so that tests can run it inside
// the test process.
type Env struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	Args   []string // without the program's name
}

// OS is the environment of this process.
func OS() *Env {
	return &Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Args: os.Args[1:]}
}

// Main runs the command and returns its exit status. INT and TERM cancel the
// context once; a second one ends the process at once.
func Main(ctx context.Context, env *Env) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop)
	root := newRoot(env)
	root.SetArgs(env.Args)
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var status exitStatus
	if errors.As(err, &status) {
		return int(status)
	}
	fmt.Fprintln(env.Stderr, "mosimg:", err)
	return fault.ExitStatus(err)
}

// exitStatus ends the command with the status of a command that it ran, which
// has said what there was to say.
type exitStatus int

func (s exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// newRoot is the whole tree of verbs, in the order of a first session.
func newRoot(env *Env) *cobra.Command {
	root := &cobra.Command{
		Use:   "mosimg",
		Short: "Turn spare PCs into one computer",
		Long: `mosimg builds a small bootable image with a migration agent in it, serves it to
diskless machines over DHCP, TFTP and HTTP, and shows the cluster they form.`,
		Version:           version.String(),
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
		Args:              usageArgs(cobra.NoArgs),
		RunE:              func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return fault.New(fault.Usage, "read flags of", c.CommandPath(), err, "see: "+c.CommandPath()+" --help")
	})
	for _, verb := range []func(*Env) *cobra.Command{
		newBuildCmd,
		newImageCmd,
		newHeadCmd,
		newNodeCmd,
		newJobCmd,
		newLabCmd,
		newCRIUCmd,
		newBenchCmd,
		newTickerCmd,
		newBenchWorkCmd,
		newHomefsInsideCmd,
		newServingInsideCmd,
		newServingServerCmd,
		newKeeperCmd,
		newMountCmd,
	} {
		root.AddCommand(verb(env))
	}
	return root
}

// usageArgs makes a wrong number of arguments a fault of kind Usage.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return fault.New(fault.Usage, "read arguments of", c.CommandPath(), err, "see: "+c.CommandPath()+" --help")
		}
		return nil
	}
}

// printJSON writes a result for --json.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
