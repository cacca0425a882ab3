package monitor

import (
	"fmt"
	"math"
	"strconv"

	"mosimg/internal/api"
	"mosimg/internal/table"
)

// chart is one display of bars: what a bar means and where its scale ends.
type chart struct {
	short, long string // names
	// value is the height of a machine's bar.
	value func(*api.LoadVector) float64
	// rest, if set, is how high the whole is of which value is a part; it is drawn with '+'.
	rest func(*api.LoadVector) float64
	// top is the end of the scale, when the highest value (or rest) is so much.
	top func(highest float64) float64
	// tick is a value of the scale in at most five characters.
	tick func(float64) string
	// label is what stands above a bar, where it fits.
	label func(*api.LoadVector) string
	// style of a bar.
	style func(*api.LoadVector) style
}

var charts = map[Display]chart{
	Load: {
		short: "load", long: "load of a CPU, for one of speed " + strconv.Itoa(ReferenceSpeed),
		value: relativeLoad,
		top:   func(x float64) float64 { return roundUp(max(1, x)) },
		tick:  number,
		label: func(v *api.LoadVector) string { return number(relativeLoad(v)) },
		style: func(v *api.LoadVector) style { return level(v.Load/float64(max(1, v.CPUs)), 1, 2) }, // a slow CPU is no overloaded one
	},
	Memory: {
		short: "memory", long: "memory: # used, + free",
		value: func(v *api.LoadVector) float64 { return float64(v.MemTotal - v.MemFree) },
		rest:  func(v *api.LoadVector) float64 { return float64(v.MemTotal) },
		top:   func(x float64) float64 { return max(1, x) },
		tick:  func(x float64) string { return table.Bytes(int64(x)) },
		label: func(v *api.LoadVector) string { return percent(memoryUsed(v)) },
		style: func(v *api.LoadVector) style { return level(memoryUsed(v), 0.75, 0.9) },
	},
	Speed: {
		short: "speed", long: "speed of a CPU (" + strconv.Itoa(ReferenceSpeed) + " is the reference), CPUs",
		value: func(v *api.LoadVector) float64 { return float64(v.Speed) },
		top:   func(x float64) float64 { return roundUp(max(1, x)) },
		tick:  number,
		label: func(v *api.LoadVector) string {
			if v.Speed <= 0 {
				return fmt.Sprintf("? x%d", v.CPUs)
			}
			return fmt.Sprintf("%s x%d", number(float64(v.Speed)), v.CPUs)
		},
		style: func(*api.LoadVector) style { return good },
	},
	Utilisation: {
		short: "utilisation", long: "utilisation of the CPUs",
		value: func(v *api.LoadVector) float64 { return v.Utilisation },
		top:   func(float64) float64 { return 1 },
		tick:  percent,
		label: func(v *api.LoadVector) string { return percent(v.Utilisation) },
		style: func(*api.LoadVector) style { return good },
	},
	Guests: {
		short: "guests", long: "guests: jobs of other homes",
		value: func(v *api.LoadVector) float64 { return float64(v.Guests) },
		top:   func(x float64) float64 { return roundUp(max(2, x)) },
		tick:  number,
		label: func(v *api.LoadVector) string { return strconv.Itoa(v.Guests) },
		style: func(*api.LoadVector) style { return good },
	},
}

// level is the colour of something that is fine up to the first limit and bad from the second on.
func level(x, high, tooHigh float64) style {
	switch {
	case x <= high*1.005: // a full CPU's load is 1 and something
		return good
	case x <= tooHigh:
		return warm
	}
	return hot
}

// gauge is the width of the scale at the left: a number and a line.
const gauge = 6

// columns says how the columns below the bars look.
type columns struct {
	width int  // of a column, the gap included
	wide  bool // numbers from left to right, with names
	count int  // of columns that fit
}

// Widths of columns that hold numbers from left to right.
const (
	maxWide  = 12
	namesFit = 8 // that wide they are if the user asks for wide ones
)

// arrange chooses columns for so many nodes, with numbers of so many digits.
func arrange(n Numbering, nodes, digits, width int) columns {
	room := max(1, width-gauge)
	each := room / max(1, nodes)
	narrow := max(4, digits+2) // a number with a star and a gap
	if n == Auto {
		switch {
		case each >= narrow:
			return columns{min(each, maxWide), true, nodes}
		case each >= 2:
			n = Vertical
		default:
			n = Tight
		}
	}
	c := columns{width: 1}
	switch n {
	case Wide:
		c = columns{width: min(max(each, narrow, namesFit), maxWide), wide: true}
	case Vertical:
		c.width = 2
	}
	c.count = min(max(1, room/c.width), nodes)
	return c
}

// rowsBelow are the rows below the axis.
type rowsBelow struct{ numbers, names, states int }

func (r rowsBelow) all() int { return r.numbers + r.names + r.states }

// minPlot is the fewest rows in which bars still say something.
const minPlot = 3

// ticksFrom is the height from which the middle of the scale is named.
const ticksFrom = 6

// draw draws the bars of members into the rows from top to bottom-1 of f, on a scale
// that holds all the members of the cluster, so that it does not change from page to page.
func (c chart) draw(f Frame, top, bottom int, members, all []api.Member, cols columns) {
	below := rowsBelow{numbers: digitsOf(members)}
	if cols.wide {
		below = rowsBelow{numbers: 1, names: 1}
	}
	for _, m := range members {
		if State(m) != string(api.Alive) || m.Self && !cols.wide {
			below.states = 1
		}
	}
	if bottom-top-1-below.all() < minPlot {
		below.names = 0
	}
	axis := bottom - 1 - below.all()
	// Above the highest bar is room for what it says.
	head := 0
	if cols.wide && axis-top > minPlot {
		head = 1
	}
	end := c.scale(all)
	height := axis - top - head
	if height >= ticksFrom { // the middle is a row
		head += height % 2
		height -= height % 2
	}
	for y := top; y < axis; y++ {
		f.put(gauge-1, y, "|", dim)
	}
	f.right(gauge-1, top+head, c.tick(end), dim)
	if height >= ticksFrom {
		f.right(gauge-1, axis-height/2, c.tick(end/2), dim)
	}
	f.right(gauge-1, axis, c.tick(0), dim)
	f.put(gauge-1, axis, "+", dim)
	for i, m := range members {
		x := gauge + i*cols.width
		for j := range cols.width {
			f.put(x+j, axis, "-", dim)
		}
		c.column(f, x, axis, height, end, m, cols)
		name(f, x, axis+1, m, cols, below)
	}
}

// scale is where the scale ends for these machines.
func (c chart) scale(members []api.Member) float64 {
	highest := 0.0
	for _, m := range members {
		if v := news(m); v != nil {
			highest = max(highest, c.value(v))
			if c.rest != nil {
				highest = max(highest, c.rest(v))
			}
		}
	}
	return c.top(highest)
}

// column draws one bar that stands on row axis and is at most height rows high.
func (c chart) column(f Frame, x, axis, height int, end float64, m api.Member, cols columns) {
	thick := 1
	if cols.wide {
		thick = max(2, cols.width-4)
		x += (cols.width - 1 - thick) / 2
	}
	v := news(m)
	if v == nil {
		return
	}
	rows := share(c.value(v)/end) * float64(height)
	full, whole := int(math.Round(rows)), 0
	half := false
	if c.rest != nil {
		whole = int(math.Round(share(c.rest(v)/end) * float64(height)))
		// A machine that uses some memory shows some.
		if full == 0 && rows > 0 {
			full = 1
		}
	} else {
		full = int(rows + 0.25)
		half = rows-float64(full) >= 0.25
	}
	s := c.style(v)
	if m.Liveness == api.Suspect {
		s = dim
	}
	for j := range thick {
		for y := range full {
			f.put(x+j, axis-1-y, "#", s)
		}
		for y := full; y < whole; y++ {
			f.put(x+j, axis-1-y, "+", dim)
		}
		if half {
			f.put(x+j, axis-1-full, ".", s)
		}
	}
	if half {
		full++
	}
	if label := c.label(v); cols.wide && len(label) < cols.width { // else it would touch its neighbour
		f.put(x+(thick-len(label))/2, axis-1-max(full, whole), label, plain)
	}
}

// name writes what stands below a bar.
func name(f Frame, x, y int, m api.Member, cols columns, below rowsBelow) {
	number, s := strconv.Itoa(int(m.Node)), plain
	if !alive(m) {
		s = hot
	}
	if m.Self {
		s = bold
	}
	if !cols.wide {
		for i, digit := range number {
			f.put(x, y+below.numbers-len(number)+i, string(digit), s)
		}
		if below.states > 0 {
			f.put(x, y+below.numbers, string(mark(m)), s)
		}
		return
	}
	if m.Self {
		number += "*"
	}
	width := cols.width - 1
	f.centre(x, y, width, number, s)
	y++
	if below.names > 0 {
		f.centre(x, y, width, table.Printable(m.Name), s)
		y++
	}
	if st := State(m); below.states > 0 && st != string(api.Alive) {
		f.centre(x, y, width, table.Printable(st), warm)
	}
}

// mark is a machine's state in one character.
func mark(m api.Member) rune {
	switch st := State(m); {
	case st == string(api.Suspect):
		return '?'
	case st == string(api.Dead):
		return 'D'
	case st == string(api.Left):
		return 'L'
	case st == "leaving":
		return 'v'
	case st == "blocked":
		return 'b'
	case m.Self:
		return '*'
	}
	return ' '
}

// digitsOf is how many digits the longest number has.
func digitsOf(members []api.Member) int {
	digits := 1
	for _, m := range members {
		digits = max(digits, len(strconv.Itoa(int(m.Node))))
	}
	return digits
}
