package nodecli

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/monitor"
	"mosimg/internal/unixhttp"
)

// mosmonPatience is how long mosmon waits for an answer that the agent has in memory.
const mosmonPatience = 5 * time.Second

func newMosmonCmd(env *Env) *cobra.Command {
	var once, asJSON bool
	var socket string
	var look mosmonLook
	cmd := &cobra.Command{
		Use:   "mosmon [flags] [+NODE]",
		Short: "Show the machines of the cluster and their loads",
		Long: `mosmon shows a bar for each machine, as this machine's agent has heard of it, and
draws it anew each second until q is pressed. Its flags are also its keys; h lists them. With +NODE the
first bar is that of the node of this number.

With --once, and where the output is no terminal, it prints once: a table of all numbers, or
bars if a flag says what they are to show or how.`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			v, err := look.view(args)
			if err != nil {
				return err
			}
			if asJSON && v != (monitor.View{}) {
				return fault.New(fault.Usage, "read flags of", "mosmon", "--json is the whole table, and goes with no display", "leave out the one or the other")
			}
			agent := unixhttp.New(socket, "agent")
			ask := func(ctx context.Context) (t api.MemberTable, err error) {
				ctx, cancel := context.WithTimeout(ctx, mosmonPatience)
				defer cancel()
				return t, agent.Get(ctx, api.PathMembers, &t)
			}
			in, inTerm := terminal(env.Stdin)
			out, outTerm := terminal(env.Stdout)
			if !once && !asJSON && inTerm && outTerm {
				if err := drawable(os.Getenv("TERM")); err != nil {
					return err
				}
				return watch(c.Context(), newScreen(in, out, os.Getenv("NO_COLOR") == ""), v, ask)
			}
			t, err := ask(c.Context())
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(env.Stdout)
				e.SetIndent("", "  ")
				return e.Encode(t)
			}
			width, height := 80, 24
			if outTerm {
				width, height = size(out)
			}
			if v.Display == 0 && v.Numbering == 0 {
				v.Display = monitor.Table
			}
			_, err = io.WriteString(env.Stdout, monitor.Text(v, t, width, height))
			return err
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	look.keys = make(map[monitor.Key]*bool)
	for _, k := range mosmonKeys {
		look.keys[monitor.Key(k.key[0])] = f.BoolP(k.name, k.key, false, k.usage)
	}
	f.BoolVar(&once, "once", false, "print once and end")
	f.BoolVar(&asJSON, "json", false, "print all that is known once, as JSON")
	f.StringVar(&socket, "socket", api.AgentSocket, "the agent's unix socket")
	return cmd
}

// mosmonKeys are the keys that are flags too, MOSIX's first.
var mosmonKeys = []struct{ key, name, usage string }{
	{"l", "load", "bars: load of a CPU of speed 10000 (the default)"},
	{"m", "memory", "bars: memory"},
	{"s", "speed", "bars: speed of a CPU, and how many"},
	{"u", "utilisation", "bars: utilisation of the CPUs"},
	{"w", "wide", "wide columns, with the nodes' names"},
	{"v", "vertical", "narrow columns, numbers downwards"},
	{"V", "tight", "narrow columns without gaps, numbers downwards"},
	{"a", "auto", "columns as wide as all nodes fit (the default)"},
	{"d", "no-dead", "without dead nodes"},
	{"t", "total", "a line with the total of the nodes"},
	{"g", "guests", "bars: guests, which are jobs of other homes"},
	{"n", "numbers", "a table of all numbers"},
}

// mosmonLook is which of the flags were given.
type mosmonLook struct{ keys map[monitor.Key]*bool }

// view is what they ask for, as if the keys had been pressed.
func (l mosmonLook) view(args []string) (monitor.View, error) {
	var v monitor.View
	var displays, numberings []string
	for _, k := range mosmonKeys {
		key := monitor.Key(k.key[0])
		if !*l.keys[key] {
			continue
		}
		switch k.key {
		case "l", "m", "s", "u", "g", "n":
			displays = append(displays, "-"+k.key)
		case "w", "v", "V", "a":
			numberings = append(numberings, "-"+k.key)
		}
		v, _ = v.Press(key, monitor.Snapshot{}, 0, 0)
	}
	for _, group := range [][]string{displays, numberings} {
		if len(group) > 1 {
			return v, fault.New(fault.Usage, "read flags of", "mosmon", strings.Join(group, " and ")+" exclude each other", "give one of them")
		}
	}
	if len(args) > 0 {
		n, err := strconv.ParseUint(strings.TrimPrefix(args[0], "+"), 10, 31)
		if !strings.HasPrefix(args[0], "+") || err != nil || n == 0 {
			return v, fault.New(fault.Usage, "read arguments of", "mosmon", strconv.Quote(args[0])+" is not + and the number of a node", "see: mosmon --help")
		}
		v.First = api.NodeID(n)
	}
	return v, nil
}

// drawable tells why a terminal of this kind cannot be drawn on. All others
// know the few sequences that are used (ECMA-48, and xterm's second screen).
func drawable(term string) error {
	switch term {
	case "":
		return fault.New(fault.Environment, "draw on", "this terminal", "TERM is not set", "set it, or print once: mosmon --once")
	case "dumb", "unknown":
		return fault.New(fault.Environment, "draw on", "this terminal", "it cannot be drawn on (TERM="+term+")", "print once: mosmon --once")
	}
	return nil
}
