package nodecli

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// runFlags is what mosrun was asked for. The letters are MOSIX's, which allow a value
// to be part of the word (-r3, -j1-4) and a number to be a flag (-3).
type runFlags struct {
	node   string      // by number, name or address; "" is the best
	home   bool        // here
	list   []nodeRange // or one of these, at random
	force  bool        // run at home if the place is not available
	memMiB int64       // only where so much memory is free
	locked bool
	help   bool
	socket string
}

// best tells whether the agent is to choose the node.
func (f runFlags) best() bool { return f.node == "" && !f.home && len(f.list) == 0 }

// nodeRange is the nodes from first to last.
type nodeRange struct{ first, last api.NodeID }

// later are MOSIX's flags that do nothing here yet, or nothing any more.
var later = map[byte]string{
	'c': "the balancer has no use for it; it looks at what a job does", 'd': "the balancer has no use for it; it looks at what a job does", 'f': "the balancer has no use for it; it looks at what a job does", 'i': "the balancer has no use for it; it looks at what a job does",
	'n': "the balancer has no use for it; it looks at what a job does", 's': "the balancer has no use for it; it looks at what a job does", 'G': "the balancer has no use for it; it looks at what a job does", 'D': "the balancer has no use for it; it looks at what a job does",
	't': "a terminal for the job comes later; stdin, stdout and stderr are pipes until then",
	'A': "checkpoints are not there", 'N': "checkpoints are not there", 'C': "checkpoints are not there",
	'R': "checkpoints are not there", 'I': "checkpoints are not there", 'O': "checkpoints are not there",
	'q': "there is no queue", 'Q': "there is no queue", 'P': "there is no queue", 'S': "there is no queue", 'J': "there is no queue",
	'E': "every job can move; there are no batch jobs", 'M': "every job can move; there are no batch jobs",
}

// parseRun splits mosrun's arguments. The first that is no flag ends the
// flags: what follows is the program's.
func parseRun(args []string) (f runFlags, program []string, err error) {
	f.socket = api.AgentSocket
	bad := func(word, format string, a ...any) error {
		return fault.New(fault.Usage, "read flag", word, fmt.Sprintf(format, a...), "see: mosrun --help")
	}
	placed := ""
	place := func(word string) error {
		if placed != "" {
			return bad(word, "the place is given by %s already", placed)
		}
		placed = word
		return nil
	}
	for len(args) > 0 {
		word := args[0]
		if word == "--" {
			args = args[1:]
			break
		}
		if len(word) < 2 || word[0] != '-' {
			break
		}
		args = args[1:]
		if name, ok := strings.CutPrefix(word, "--"); ok {
			name, value, given := strings.Cut(name, "=")
			switch {
			case name == "help" && !given:
				f.help = true
			case name == "socket" && given:
				f.socket = value
			case name == "socket" && len(args) > 0:
				f.socket, args = args[0], args[1:]
			case name == "socket":
				return f, nil, bad(word, "it needs a path")
			default:
				return f, nil, bad(word, "unknown")
			}
			continue
		}
		if number := word[1:]; number[0] >= '0' && number[0] <= '9' {
			if err := place(word); err != nil {
				return f, nil, err
			}
			if f.node, err = nodeWord(number); err != nil {
				return f, nil, bad(word, "%v", err)
			}
			continue
		}
		for letters := word[1:]; letters != ""; {
			letter := letters[0]
			letters = letters[1:]
			value := ""
			if strings.IndexByte("rjm", letter) >= 0 {
				value, letters = letters, ""
				if value == "" && len(args) > 0 {
					value, args = args[0], args[1:]
				}
				if value == "" {
					return f, nil, bad("-"+string(letter), "it needs a value")
				}
			}
			if strings.IndexByte("bhrj", letter) >= 0 {
				if err := place("-" + string(letter)); err != nil {
					return f, nil, err
				}
			}
			switch letter {
			case 'b': // as nothing is
			case 'h':
				f.home = true
			case 'r':
				f.node = value
			case 'j':
				if f.list, err = nodeList(value); err != nil {
					return f, nil, bad("-j "+value, "%v", err)
				}
			case 'm':
				if f.memMiB, err = strconv.ParseInt(value, 10, 40); err != nil || f.memMiB < 1 {
					return f, nil, bad("-m "+value, "want a number of MiB")
				}
			case 'F':
				f.force = true
			case 'L':
				f.locked = true
			case 'l':
				f.locked = false
			default:
				why, known := later[letter]
				if !known {
					why = "unknown"
				}
				return f, nil, bad("-"+string(letter), "%s", why)
			}
		}
	}
	switch {
	case f.help:
		return f, nil, nil
	case len(args) == 0:
		return f, nil, fault.New(fault.Usage, "read arguments of", "mosrun", "no program is named", "see: mosrun --help")
	case f.memMiB > 0 && !f.best() && len(f.list) == 0:
		return f, nil, bad("-m", "the node is given by %s already", placed)
	}
	return f, args, nil
}

// nodeWord reads a node's number or address.
func nodeWord(s string) (string, error) {
	if _, err := netip.ParseAddr(s); err == nil {
		return s, nil
	}
	n, err := nodeNumber(s)
	return strconv.Itoa(int(n)), err
}

func nodeNumber(s string) (api.NodeID, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%q is no node number; they begin at 1", s)
	}
	return api.NodeID(n), nil
}

// nodeList reads MOSIX's lists: 1-4,7.
func nodeList(s string) ([]nodeRange, error) {
	var list []nodeRange
	for part := range strings.SplitSeq(s, ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		first, err := nodeNumber(from)
		if err != nil {
			return nil, err
		}
		last, err := nodeNumber(to)
		if err != nil {
			return nil, err
		}
		if last < first {
			return nil, fmt.Errorf("%s-%s ends before it begins", from, to)
		}
		list = append(list, nodeRange{first, last})
	}
	return list, nil
}

// candidates are the nodes of a list that may take a job now.
func candidates(members []api.Member, list []nodeRange, memMiB int64) []api.Member {
	var out []api.Member
	for _, m := range members {
		if m.Liveness != api.Alive {
			continue
		}
		// A node of whose memory nobody has heard may have none.
		if memMiB > 0 && (m.Load == nil || m.Load.MemFree>>20 < memMiB) {
			continue
		}
		for _, r := range list {
			if m.Node >= r.first && m.Node <= r.last {
				out = append(out, m)
				break
			}
		}
	}
	return out
}
