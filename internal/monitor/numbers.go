package monitor

import (
	"fmt"
	"math"
	"strings"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/table"
)

const (
	// minBar is the shortest load bar worth showing, maxBar the longest.
	minBar = 4
	maxBar = 20
)

// noMembers is what is shown while the machine belongs to no cluster.
const noMembers = "This machine is not a member of a cluster; mosagent status says why."

// Numbers is the cluster as a table: a header and one line for each machine,
// no wider than width if the names allow it. A load that nobody has heard of
// is "-", never 0.
func Numbers(members []api.Member, width int) string {
	if len(members) == 0 {
		return noMembers + "\n"
	}
	rows := [][]string{{"NODE", "NAME", "STATE", "LOAD", "UTIL", "MEM", "CPUS", "SPEED", "GUESTS", "AGE"}}
	const loadCol = 3
	top := 1.0 // the bar's full length: the highest load of a CPU, at least one
	for _, m := range members {
		if v := news(m); v != nil {
			top = math.Max(top, relativeLoad(v))
		}
		rows = append(rows, numbersOf(m))
	}
	// The bar takes what is left of the line.
	if length := min(width-table.Width(rows)-1, maxBar); length >= minBar {
		rows[0][loadCol] += strings.Repeat(" ", length+1)
		for i, m := range members {
			if v := news(m); v != nil {
				rows[i+1][loadCol] += " " + bar(relativeLoad(v)/top, length)
			} else {
				rows[i+1][loadCol] += strings.Repeat(" ", length+1)
			}
		}
	}
	return table.Align(rows, 1, 2)
}

func numbersOf(m api.Member) []string {
	name := table.Printable(m.Name)
	if m.Self {
		name += " *"
	}
	row := []string{fmt.Sprint(m.Node), name, table.Printable(State(m)), "-", "-", "-", "-", "-", "-", "-"}
	if v := news(m); v != nil {
		row[3] = fmt.Sprintf("%.2f", v.Load)
		row[4] = percent(v.Utilisation)
		row[5] = table.Bytes(v.MemTotal-v.MemFree) + "/" + table.Bytes(v.MemTotal)
		row[6] = fmt.Sprint(v.CPUs)
		if v.Speed > 0 {
			row[7] = fmt.Sprint(v.Speed)
		}
		row[8] = fmt.Sprint(v.Guests)
		row[9] = table.Age(time.Duration(m.AgeMillis) * time.Millisecond)
	}
	return row
}

func percent(x float64) string { return fmt.Sprintf("%.0f%%", 100*x) }

// bar is a part of a whole as a line of characters.
func bar(part float64, length int) string {
	full := int(math.Round(float64(length) * share(part)))
	return strings.Repeat("#", full) + strings.Repeat(".", length-full)
}
