package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/labport"
	"mosimg/qemu-tests/lab"
	"mosimg/qemu-tests/scenario"
	"mosimg/qemu-tests/vm"
	"mosimg/qemu-tests/vswitch"
)

// labCmd is what the sub-verbs of `mosimg lab` share.
type labCmd struct {
	env *Env

	images, dir, link, firmware, nic string
	nodes, nodeMB, headMB            int
	keep, dryRun, asJSON             bool
}

// newLabCmd is `mosimg lab`: a whole cluster in virtual machines.
func newLabCmd(env *Env) *cobra.Command {
	l := &labCmd{env: env}
	c := &cobra.Command{
		Use:   "lab",
		Short: "Run a whole cluster in virtual machines on this computer",
		Long: `Lab starts a head and diskless nodes in QEMU, on a network switch of its own.
It needs no root, uses KVM when this computer has it, and never touches the
computer's own network. MOSIMG_NO_KVM=1 in the environment forces emulation.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(l.upCmd(), l.downCmd(), l.statusCmd(), l.execCmd(), l.runCmd(), l.demoCmd(), l.serveCmd())
	return c
}

// machineFlags are those of verbs that start machines.
func (l *labCmd) machineFlags(c *cobra.Command, dirHelp string) {
	f := c.Flags()
	f.StringVar(&l.images, "images", "out", "image set to boot: the folder that mosimg build wrote")
	f.StringVar(&l.dir, "dir", "", dirHelp)
	f.StringVar(&l.link, "link", "", "each machine's network link: 10mbit, 100mbit, 1gbit, or with more as in 100mbit,delay=5ms,loss=1% (default unlimited)")
	f.IntVar(&l.nodeMB, "memory", 0, "MiB of memory of each node (default 512)")
	f.IntVar(&l.headMB, "head-memory", 0, "MiB of memory of the head (default 768)")
	f.BoolVar(&l.keep, "keep", false, "keep consoles, capture and command lines on success, too")
	f.BoolVar(&l.dryRun, "dry-run", false, "print the QEMU commands and start nothing")
}

const dirFlag = "folder of the lab (default " + "$XDG_STATE_HOME/mosimg/lab)"

// defaultLabDir is where `lab up` puts its lab, so that the other verbs find it.
func defaultLabDir() (string, error) {
	state := os.Getenv("XDG_STATE_HOME")
	if state == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fault.New(fault.Environment, "find the lab's folder", "", err, "name one with --dir")
		}
		state = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(state, "mosimg", "lab"), nil
}

func (l *labCmd) folder() (string, error) {
	if l.dir != "" {
		return filepath.Abs(l.dir)
	}
	return defaultLabDir()
}

// config makes a lab's configuration from the flags; nodes are the machines
// before the flags that are about all of them.
func (l *labCmd) config(nodes []lab.NodeConfig) (lab.Config, error) {
	var bad fault.List
	link, err := vswitch.ParseLink(l.link)
	bad.Add(err)
	for name, mb := range map[string]int{"--memory": l.nodeMB, "--head-memory": l.headMB} {
		if mb < 0 {
			bad.Addf("%s %d is not a number of MiB", name, mb)
		}
	}
	if err := bad.Err(fault.Usage, "read flags of", "mosimg lab", ""); err != nil {
		return lab.Config{}, err
	}
	images, err := filepath.Abs(l.images)
	if err != nil {
		return lab.Config{}, err
	}
	for i := range nodes {
		nodes[i].Link = link
		nodes[i].MemoryMB = l.nodeMB
	}
	return lab.Config{Images: images, Dir: l.dir, Nodes: nodes, HeadMB: l.headMB, Link: link, Keep: l.keep}, nil
}

// plan prints what would be run.
func (l *labCmd) plan(c lab.Config) error {
	lines, err := lab.Plan(c)
	if err != nil {
		return err
	}
	for _, argv := range lines {
		fmt.Fprintln(l.env.Stdout, lab.ShellQuote(argv))
	}
	return nil
}

func (l *labCmd) upCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "up",
		Short: "Start a lab that stays until lab down",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(c *cobra.Command, _ []string) error { return l.up(c.Context()) },
	}
	l.machineFlags(c, dirFlag)
	f := c.Flags()
	f.IntVarP(&l.nodes, "nodes", "n", 2, "how many diskless nodes")
	f.StringVar(&l.firmware, "firmware", string(vm.BIOS), "firmware of the nodes: bios or uefi")
	f.StringVar(&l.nic, "nic", "", "network card of the nodes: "+strings.Join(vm.NICs(), ", ")+" (default virtio-net-pci)")
	return c
}

func (l *labCmd) up(ctx context.Context) error {
	firmware, err := vm.ParseFirmware(l.firmware)
	if err != nil {
		return fault.New(fault.Usage, "start lab", "--firmware", err, "")
	}
	if l.nodes < 0 || l.nodes > 99 {
		return fault.New(fault.Usage, "start lab", "", fmt.Sprintf("-n %d is not within 0 and 99", l.nodes), "")
	}
	if l.dir, err = l.folder(); err != nil {
		return err
	}
	cfg, err := l.config(lab.Nodes(l.nodes, lab.NodeConfig{Firmware: firmware, NIC: l.nic}))
	if err != nil {
		return err
	}
	if l.dryRun {
		return l.plan(cfg)
	}
	// Refused here rather than in the other process: what is missing does
	// not need one to be told.
	if err := lab.Check(cfg); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fault.New(fault.Environment, "start lab", "", err, "")
	}
	ctx, release := holdSignals(ctx)
	defer release()
	kept, err := lab.Detach(ctx, []string{self, "lab", serveVerb}, cfg, l.env.Stderr)
	if lab.Interrupted(err) {
		return errInterrupted
	}
	if err != nil {
		return failed(err, kept)
	}
	suffix := ""
	if d, err := defaultLabDir(); err != nil || d != l.dir {
		suffix = " --dir " + l.dir
	}
	fmt.Fprintf(l.env.Stdout, "lab is up: a head and %d nodes, in %s\n  mosimg lab exec%s head -- mosmon --once\n  mosimg lab down%s\n", l.nodes, l.dir, suffix, suffix)
	return nil
}

var errInterrupted = errors.New("interrupted; everything is switched off and removed")

// failed adds to a failure where its evidence is.
func failed(err error, kept string) error {
	if kept == "" {
		return err
	}
	return fault.New(fault.KindOf(err), "lab", "failed", err, "consoles, capture and command lines are in "+kept)
}

// holdSignals keeps a second Ctrl-C, or a closed terminal, from ending this
// process before it has cleaned up. Each clean-up step is bounded in time.
func holdSignals(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for range ch {
			cancel()
		}
	}()
	return ctx, func() {
		signal.Stop(ch)
		close(ch)
		cancel()
	}
}

// serveVerb is the hidden verb that `lab up` runs detached.
const serveVerb = "serve-detached"

func (l *labCmd) serveCmd() *cobra.Command {
	return &cobra.Command{
		Use: serveVerb, Hidden: true, Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, release := holdSignals(c.Context())
			defer release()
			return lab.Serve(ctx, os.Stdin)
		},
	}
}

func (l *labCmd) downCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "down",
		Short: "Stop a lab and remove what it made",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			dir, err := l.folder()
			if err != nil {
				return err
			}
			ran, err := lab.Down(dir)
			if err != nil {
				return err
			}
			if ran {
				fmt.Fprintln(l.env.Stdout, "lab is down")
			} else {
				fmt.Fprintln(l.env.Stdout, "no lab was running; its remains are removed")
			}
			return nil
		},
	}
	c.Flags().StringVar(&l.dir, "dir", "", dirFlag)
	return c
}

// labStatus is what `lab status` shows.
type labStatus struct {
	*lab.State
	Running bool             `json:"running"`
	Nodes   []api.NodeRecord `json:"nodes,omitempty"`      // as the head lists them
	Head    string           `json:"head_error,omitempty"` // why it could not be asked
}

func (l *labCmd) statusCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "status",
		Short: "Show a lab's machines",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(c *cobra.Command, _ []string) error { return l.status(c.Context()) },
	}
	c.Flags().StringVar(&l.dir, "dir", "", dirFlag)
	c.Flags().BoolVar(&l.asJSON, "json", false, "print JSON")
	return c
}

// statusWait is how long `lab status` waits for the head's answer.
const statusWait = 10 * time.Second

func (l *labCmd) status(ctx context.Context) error {
	dir, err := l.folder()
	if err != nil {
		return err
	}
	state, err := lab.ReadState(dir)
	if err != nil {
		return err
	}
	s := labStatus{State: state, Running: state.Process.Alive()}
	if s.Running {
		ctx, cancel := context.WithTimeout(ctx, statusWait)
		defer cancel()
		if s.Nodes, err = lab.AskHead(ctx, state); err != nil {
			s.Head = err.Error()
		}
	}
	if l.asJSON {
		return printJSON(l.env.Stdout, s)
	}
	phase := string(s.Phase)
	if !s.Running {
		phase += ", not running"
	}
	fmt.Fprintf(l.env.Stdout, "lab in %s: %s\n", dir, phase)
	if s.Error != "" {
		fmt.Fprintf(l.env.Stdout, "failed: %s\n", s.Error)
	}
	t := tabwriter.NewWriter(l.env.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "MACHINE\tMAC\tFIRMWARE\tPROCESS\tNODE\tSTATE\tLIVENESS")
	for _, m := range s.Machines {
		process, firmware := "off", string(m.Firmware)
		if m.Process.Alive() {
			process = fmt.Sprint(m.Process.PID)
		}
		if firmware == "" {
			firmware = "-"
		}
		rec := api.NodeRecord{State: "-", Liveness: "-"}
		for _, n := range s.Nodes {
			if n.MAC == m.MAC {
				rec = n
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", m.Name, m.MAC, firmware, process, rec.Node, rec.State, rec.Liveness)
	}
	t.Flush()
	if s.Head != "" {
		fmt.Fprintf(l.env.Stderr, "the head did not answer: %s\n", s.Head)
	}
	return nil
}

func (l *labCmd) execCmd() *cobra.Command {
	var user, workdir string
	c := &cobra.Command{
		Use:   "exec head -- COMMAND [ARG...]",
		Short: "Run a command on the lab's head",
		Example: `  mosimg lab exec head -- mosimg node ls
  mosimg lab exec --user demo head -- sh -c 'id; uname -r'`,
		Args: usageArgs(cobra.MinimumNArgs(2)),
		RunE: func(c *cobra.Command, args []string) error {
			if args[1] == "--" {
				args = append(args[:1:1], args[2:]...)
			}
			if len(args) < 2 {
				return fault.New(fault.Usage, "run on", args[0], "no command given", "see: mosimg lab exec --help")
			}
			return l.exec(c.Context(), args[0], labport.Cmd{Argv: args[1:], User: user, Dir: workdir})
		},
	}
	c.Flags().SetInterspersed(false)
	c.Flags().StringVar(&l.dir, "dir", "", dirFlag)
	c.Flags().StringVar(&user, "user", "", "user to run it as (default root)")
	c.Flags().StringVar(&workdir, "workdir", "", "folder to run it in (default the user's home)")
	return c
}

func (l *labCmd) exec(ctx context.Context, machine string, cmd labport.Cmd) error {
	if machine != lab.HeadName {
		return fault.New(fault.Usage, "run on", machine, "only the head runs commands for the lab", "name the machine head; from there the cluster's own tools reach the nodes")
	}
	dir, err := l.folder()
	if err != nil {
		return err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = l.env.Stdin, l.env.Stdout, l.env.Stderr
	exit, err := lab.RunOnHead(ctx, dir, cmd)
	if err != nil {
		return err
	}
	if exit.Signal != "" {
		fmt.Fprintf(l.env.Stderr, "mosimg: %s ended by %s\n", cmd.Argv[0], exit.Signal)
	}
	if exit.Status != 0 {
		return exitStatus(exit.Status)
	}
	return nil
}

func (l *labCmd) runCmd() *cobra.Command {
	var list bool
	c := &cobra.Command{
		Use:   "run SCENARIO... | --list",
		Short: "Play scenarios in a lab of their own",
		Args:  usageArgs(cobra.ArbitraryArgs),
		RunE: func(c *cobra.Command, args []string) error {
			if list {
				return l.list()
			}
			if len(args) == 0 {
				return fault.New(fault.Usage, "run", "scenario", "none is named", "see: mosimg lab run --list")
			}
			return l.play(c.Context(), args)
		},
	}
	l.machineFlags(c, "folder of the lab (default a temporary one)")
	c.Flags().BoolVar(&list, "list", false, "list the scenarios")
	c.Flags().BoolVar(&l.asJSON, "json", false, "print JSON")
	return c
}

func (l *labCmd) list() error {
	if l.asJSON {
		type line struct {
			Name string `json:"name"`
			Doc  string `json:"doc"`
		}
		var all []line
		for _, s := range scenario.All() {
			all = append(all, line{s.Name, s.Doc})
		}
		return printJSON(l.env.Stdout, all)
	}
	t := tabwriter.NewWriter(l.env.Stdout, 0, 0, 2, ' ', 0)
	for _, s := range scenario.All() {
		fmt.Fprintf(t, "%s\t%s\n", s.Name, s.Doc)
	}
	return t.Flush()
}

func (l *labCmd) demoCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "demo",
		Short: "Show a head and its nodes from power-on to members",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(c *cobra.Command, _ []string) error { return l.play(c.Context(), []string{"demo"}) },
	}
	l.machineFlags(c, "folder of the lab (default a temporary one)")
	c.Flags().BoolVar(&l.asJSON, "json", false, "print JSON")
	return c
}

// play runs scenarios, one after the other, in one lab.
func (l *labCmd) play(ctx context.Context, names []string) error {
	var todo []scenario.Scenario
	for _, n := range names {
		s, err := scenario.Find(n)
		if err != nil {
			return err
		}
		todo = append(todo, s)
	}
	cfg, err := l.config(scenario.Machines())
	if err != nil {
		return err
	}
	if l.dryRun {
		return l.plan(cfg)
	}
	ctx, release := holdSignals(ctx)
	defer release()
	lb, err := lab.New(cfg, l.env.Stderr, nil)
	if err != nil {
		return err
	}
	run := &scenario.Run{Lab: lb, Out: l.env.Stdout}
	if l.asJSON {
		run.Out = io.Discard
	}
	for _, s := range todo {
		if err = run.Play(ctx, s); err != nil {
			break
		}
	}
	if lab.Interrupted(err) {
		lb.Close(nil)
		return errInterrupted
	}
	kept := lb.Close(err)
	if l.asJSON {
		if e := run.JSON(l.env.Stdout, err); e != nil && err == nil {
			err = e
		}
	} else {
		run.Table(l.env.Stdout)
	}
	if err != nil {
		return fault.New(fault.Internal, "play", strings.Join(names, ", "), err, "consoles, capture and command lines are in "+kept)
	}
	if kept != "" {
		fmt.Fprintf(l.env.Stderr, "kept in %s\n", kept)
	}
	return nil
}
