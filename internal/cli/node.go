package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
	"mosimg/pxe/enrol"
)

// askTime bounds a question to the head or the agent on this machine.
const askTime = 10 * time.Second

// nodeCmd is what the sub-verbs of `mosimg node` share.
type nodeCmd struct {
	env           *Env
	socket, agent string
	asJSON        bool
}

// newNodeCmd is `mosimg node`: look after the machines of the cluster.
func newNodeCmd(env *Env) *cobra.Command {
	n := &nodeCmd{env: env}
	c := &cobra.Command{
		Use:   "node",
		Short: "List, approve, deny, drain, rename and remove machines",
		Long: `Node talks to the head on this machine. NODE is a number, a name, a MAC, or the
beginning of a fingerprint (at least 4 digits) as the machine's console shows it.
Compare fingerprints before you approve: anyone on the boot network can use any
MAC. An alert stays with a machine until it is approved (again).`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	f := c.PersistentFlags()
	f.StringVar(&n.socket, "socket", api.HeadSocket, "admin socket of the head")
	f.StringVar(&n.agent, "agent-socket", api.AgentSocket, "socket of the agent on this machine, which knows who is alive")

	ls := &cobra.Command{
		Use: "ls", Short: "List machines", Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return n.list(c.Context()) },
	}
	show := &cobra.Command{
		Use: "show NODE", Short: "Show all that is known of one machine", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return n.show(c.Context(), args[0]) },
	}
	for _, v := range []*cobra.Command{ls, show} {
		v.Flags().BoolVar(&n.asJSON, "json", false, "print JSON")
	}
	c.AddCommand(ls, show, n.approveCmd(),
		n.actCmd("deny", "Turn machines away; members lose their certificates and the gossip key"),
		n.actCmd("rm", "Forget machines; if they boot again they are new"),
		n.drainCmd(),
		n.actCmd("undrain", "Let drained machines take guests again"))
	c.AddCommand(&cobra.Command{
		Use: "rename NODE NAME", Short: "Give a machine another name", Args: usageArgs(cobra.ExactArgs(2)),
		RunE: func(c *cobra.Command, args []string) error {
			return n.act(c.Context(), api.NodeAct{Action: "rename", Node: args[0], Name: args[1]})
		},
	})
	return c
}

func (n *nodeCmd) approveCmd() *cobra.Command {
	var next int
	var window time.Duration
	c := &cobra.Command{
		Use:   "approve {NODE... | --for D [--next N]}",
		Short: "Let machines in: those named, or those that enrol in the next time",
		Example: `  mosimg node approve 3f2a-91c0
  mosimg node approve --next 8 --for 10m
  mosimg node approve --for 0s          # closes the window`,
		RunE: func(c *cobra.Command, args []string) error {
			asked := c.Flags().Changed("for") || c.Flags().Changed("next")
			switch {
			case asked && len(args) > 0:
				return fault.New(fault.Usage, "approve", strings.Join(args, " "), "machines are named and a window is asked for", "do one after the other")
			case asked && !c.Flags().Changed("for"):
				return fault.New(fault.Usage, "approve", "", "--next without --for", "say for how long, for example --for 10m")
			case asked && c.Flags().Changed("next") && next < 1:
				return fault.New(fault.Usage, "approve", "", fmt.Sprintf("--next %d", next), "want a number from 1")
			case asked:
				return n.adopt(c.Context(), api.Adopt{For: window, Next: next})
			case len(args) == 0:
				return fault.New(fault.Usage, "approve", "", "no machine is named", "see: mosimg node ls")
			}
			return n.actAll(c.Context(), "approve", args)
		},
	}
	c.Flags().DurationVar(&window, "for", 0, "approve machines that enrol within this time")
	c.Flags().IntVar(&next, "next", 0, "at most so many of them")
	return c
}

func (n *nodeCmd) actCmd(action, short string) *cobra.Command {
	return &cobra.Command{
		Use: action + " NODE...", Short: short, Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return n.actAll(c.Context(), action, args) },
	}
}

func (n *nodeCmd) head() *unixhttp.Client { return unixhttp.New(n.socket, "head") }

// actAll does what it can: one unknown machine does not keep the others out.
func (n *nodeCmd) actAll(ctx context.Context, action string, nodes []string) error {
	var l fault.List
	for _, x := range nodes {
		l.Add(n.act(ctx, api.NodeAct{Action: action, Node: x}))
	}
	return l.All(action, "")
}

func (n *nodeCmd) act(ctx context.Context, a api.NodeAct) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	var rec api.NodeRecord
	if err := n.head().Post(ctx, api.PathNodeAct, a, &rec); err != nil {
		return err
	}
	if a.Action == "rm" {
		fmt.Fprintf(n.env.Stdout, "%s removed\n", label(rec))
		return nil
	}
	fmt.Fprintf(n.env.Stdout, "%s is %s\n", label(rec), stateWord(rec))
	return nil
}

func (n *nodeCmd) adopt(ctx context.Context, a api.Adopt) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	if err := n.head().Post(ctx, api.PathAdopt, a, nil); err != nil {
		return err
	}
	switch {
	case a.For == 0:
		fmt.Fprintln(n.env.Stdout, "machines that enrol must be approved one by one")
	case a.Next > 0:
		fmt.Fprintf(n.env.Stdout, "the next %d machines that enrol within %s are approved\n", a.Next, a.For)
	default:
		fmt.Fprintf(n.env.Stdout, "all machines that enrol within %s are approved\n", a.For)
	}
	return nil
}

// label names a machine in a sentence.
func label(r api.NodeRecord) string {
	if r.Node == 0 {
		return r.MAC
	}
	return fmt.Sprintf("node %d (%s, %s)", r.Node, r.Name, r.MAC)
}

// records asks the head for all machines and the agent for who is alive.
func (n *nodeCmd) records(ctx context.Context) ([]api.NodeRecord, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	var recs []api.NodeRecord
	if err := n.head().Get(ctx, api.PathNodes, &recs); err != nil {
		return nil, err
	}
	var table api.MemberTable
	if err := unixhttp.New(n.agent, "agent").Get(ctx, api.PathMembers, &table); err != nil {
		fmt.Fprintf(n.env.Stderr, "mosimg: who is alive is not known: %v\n", err)
		return recs, nil
	}
	byNode := map[api.NodeID]api.Member{}
	for _, m := range table.Members {
		byNode[m.Node] = m
	}
	for i, r := range recs {
		if m, ok := byNode[r.Node]; ok && r.Node != 0 {
			recs[i].Liveness, recs[i].Since = m.Liveness, m.Since
		}
	}
	return recs, nil
}

func (n *nodeCmd) list(ctx context.Context) error {
	recs, err := n.records(ctx)
	if err != nil {
		return err
	}
	if n.asJSON {
		if recs == nil {
			recs = []api.NodeRecord{}
		}
		return printJSON(n.env.Stdout, recs)
	}
	if len(recs) == 0 {
		fmt.Fprintln(n.env.Stderr, "no machine has enrolled yet")
		return nil
	}
	return nodeTable(n.env.Stdout, recs, time.Now())
}

// nodeTable prints one line for each machine, and its alert below it.
func nodeTable(w io.Writer, recs []api.NodeRecord, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tNAME\tSTATE\tALIVE\tSINCE\tADDRESS\tMAC\tRUNS\tOFFERED\tREBOOT\tCPUS\tMEMORY\tFINGERPRINT")
	var alerts []string
	for _, r := range recs {
		cpus, mem := "-", "-"
		if r.Inventory != nil {
			cpus, mem = fmt.Sprint(r.Inventory.CPUs), size(r.Inventory.MemoryBytes)
		}
		since := "-"
		if !r.Since.IsZero() {
			since = age(now.Sub(r.Since))
		}
		number := "-"
		if r.Node != 0 {
			number = fmt.Sprint(r.Node)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", number, dash(r.Name), stateWord(r), dash(string(r.Liveness)),
			since, dash(r.Address), r.MAC, dash(short(r.Image)), dash(short(r.Offered)), dash(reboot(r)), cpus, mem, dash(r.Fingerprint))
		if r.Alert != "" {
			alerts = append(alerts, fmt.Sprintf("ALERT %s: %s", label(r), r.Alert))
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, a := range alerts {
		fmt.Fprintln(w, a)
	}
	return nil
}

// stateWord is what the head has decided about a machine.
func stateWord(r api.NodeRecord) string {
	if r.Drain {
		return string(r.State) + ",drained"
	}
	return string(r.State)
}

// reboot says what a boot would do to the image that a machine runs: "" when
// it was not booted from one, or it is not known what it would get.
func reboot(r api.NodeRecord) string {
	switch {
	case r.Image == "" || r.Offered == "":
		return ""
	case r.Image == r.Offered:
		return "same"
	}
	return "changes"
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// short is the beginning of an image id, enough to tell images apart.
func short(id string) string { return id[:min(12, len(id))] }

// size is a number of bytes in the unit that gives one to four digits.
func size(n int64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%dG", n>>30)
	case n > 0:
		return fmt.Sprintf("%dM", n>>20)
	}
	return "-"
}

func (n *nodeCmd) show(ctx context.Context, what string) error {
	recs, err := n.records(ctx)
	if err != nil {
		return err
	}
	at, err := enrol.Find(recs, what)
	if err != nil {
		return err
	}
	r := recs[at]
	if n.asJSON {
		return printJSON(n.env.Stdout, r)
	}
	return showNode(n.env.Stdout, r)
}

func showNode(w io.Writer, r api.NodeRecord) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(k, format string, args ...any) { fmt.Fprintf(t, "%s\t%s\n", k, fmt.Sprintf(format, args...)) }
	row("node", "%d", r.Node)
	row("name", "%s", dash(r.Name))
	row("state", "%s", stateWord(r))
	if r.Alert != "" {
		row("alert", "%s", r.Alert)
	}
	row("role", "%s", r.Role)
	row("alive", "%s", dash(string(r.Liveness)))
	row("mac", "%s", r.MAC)
	row("address", "%s", dash(r.Address))
	row("fingerprint", "%s", dash(r.Fingerprint))
	row("image running", "%s", dash(r.Image))
	row("image offered", "%s", dash(r.Offered))
	switch reboot(r) {
	case "same":
		row("a reboot", "boots the same image")
	case "changes":
		row("a reboot", "boots the image offered")
	}
	row("first seen", "%s", r.FirstSeen.Format(time.RFC3339))
	row("last seen", "%s", r.LastSeen.Format(time.RFC3339))
	if v := r.Inventory; v != nil {
		row("product", "%s", dash(v.Product))
		row("cpu", "%d x %s (%s)", v.CPUs, dash(v.CPUModel), v.Arch)
		row("memory", "%s", size(v.MemoryBytes))
		row("kernel", "%s", dash(v.Kernel))
		row("tpm", "%t", v.TPM)
		if v.CRIU.Usable {
			row("migration", "yes, CRIU %s", v.CRIU.Version)
		} else {
			row("migration", "no: %s", dash(v.CRIU.Reason))
		}
		for _, nic := range v.NICs {
			link := "no carrier"
			if nic.Carrier {
				link = "carrier"
				if nic.Mbit > 0 {
					link = fmt.Sprintf("%d Mbit/s", nic.Mbit)
				}
			}
			row("nic "+nic.Name, "%s %s %s", nic.MAC, dash(nic.Driver), link)
		}
	}
	return t.Flush()
}
