package console

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/monitor"
)

// Source is what there is to show. Both are called often, by several goroutines.
type Source struct {
	Status  func() api.AgentStatus
	Members func() api.MemberTable
}

const (
	// quiet is how long Enter repeats nothing: a stuck key must not fill the screen.
	quiet = time.Second
	// settle gathers changes that come in quick succession into one block.
	settle = 300 * time.Millisecond
	// look is how often the members are looked at.
	look = time.Second
)

const (
	// lineWidth is what a serial line's terminal has.
	lineWidth = 80
	// maxLines is how many nodes are told of at once: 200 of them take
	// a serial line of 115200 baud longer than a second.
	maxLines = 24
)

// Show prints the status whenever it changes, and a line for each node whose state has
// changed, until ctx ends; and all of that on Enter. It is for consoles that
// keep what was printed: it prints nothing while only loads change.
// changed wakes it; enter (may be nil) reports that somebody pressed Enter.
func Show(ctx context.Context, out io.Writer, src Source, changed, enter <-chan struct{}) {
	var last string
	var at time.Time
	var known states
	tick := time.NewTicker(look)
	defer tick.Stop()
	for {
		force := false
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if news := known.changes(src.Members().Members); len(news) > 0 {
				io.WriteString(out, nodes(news))
			}
			continue
		case <-changed:
			select {
			case <-ctx.Done():
				return
			case <-time.After(settle):
			}
			select { // what changed while we waited is in this block
			case <-changed:
			default:
			}
		case <-enter:
			force = time.Since(at) >= quiet
		}
		if text := Block(src.Status()); force || text != last {
			last, at = text, time.Now()
			if force {
				text += nodes(src.Members().Members)
			}
			io.WriteString(out, text)
		}
	}
}

// nodes is a line for each of the nodes; none at all for none.
func nodes(members []api.Member) string {
	if len(members) == 0 {
		return ""
	}
	more := members[min(len(members), maxLines):]
	lines := monitor.Bars(members[:len(members)-len(more)], lineWidth-2)
	if len(more) > 0 {
		lines = append(lines, rest(more))
	}
	return "  " + strings.Join(lines, "\n  ") + "\n"
}

// rest stands for nodes that are not shown.
func rest(members []api.Member) string {
	gone := 0
	for _, m := range members {
		if m.Liveness == api.Dead || m.Liveness == api.Left {
			gone++
		}
	}
	return fmt.Sprintf("and %d more, %d of them gone; mosmon shows all", len(members), gone)
}

// states are those of the nodes when they were last told.
type states map[api.NodeID]string

// changes are the members whose state is not the one that was last told, and
// takes them as told. A node that misses a probe is what it was: it is back in a
// second, or dead, and a busy machine would fill the console with it.
func (s *states) changes(members []api.Member) []api.Member {
	now := make(states, len(members))
	var changed []api.Member
	for _, m := range members {
		old, told := (*s)[m.Node]
		st := monitor.State(m)
		if m.Liveness == api.Suspect {
			if st = old; !told {
				continue // it is told when it is heard of
			}
		}
		now[m.Node] = st
		if st != old {
			changed = append(changed, m)
		}
	}
	*s = now
	return changed
}
