// Package nodecli is the mosagent command as a library: one file for each
// verb. One binary serves as init, agent and user tools, because a diskless
// machine keeps it in memory and pays for it once; the name it is called by
// decides what it does.
package nodecli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
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
	Args   []string // with the program's name
	Pid    int
}

// OS is the environment of this process.
func OS() *Env {
	return &Env{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Args: os.Args, Pid: os.Getpid()}
}

// tools are the verbs that are also programs of their own, by argv[0].
var tools = map[string]bool{
	"init": true, "mosrun": true, "mosps": true, "migrate": true, "mosmon": true, "mosctl": true, "halt": true, "poweroff": true, "reboot": true,
}

// ownSignals are the verbs that look after signals by themselves.
var ownSignals = map[string]bool{"init": true, "mosrun": true}

// verbOf is what a process was asked to do: the arguments for the command
// tree, and the name to show in messages.
func verbOf(args []string, pid int) (name string, verb []string) {
	name = "mosagent"
	if len(args) > 0 {
		name, args = filepath.Base(args[0]), args[1:]
	}
	switch {
	case pid == 1:
		// The kernel passes words of its command line to init; none is ours.
		return "init", []string{"init"}
	case tools[name]:
		return name, append([]string{name}, args...)
	}
	return "mosagent", args
}

// Main runs the command and returns its exit status. INT and TERM cancel the
// context once; a second one ends the process at once.
func Main(ctx context.Context, env *Env) int {
	name, args := verbOf(env.Args, env.Pid)
	if len(args) == 0 || !ownSignals[args[0]] {
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		defer stop()
		context.AfterFunc(ctx, stop)
	}
	root := newRoot(env)
	root.SetArgs(args)
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
	fmt.Fprintf(env.Stderr, "%s: %v\n", name, err)
	return fault.ExitStatus(err)
}

func newRoot(env *Env) *cobra.Command {
	root := &cobra.Command{
		Use:   "mosagent",
		Short: "The program of a mosimg node",
		Long: `mosagent is the program that runs on every node of a mosimg cluster: it boots the
machine (init), makes it a member (agent) and carries the user tools (mosmon).
Called by a tool's name, it is that tool.`,
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
		newAgentCmd,
		newMosrunCmd,
		newMospsCmd,
		newMigrateCmd,
		newMosmonCmd,
		newMosctlCmd,
		newStatusCmd,
		newProbeCRIUCmd,
		newInitCmd,
		newNetCmd,
		newLabportCmd,
		newKeeperCmd,
		newMountCmd,
		newPowerCmd("reboot", "Leave the cluster and restart this machine"),
		newPowerCmd("poweroff", "Leave the cluster and switch this machine off"),
		newPowerCmd("halt", "Leave the cluster and halt this machine"),
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
