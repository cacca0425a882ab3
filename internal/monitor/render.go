package monitor

import (
	"fmt"
	"strings"

	"mosimg/internal/api"
	"mosimg/internal/table"
)

// help is what the key h shows; it fits 40 columns.
var help = []string{
	"MOSIX's keys",
	"  l L  load of a CPU of speed 10000",
	"  m r  memory: # used, + free",
	"  u    utilisation of the CPUs",
	"  s    speed of a CPU, number of CPUs",
	"  t    a line with the total",
	"  d    dead nodes: hide or show",
	"  w    wide columns, with names",
	"  v V  numbers downwards; V: no gaps",
	"  a    columns as wide as fits",
	"  h    this help",
	"Keys that are ours",
	"  g    guests: jobs of other homes",
	"  n    all numbers as a table",
	"  q    quit, as ctrl-C",
	"  arrows, PgUp, PgDn, Home, End",
	"       move when not all nodes fit",
	"Below a bar",
	"  *    this machine",
	"  ?    suspect: it does not answer",
	"  D L  dead; has left the cluster",
	"  b    blocked: takes no guests",
	"  v    leaving: sends its jobs away",
	"Any other key leaves this help.",
}

// keyLines are the line of keys, from long to short.
var keyLines = []string{
	"l)oad m)emory s)peed u)tilisation g)uests n)umbers d)ead t)otal h)elp q)uit",
	"l m s u g n  d t  w v V a  h)elp q)uit",
	"h)elp q)uit",
}

// The smallest screen that shows anything, and from when on there is a line of keys.
const (
	minWidth  = 20
	minHeight = 6
	keysFrom  = 10
)

// maxProblem is how many lines a problem takes when there is something else to show.
const maxProblem = 3

// layout is which rows are whose.
type layout struct {
	problem     []string
	top, bottom int // of the bars or the table: from row top to bottom-1
	total, keys int // rows of these lines; -1 for none
}

func (v View) layout(s Snapshot, width, height int) layout {
	l := layout{top: 1, bottom: height, total: -1, keys: -1}
	if s.Problem != "" {
		l.problem = wrap(s.Problem, width)
		if s.Known {
			l.problem = l.problem[:min(len(l.problem), max(1, min(maxProblem, height-2*minHeight)))]
		}
		l.top = len(l.problem) + 1
	}
	if !v.Printed && height >= keysFrom {
		l.bottom--
		l.keys = l.bottom
	}
	if v.Total && l.bottom-l.top > minHeight {
		l.bottom--
		l.total = l.bottom
	}
	return l
}

// page is how many of the machines fit on the screen.
func (v View) page(members []api.Member, width, height int) int {
	// Problems come and go; how many nodes fit into the width does not depend on them.
	if v.display() == Table {
		l := v.layout(Snapshot{}, width, height)
		return max(1, l.bottom-l.top-1)
	}
	return max(1, arrange(v.numbering(), len(members), digitsOf(members), width).count)
}

// Render draws a screen of width columns and height rows.
func Render(v View, s Snapshot, width, height int) Frame {
	f := newFrame(width, height)
	if width < minWidth || height < minHeight {
		for y, l := range wrap(fmt.Sprintf("too small: %dx%d", width, height), width) {
			f.put(0, y, l, plain)
		}
		return f
	}
	if v.Help {
		from := min(v.HelpLine, max(0, len(help)-height+1))
		for y, l := range help[from:min(len(help), from+height)] {
			f.put(0, y, l, plain)
		}
		return f
	}
	l := v.layout(s, width, height)
	if l.keys >= 0 {
		for _, text := range keyLines {
			if len(text) <= width {
				f.put(0, l.keys, text, dim)
				break
			}
		}
	}
	for i, text := range l.problem {
		f.put(0, 1+i, text, hot)
	}
	members := v.shown(s)
	switch {
	case len(s.Table.Members) == 0:
		f.put(0, 0, "mosmon", bold)
		if !s.Known && s.Problem == "" {
			f.put(0, l.top, "waiting for the agent", plain)
		}
		if s.Known && s.Problem == "" {
			for i, text := range wrap(noMembers, width) {
				f.put(0, l.top+i, text, plain)
			}
		}
		return f
	case len(members) == 0:
		f.put(0, 0, "all nodes are dead; d shows them", bold)
		return f
	}
	page := v.page(members, width, height)
	from := v.first(members, page)
	if v.Printed { // each node once: the last page may be short
		from = v.first(members, 1)
	}
	page = min(page, len(members)-from)
	title(f, v, s.Table.Members, members[from:from+page], len(members), width)
	if l.total >= 0 {
		f.put(0, l.total, total(s.Table.Members, width), plain)
	}
	if v.display() == Table {
		rows := strings.Split(strings.TrimSuffix(Numbers(members, width), "\n"), "\n")
		f.put(0, l.top, rows[0], dim)
		for i, row := range rows[1+from : 1+from+page] {
			if l.top+1+i < l.bottom {
				f.put(0, l.top+1+i, row, tableStyle(members[from+i]))
			}
		}
		return f
	}
	c := charts[v.display()]
	cols := arrange(v.numbering(), len(members), digitsOf(members), width)
	c.draw(f, l.top, l.bottom, members[from:from+page], members, cols)
	return f
}

func tableStyle(m api.Member) style {
	switch {
	case m.Self:
		return bold
	case !alive(m):
		return hot
	case State(m) != string(api.Alive):
		return warm
	}
	return plain
}

// title says what is shown, of how many nodes.
func title(f Frame, v View, all, page []api.Member, shown, width int) {
	living := 0
	for _, m := range all {
		if alive(m) {
			living++
		}
	}
	nodes := fmt.Sprintf("%d of %d nodes alive", living, len(all))
	if len(page) < shown {
		nodes = fmt.Sprintf("nodes %d-%d, %d of %d alive", page[0].Node, page[len(page)-1].Node, living, len(all))
	}
	short, long := "table", "all numbers"
	if c, ok := charts[v.display()]; ok {
		short, long = c.short, c.long
	}
	if len(long)+2+len(nodes) > width {
		long = short
	}
	f.right(width, 0, nodes, plain)
	f.put(0, 0, long+"  ", bold)
}

// total is the sum of the machines that are alive.
func total(members []api.Member, width int) string {
	var nodes, cpus, guests int
	var load float64
	var used, memory int64
	for _, m := range members {
		if v := news(m); v != nil {
			nodes, cpus, guests = nodes+1, cpus+v.CPUs, guests+v.Guests
			load += v.Load
			used, memory = used+v.MemTotal-v.MemFree, memory+v.MemTotal
		}
	}
	mem := table.Bytes(used) + "/" + table.Bytes(memory)
	text := fmt.Sprintf("total %d nodes, %d CPUs, load %.2f, memory %s, %d guests", nodes, cpus, load, mem, guests)
	if len(text) > width {
		text = fmt.Sprintf("total load %.2f mem %s guests %d", load, mem, guests)
	}
	return text
}

// Text is the whole cluster as text, for a printer or a pipe: as many frames as are needed, or
// all of the table.
func Text(v View, t api.MemberTable, width, height int) string {
	v.Printed = true
	s := Snapshot{Table: t, Known: true}
	members := v.shown(s)
	if len(t.Members) == 0 {
		return noMembers + "\n"
	}
	if v.display() == Table || len(members) == 0 {
		text := "all nodes are dead\n"
		if len(members) > 0 {
			text = Numbers(members[v.first(members, 1):], width)
		}
		if v.Total {
			text += total(t.Members, width) + "\n"
		}
		return text
	}
	page := v.page(members, width, height)
	var b strings.Builder
	for i := v.first(members, 1); i < len(members); i += page {
		v.First = members[i].Node
		b.WriteString(strings.Join(Render(v, s, width, height).Lines(), "\n") + "\n")
	}
	return b.String()
}
