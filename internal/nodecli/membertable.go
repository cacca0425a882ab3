package nodecli

import (
	"fmt"
	"math"
	"strings"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/table"
)

// minBar is the shortest load bar worth showing.
const minBar = 4

// memberTable is the cluster as text: a header and one line for each machine,
// no wider than width if the names allow it. A load that nobody has heard of
// is "-", never 0.
func memberTable(t api.MemberTable, width int) string {
	if len(t.Members) == 0 {
		return "This machine is not a member of a cluster; mosagent status says why.\n"
	}
	rows := [][]string{{"NODE", "NAME", "STATE", "LOAD", "UTIL", "MEM", "CPUS", "GUESTS", "AGE"}}
	const loadCol = 3
	top := 1.0 // the bar's full length: the highest load of a CPU, at least one
	for _, m := range t.Members {
		if m.Load != nil && m.Liveness != api.Dead && m.Liveness != api.Left {
			top = math.Max(top, perCPU(m.Load))
		}
	}
	for _, m := range t.Members {
		rows = append(rows, memberRow(m))
	}
	// The bar takes what is left of the line.
	if bar := min(width-table.Width(rows)-1, 20); bar >= minBar {
		for i := range rows {
			rows[i][loadCol] += " " + loadBar(i, t.Members, top, bar)
		}
	}
	return table.Align(rows, 1, 2)
}

func memberRow(m api.Member) []string {
	name := m.Name
	if m.Self {
		name += " *"
	}
	row := []string{fmt.Sprint(m.Node), name, string(m.Liveness), "-", "-", "-", "-", "-", "-"}
	// What a dead machine last said of its load is not its load.
	if v := m.Load; v != nil && (m.Liveness == api.Alive || m.Liveness == api.Suspect) {
		row[3] = fmt.Sprintf("%.2f", v.Load)
		row[4] = fmt.Sprintf("%.0f%%", 100*v.Utilisation)
		row[5] = table.Bytes(v.MemTotal-v.MemFree) + "/" + table.Bytes(v.MemTotal)
		row[6] = fmt.Sprint(v.CPUs)
		row[7] = fmt.Sprint(v.Guests)
		row[8] = table.Age(time.Duration(m.AgeMillis) * time.Millisecond)
	}
	return row
}

func perCPU(v *api.LoadVector) float64 { return v.Load / float64(max(1, v.CPUs)) }

// loadBar is the bar beside row i; row 0 is the header.
func loadBar(i int, members []api.Member, top float64, length int) string {
	if i == 0 {
		return strings.Repeat(" ", length)
	}
	m := members[i-1]
	if m.Load == nil || (m.Liveness != api.Alive && m.Liveness != api.Suspect) {
		return strings.Repeat(" ", length)
	}
	full := int(math.Round(float64(length) * perCPU(m.Load) / top))
	full = min(max(full, 0), length)
	return strings.Repeat("#", full) + strings.Repeat(".", length-full)
}

// paint is text as a full repaint of a screen, cut to its size.
func paint(text string, width, height int) string {
	var b strings.Builder
	b.WriteString("\x1b[H")
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	for _, l := range lines[:min(len(lines), max(1, height-1))] {
		r := []rune(l)
		b.WriteString(string(r[:min(len(r), width)]) + "\x1b[K\n")
	}
	b.WriteString("\x1b[J")
	return b.String()
}
