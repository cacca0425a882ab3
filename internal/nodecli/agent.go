package nodecli

import (
	"fmt"

	"github.com/spf13/cobra"

	"mosimg/agent"
	"mosimg/agent/console"
	"mosimg/agent/criu"
	"mosimg/agent/migrate"
	"mosimg/agent/netup"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/urgent"
)

func newAgentCmd(env *Env) *cobra.Command {
	var cfg agent.Config
	var show, noKeys bool
	balance, measure := onOff(true), loadOf("auto")
	cmd := &cobra.Command{
		Use:   "agent (--join FILE | --head URL --ca PIN)",
		Short: "Make this machine a node and keep it one",
		Long: `agent enrols this machine at its head, makes it a member of the cluster and keeps
it one until it gets INT or TERM; then it leaves. On a machine that mosimg
booted init starts it. On another host start it as root, on the head with the
ticket that mosimg head leaves:

  mosagent agent --join ` + api.LocalJoin,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if !cfg.OwnMachine {
				cfg.NetStatus = "" // the host has its own network service
				if cfg.JoinFile == "" && (cfg.Head == "" || cfg.CA == "") {
					return fault.New(fault.Usage, "start", "agent", "it does not know its head", "give --join FILE, or --head URL and --ca PIN")
				}
			}
			if show {
				cfg.Consoles = console.Active()
				cfg.Keys = !noKeys
			}
			cfg.NoBalance, cfg.JobsLoad = !bool(balance), measure == "jobs" || measure == "auto" && cfg.OwnMachine
			cfg.Log = newLog(env.Stderr)
			if err := urgent.Raise(); err != nil {
				cfg.Log.Warn("the agent is no more urgent than jobs", "why", err)
			}
			return agent.Run(c.Context(), cfg)
		},
	}
	f := cmd.Flags()
	f.StringVar(&cfg.Head, "head", "", "`URL` of the head API, https://ADDRESS:PORT")
	f.StringVar(&cfg.CA, "ca", "", "`PIN` of the cluster's CA, sha256:HEX")
	f.StringVar(&cfg.Nonce, "nonce", "", "boot nonce that the head gave")
	f.StringVar(&cfg.JoinFile, "join", "", "ticket `FILE` of the head on this machine")
	f.StringVar(&cfg.MAC, "mac", "", "MAC of this node (default: of the card towards the head)")
	f.StringVar(&cfg.Address, "address", "", "address of this node (default: the one towards the head)")
	f.StringVar(&cfg.Image, "image", "", "`ID` of the image set that runs")
	f.StringVar(&cfg.StateDir, "state", api.RunDir+"/agent", "folder for key and membership")
	f.StringVar(&cfg.JobsDir, "jobs", "", "folder for jobs, on tmpfs (default: jobs in the state folder)")
	f.StringVar(&cfg.Cgroup, "cgroup", "", "control group for jobs (default: mosimg, in the cgroup2 mount)")
	f.BoolVar(&cfg.RootJobs, "root-jobs", false, "let root's jobs leave their home, and come here from others")
	f.Var(&balance, "balance", "`on|off`: move jobs, and choose where they start, by the loads of the nodes")
	f.Var(&measure, "load", "`auto|machine|jobs`: what counts as this node's load; auto is jobs on a machine that mosimg booted, else machine")
	f.IntVar(&cfg.Speed, "speed", 0, "speed of a CPU here, 10000 being the reference (default: it is measured)")
	f.DurationVar(&cfg.Lease, "home-lease", migrate.DefaultLease, "how long a guest outlives the silence of its home")
	f.StringVar(&cfg.Socket, "socket", api.AgentSocket, "unix socket for local users")
	f.StringVar(&cfg.NetStatus, "net", netup.StatusFile, "status file of our own network service (with --own-machine)")
	f.BoolVar(&cfg.OwnMachine, "own-machine", false, "mosimg booted this machine: its clock and name may be set")
	f.StringVar(&cfg.Bundle, "criu", "", "folder of the CRIU bundle (default: "+criu.Bundle+", then an installed criu)")
	f.BoolVar(&show, "console", false, "show the status on the consoles")
	f.BoolVar(&noKeys, "no-keys", false, "with --console: leave the keyboard to others")
	return cmd
}

// onOff is a flag of two words.
type onOff bool

func (o *onOff) String() string {
	if *o {
		return "on"
	}
	return "off"
}

func (o *onOff) Set(s string) error {
	if s != "on" && s != "off" {
		return fmt.Errorf("%q is neither on nor off", s)
	}
	*o = s == "on"
	return nil
}

func (*onOff) Type() string { return "on|off" }

// loadOf is what counts as a node's load.
type loadOf string

func (l *loadOf) String() string { return string(*l) }

func (l *loadOf) Set(s string) error {
	if s != "auto" && s != "machine" && s != "jobs" {
		return fmt.Errorf("%q is none of auto, machine and jobs", s)
	}
	*l = loadOf(s)
	return nil
}

func (*loadOf) Type() string { return "auto|machine|jobs" }
