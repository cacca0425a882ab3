package nodecli

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mosimg/agent/jobs/client"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/monitor"
	"mosimg/internal/table"
)

// question is a word of MOSIX's mosctl that asks about one node.
type question struct {
	name, short, long string
	answer            func(api.Member) (string, error)
}

var questions = []question{
	{"whois", "Tell number, name and address of a node", `whois tells a node's number, name and address, by any of the three.`, whois},
	{"status", "Tell whether a node is alive, what it takes and what it has", `status tells whether a node is alive, whether it takes guests, and what it has:
CPUs and their speed, memory, guests, with the age of that news.`, nodeStatus},
	{"getload", "Tell a node's load", `getload tells a node's load, which is the mean number of processes that want to run
there; mosmon shows it for one CPU of speed 10000.`, getload},
}

// mosctlQuestions are those as commands.
func mosctlQuestions(env *Env) []*cobra.Command {
	var list []*cobra.Command
	for _, q := range questions {
		var socket string
		var asJSON bool
		cmd := &cobra.Command{
			Use:   q.name + " [NODE]",
			Short: q.short,
			Long:  q.long + " NODE is a number, a name or an address; without it, this node is meant.",
			Args:  usageArgs(cobra.MaximumNArgs(1)),
			RunE: func(c *cobra.Command, args []string) error {
				t, err := client.Agent{Socket: socket}.Members(c.Context())
				if err != nil {
					return err
				}
				m, err := member(t, args)
				if err != nil {
					return err
				}
				if asJSON {
					e := json.NewEncoder(env.Stdout)
					e.SetIndent("", "  ")
					return e.Encode(m)
				}
				text, err := q.answer(m)
				if err == nil {
					fmt.Fprintln(env.Stdout, text)
				}
				return err
			},
		}
		cmd.Flags().BoolVar(&asJSON, "json", false, "print all that is known of the node, as JSON")
		cmd.Flags().StringVar(&socket, "socket", api.AgentSocket, "the agent's unix socket")
		list = append(list, cmd)
	}
	return list
}

// member is the node that the user means; nobody named is this one.
func member(t api.MemberTable, args []string) (api.Member, error) {
	if len(t.Members) == 0 {
		return api.Member{}, fault.New(fault.Unavailable, "find", "nodes", "this machine is not a member of a cluster", "mosagent status says why")
	}
	name, what := "", "this node"
	if len(args) > 0 {
		name, what = args[0], fmt.Sprintf("node %q", args[0])
	}
	// A name may look like a number or an address: the number comes first, as for migrate.
	number, err := strconv.Atoi(name)
	for _, is := range []func(api.Member) bool{
		func(m api.Member) bool { return len(args) == 0 && m.Self },
		func(m api.Member) bool { return err == nil && m.Node == api.NodeID(number) },
		func(m api.Member) bool { return name != "" && m.Name == name },
		func(m api.Member) bool { return name != "" && m.Address == name },
	} {
		for _, m := range t.Members {
			if is(m) {
				return m, nil
			}
		}
	}
	return api.Member{}, fault.New(fault.NotFound, "find", what, "it is not a member of the cluster", "mosmon lists the members")
}

func whois(m api.Member) (string, error) {
	return fmt.Sprintf("%d %s %s", m.Node, table.Printable(m.Name), table.Printable(m.Address)), nil
}

func getload(m api.Member) (string, error) {
	v, err := newsOf(m)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%.2f", v.Load), nil
}

// newsOf is what is known of a node's load now. What a dead node last said of it is not its load.
func newsOf(m api.Member) (*api.LoadVector, error) {
	cause := "nobody has heard of it yet"
	switch {
	case m.Liveness == api.Dead || m.Liveness == api.Left:
		cause = fmt.Sprintf("the node is %s", describe(m.Liveness))
	case m.Load != nil:
		return m.Load, nil
	}
	return nil, fault.New(fault.Unavailable, "tell the load of", fmt.Sprintf("node %d", m.Node), cause, "")
}

func describe(l api.Liveness) string {
	switch l {
	case api.Suspect:
		return "suspect: it does not answer"
	case api.Left:
		return "gone: it has left the cluster"
	}
	return table.Printable(string(l))
}

func nodeStatus(m api.Member) (string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "node %d, %s, %s: %s", m.Node, table.Printable(m.Name), table.Printable(m.Address), describe(m.Liveness))
	if !m.Since.IsZero() {
		fmt.Fprintf(&b, " since %s", m.Since.Local().Format(time.DateTime))
	}
	line := func(key, format string, args ...any) {
		fmt.Fprintf(&b, "\n  %-8s %s", key, fmt.Sprintf(format, args...))
	}
	v, err := newsOf(m)
	if err != nil {
		return b.String(), nil // that it is dead is an answer
	}
	guests := "takes them"
	switch monitor.State(m) {
	case "blocked":
		guests = "takes none (blocked)"
	case "leaving":
		guests = "takes none, sends its jobs away (leaving)"
	}
	line("guests", "%d; %s", v.Guests, guests)
	if m.Migration {
		line("moves", "jobs can move to it and from it")
	} else {
		line("moves", "none: takes only jobs placed at start")
	}
	speed := "not measured yet"
	if v.Speed > 0 {
		speed = strconv.Itoa(v.Speed)
	}
	line("load", "%.2f on %d CPUs of speed %s, %.0f%% used", v.Load, v.CPUs, speed, 100*v.Utilisation)
	line("memory", "%s of %s used", table.Bytes(v.MemTotal-v.MemFree), table.Bytes(v.MemTotal))
	line("news", "%s old", table.Age(time.Duration(m.AgeMillis)*time.Millisecond))
	return b.String(), nil
}
