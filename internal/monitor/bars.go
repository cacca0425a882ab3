package monitor

import (
	"fmt"
	"math"
	"strings"

	"mosimg/internal/api"
	"mosimg/internal/table"
)

// maxGuestMarks is how many guests are shown one by one beside their number.
const maxGuestMarks = 8

// Bars is one line for each machine, below a header: a bar of the load
// of its CPUs, one of its memory, and its guests.
func Bars(members []api.Member, width int) []string {
	rows := [][]string{{"NODE", "NAME", "STATE", "LOAD", "MEM", "GUESTS"}}
	const loadCol, memCol = 3, 4
	top := 1.0
	for _, m := range members {
		name := table.Printable(m.Name)
		if m.Self {
			name += " *"
		}
		row := []string{fmt.Sprint(m.Node), name, table.Printable(State(m)), "-", "-", "-"}
		if v := news(m); v != nil {
			top = math.Max(top, relativeLoad(v))
			row[3] = fmt.Sprintf("%5.2f", relativeLoad(v))
			row[4] = fmt.Sprintf("%4s", percent(memoryUsed(v)))
			row[5] = strings.TrimSpace(fmt.Sprintf("%d %s", v.Guests, strings.Repeat("o", max(0, min(v.Guests, maxGuestMarks)))))
		}
		rows = append(rows, row)
	}
	if length := min((width-table.Width(rows))/2-1, maxBar); length >= minBar {
		for i, m := range members {
			if v := news(m); v != nil {
				rows[i+1][loadCol] += " " + bar(relativeLoad(v)/top, length)
				rows[i+1][memCol] += " " + bar(memoryUsed(v), length)
			}
		}
	}
	lines := strings.Split(strings.TrimSuffix(table.Align(rows, 1, 2, loadCol, memCol, 5), "\n"), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimRight(cut(l, width), " ")
	}
	return lines
}
