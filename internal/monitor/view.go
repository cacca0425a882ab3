package monitor

import (
	"slices"

	"mosimg/internal/api"
)

// Display is what is shown, named by its key.
type Display rune

// The displays. Guests and Table are ours, the others MOSIX's.
const (
	Load        Display = 'l'
	Memory      Display = 'm'
	Speed       Display = 's'
	Utilisation Display = 'u'
	Guests      Display = 'g'
	Table       Display = 'n'
)

// Numbering is how the nodes' numbers stand below the bars, named by MOSIX's key.
type Numbering rune

const (
	Auto     Numbering = 'a' // as wide as all nodes fit
	Wide     Numbering = 'w' // from left to right, with names
	Vertical Numbering = 'v' // downwards, with gaps between the bars
	Tight    Numbering = 'V' // downwards, without gaps
)

// View is what the user has chosen. The zero View is that of a fresh mosmon.
type View struct {
	Display   Display   // 0 is Load
	Numbering Numbering // 0 is Auto
	HideDead  bool      // of machines that are dead or have left
	Total     bool      // a line with the sum of the nodes
	// First is the number of the first node shown; one that is not there means the next one.
	First api.NodeID
	// Help is shown instead, from its line HelpLine on.
	Help     bool
	HelpLine int
	// Printed leaves out what is for somebody at a keyboard.
	Printed bool
}

// Snapshot is what was learned of the cluster.
type Snapshot struct {
	Table api.MemberTable
	Known bool // Table was told by the agent, some time
	// Problem is why there is nothing newer, and what is done about it; "" when all is well.
	Problem string
}

// shown are the machines that the view shows.
func (v View) shown(s Snapshot) []api.Member {
	if !v.HideDead {
		return s.Table.Members
	}
	return slices.DeleteFunc(slices.Clone(s.Table.Members), func(m api.Member) bool { return !alive(m) })
}

func (v View) display() Display {
	if v.Display == 0 {
		return Load
	}
	return v.Display
}

func (v View) numbering() Numbering {
	if v.Numbering == 0 {
		return Auto
	}
	return v.Numbering
}

// first is the place in members of the first one shown. The last page is a full one.
func (v View) first(members []api.Member, page int) int {
	i := slices.IndexFunc(members, func(m api.Member) bool { return m.Node >= v.First })
	if i < 0 {
		i = len(members)
	}
	return max(0, min(i, len(members)-page))
}

// Press is the view after a key, and whether the key means the end.
func (v View) Press(k Key, s Snapshot, width, height int) (next View, quit bool) {
	if k == 'q' || k == 'Q' || k == CtrlC {
		return v, true
	}
	if v.Help {
		page := max(1, height-1)
		switch step, paging := steps(k, v.HelpLine, page, len(help)); {
		case paging:
			v.HelpLine = min(max(0, step), max(0, len(help)-page))
		default:
			v.Help, v.HelpLine = false, 0
		}
		return v, false
	}
	switch k {
	case 'l', 'L':
		v.Display = Load
	case 'm', 'r': // nodes tell what programs can have, not what the kernel caches
		v.Display = Memory
	case 's':
		v.Display = Speed
	case 'u':
		v.Display = Utilisation
	case 'g':
		v.Display = Guests
	case 'n':
		v.Display = Table
	case 'w', 'v', 'V', 'a':
		v.Numbering = Numbering(k)
	case 'd':
		v.HideDead = !v.HideDead
	case 't':
		v.Total = !v.Total
	case 'h', '?':
		v.Help = true
	default:
		members := v.shown(s)
		page := v.page(members, width, height)
		i := v.first(members, page)
		step, paging := steps(k, i, page, len(members))
		if !paging || len(members) == 0 {
			break
		}
		v.First = members[min(max(0, step), max(0, len(members)-page))].Node
	}
	return v, false
}

// steps is where a key leads that moves through a list, from place i of n.
func steps(k Key, i, page, n int) (to int, paging bool) {
	switch k {
	case Left, Up:
		return i - 1, true
	case Right, Down:
		return i + 1, true
	case PageUp:
		return i - page, true
	case PageDown, ' ':
		return i + page, true
	case Home:
		return 0, true
	case End:
		return n, true
	}
	return i, false
}
