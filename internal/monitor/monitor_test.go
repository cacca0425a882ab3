package monitor

import (
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/api"
)

var update = flag.Bool("update", false, "write golden files; the tests then fail, so that it is not left on")

func golden(t *testing.T, name, got string) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		os.MkdirAll("testdata", 0o755)
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Errorf("%s written; run again without -update", name)
		return
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got):\n%s", name, d)
	}
}

func vector(load, use float64, cpus, speed, guests int) *api.LoadVector {
	return &api.LoadVector{Load: load, Utilisation: use, CPUs: cpus, Speed: speed, Guests: guests, MemTotal: 4 << 30, MemFree: 1 << 30}
}

// small is a cluster with each state that a machine can be in.
func small() api.MemberTable {
	t := api.MemberTable{Cluster: "c", Self: 1, Members: []api.Member{
		{Node: 1, Name: "head", Self: true, Liveness: api.Alive, Load: vector(0, 0.03, 4, 10000, 0), AgeMillis: 400},
		{Node: 2, Name: "node2", Liveness: api.Alive, Load: vector(8, 1, 4, 10000, 3), AgeMillis: 1200},
		{Node: 3, Name: "node3", Liveness: api.Dead, Load: vector(3, 1, 1, 9000, 1), AgeMillis: 99000},
		{Node: 5, Name: "attic", Liveness: api.Alive, Load: vector(1, 0.5, 2, 2500, 1), AgeMillis: 300},
		{Node: 7, Name: "cellar", Liveness: api.Alive, Load: vector(0.3, 0.1, 1, 0, 0), AgeMillis: 800},
		{Node: 11, Name: "küche\x1b[2J", Liveness: api.Suspect},
	}}
	t.Members[3].Load.Blocked = true
	t.Members[3].Load.MemTotal, t.Members[3].Load.MemFree = 512<<20, 30<<20
	t.Members[4].Load.Leaving = true
	return t
}

// big is a cluster of n machines, the last of which is dead.
func big(n int) api.MemberTable {
	t := api.MemberTable{Cluster: "c", Self: 2}
	for i := 1; i <= n; i++ {
		m := api.Member{Node: api.NodeID(i), Name: fmt.Sprintf("node%d", i), Liveness: api.Alive, Self: i == 2,
			Load: vector(float64(i%7)/2, float64(i%5)/4, 1+i%4, 5000+i*40, i%3), AgeMillis: int64(i)}
		m.Load.MemTotal, m.Load.MemFree = int64(1+i%8)<<30, int64(i%5)<<28
		t.Members = append(t.Members, m)
	}
	t.Members[n-1].Liveness = api.Dead
	return t
}

// What a user sees, on screens of a desk, of a phone and of a printer.
func TestRender(t *testing.T) {
	gone := "no news for 12 s: ask the agent /run/mosimg/agent.sock: it is not running on this machine (start it, or run this on the head)"
	for _, tc := range []struct {
		name          string
		v             View
		s             Snapshot
		width, height int
	}{
		{"load", View{}, Snapshot{Table: small(), Known: true}, 80, 24},
		{"load-40x12", View{}, Snapshot{Table: small(), Known: true}, 40, 12},
		{"memory", View{Display: Memory, Total: true}, Snapshot{Table: small(), Known: true}, 80, 24},
		{"memory-40x12", View{Display: Memory, Total: true}, Snapshot{Table: small(), Known: true}, 40, 12},
		{"speed", View{Display: Speed}, Snapshot{Table: small(), Known: true}, 80, 24},
		{"utilisation", View{Display: Utilisation, HideDead: true}, Snapshot{Table: small(), Known: true}, 80, 24},
		{"guests", View{Display: Guests, Numbering: Vertical}, Snapshot{Table: small(), Known: true}, 80, 24},
		{"table", View{Display: Table, Total: true}, Snapshot{Table: small(), Known: true}, 80, 24},
		{"table-40x12", View{Display: Table}, Snapshot{Table: big(30), Known: true}, 40, 12},
		{"one", View{}, Snapshot{Table: api.MemberTable{Members: small().Members[:1]}, Known: true}, 80, 24},
		{"nodes-36", View{Display: Memory}, Snapshot{Table: big(36), Known: true}, 80, 24},
		{"nodes-200", View{First: 60}, Snapshot{Table: big(200), Known: true}, 80, 24},
		{"nodes-200-wide", View{Numbering: Wide, First: 195}, Snapshot{Table: big(200), Known: true}, 80, 24},
		{"nodes-200-screen", View{}, Snapshot{Table: big(200), Known: true}, 210, 50},
		{"help", View{Help: true}, Snapshot{Table: small(), Known: true}, 80, 24},
		{"help-40x12", View{Help: true, HelpLine: 5}, Snapshot{Table: small(), Known: true}, 40, 12},
		{"gone", View{}, Snapshot{Table: small(), Known: true, Problem: gone}, 80, 24},
		{"gone-40x12", View{}, Snapshot{Table: small(), Known: true, Problem: gone}, 40, 12},
		{"never", View{}, Snapshot{Problem: gone}, 40, 12},
		{"waiting", View{}, Snapshot{}, 40, 12},
		{"no-member", View{}, Snapshot{Known: true}, 40, 12},
		{"all-dead", View{HideDead: true}, Snapshot{Known: true, Table: api.MemberTable{Members: small().Members[2:3]}}, 40, 12},
		{"too-small", View{}, Snapshot{Known: true, Table: small()}, 12, 4},
	} {
		f := Render(tc.v, tc.s, tc.width, tc.height)
		golden(t, tc.name+".txt", strings.Join(f.Lines(), "\n")+"\n")
	}
	golden(t, "colours.txt", strings.Join(Render(View{}, Snapshot{Table: small(), Known: true}, 40, 12).Coloured(), "\n")+"\n")
}

// A frame larger than the screen would scroll it; one that cannot be drawn would end mosmon.
func TestRenderFits(t *testing.T) {
	tables := []api.MemberTable{{}, small(), big(1), big(9), big(200)}
	odd := small()
	odd.Members[1].Load = &api.LoadVector{}
	odd.Members[0].Load = &api.LoadVector{Load: 1e300, Utilisation: 7, CPUs: math.MaxInt32, Speed: math.MaxInt32, MemTotal: math.MaxInt64, Guests: math.MaxInt32}
	odd.Members[3].Load = &api.LoadVector{Load: -1, CPUs: -1, Speed: 1, MemTotal: 1, MemFree: 9, Guests: -4}
	odd.Members[4].Name = strings.Repeat("name", 100)
	odd.Members[5].Node = math.MaxInt32
	tables = append(tables, odd)
	for _, table := range tables {
		for _, d := range []Display{0, Load, Memory, Speed, Utilisation, Guests, Table} {
			for _, n := range []Numbering{Auto, Wide, Vertical, Tight} {
				for _, size := range [][2]int{{0, 0}, {1, 1}, {20, 6}, {21, 7}, {40, 10}, {40, 12}, {80, 24}, {81, 25}, {300, 90}, {500, 6}, {20, 200}} {
					for _, problem := range []string{"", strings.Repeat("something is wrong ", 20)} {
						v := View{Display: d, Numbering: n, Total: true, First: 4}
						lines := Render(v, Snapshot{Table: table, Known: true, Problem: problem}, size[0], size[1]).Lines()
						if len(lines) != size[1] {
							t.Fatalf("%+v on %v: %d lines", v, size, len(lines))
						}
						for _, l := range lines {
							if utf8.RuneCountInString(l) > size[0] || strings.ContainsAny(l, "\x1b\n\r") {
								t.Fatalf("%+v on %v: line %q", v, size, l)
							}
						}
					}
				}
			}
		}
	}
}

// A load is told for the machine's CPUs and their speed: four processes on
// four CPUs of half the speed wait as long as two on one.
func TestRelativeLoad(t *testing.T) {
	for _, tc := range []struct {
		v    api.LoadVector
		want float64
	}{
		{api.LoadVector{Load: 1, CPUs: 1, Speed: ReferenceSpeed}, 1},
		{api.LoadVector{Load: 4, CPUs: 4, Speed: ReferenceSpeed / 2}, 2},
		{api.LoadVector{Load: 4, CPUs: 1, Speed: 2 * ReferenceSpeed}, 2},
		{api.LoadVector{Load: 3, CPUs: 2}, 1.5}, // not measured yet
		{api.LoadVector{Load: 3}, 3},
	} {
		if got := relativeLoad(&tc.v); got != tc.want {
			t.Errorf("relativeLoad(%+v) = %v; want %v", tc.v, got, tc.want)
		}
	}
}

func TestScale(t *testing.T) {
	for _, tc := range [][2]float64{{0, 1}, {0.3, 0.5}, {1, 1}, {1.01, 2}, {2, 2}, {4.9, 5}, {5.1, 10}, {9999, 10000}, {10000, 10000}, {math.NaN(), 1}, {math.Inf(1), 1}} {
		if got := roundUp(tc[0]); math.Abs(got-tc[1]) > 1e-9 {
			t.Errorf("roundUp(%v) = %v; want %v", tc[0], got, tc[1])
		}
	}
	for x, want := range map[float64]string{0: "0", 0.5: "0.50", 1: "1", 2.25: "2.25", 12.4: "12", 20000: "20000", 1e6: "1e+06"} {
		if got := number(x); got != want {
			t.Errorf("number(%v) = %q; want %q", x, got, want)
		}
	}
}

// The higher bar is that of the machine that is worse off, in each layout.
func TestBarsKeepTheOrder(t *testing.T) {
	for _, n := range []Numbering{Wide, Vertical, Tight} {
		table := api.MemberTable{}
		for i := 1; i <= 5; i++ {
			table.Members = append(table.Members, api.Member{Node: api.NodeID(i), Liveness: api.Alive, Load: vector(float64(i)*2, 1, 10, 10000, 0)})
		}
		lines := Render(View{Numbering: n}, Snapshot{Table: table, Known: true}, 80, 24).Lines()
		count := func(i int) int {
			cols := arrange(n, 5, 1, 80)
			from := gauge + i*cols.width
			sum := 0
			for _, l := range lines[1:23] {
				if l += strings.Repeat(" ", 80); strings.Contains(l[from:from+cols.width], "#") {
					sum++
				}
			}
			return sum
		}
		for i := range 4 {
			if count(i) >= count(i+1) {
				t.Errorf("numbering %c: load %d has %d rows, load %d has %d", n, i+1, count(i), i+2, count(i+1))
			}
		}
	}
}

// The text for a printer shows each machine once.
func TestTextShowsAllNodes(t *testing.T) {
	text := Text(View{Numbering: Wide}, big(30), 80, 24)
	for i := 1; i <= 30; i++ {
		if n := strings.Count(text, fmt.Sprintf(" node%d ", i)) + strings.Count(text, fmt.Sprintf(" node%d\n", i)); n != 1 {
			t.Errorf("node%d is there %d times", i, n)
		}
	}
	if strings.Contains(text, "q)uit") {
		t.Error("keys are told to somebody who cannot press any")
	}
	if text := Text(View{Display: Table, Total: true}, big(200), 80, 24); strings.Count(text, "\n") != 202 {
		t.Errorf("the table of 200 nodes has %d lines", strings.Count(text, "\n"))
	}
	for _, tc := range []struct {
		table api.MemberTable
		want  string
	}{{api.MemberTable{}, "not a member"}, {api.MemberTable{Members: small().Members[2:3]}, "dead"}} {
		for _, d := range []Display{Load, Table} {
			if got := Text(View{Display: d, HideDead: true}, tc.table, 80, 24); !strings.Contains(got, tc.want) {
				t.Errorf("%c: %q; want %q", d, got, tc.want)
			}
		}
	}
}

func TestNumbers(t *testing.T) {
	golden(t, "numbers.txt", Numbers(small().Members, 92))
	if narrow := Numbers(small().Members, 60); strings.Contains(narrow, "#") {
		t.Errorf("a bar in 60 columns:\n%s", narrow)
	}
	for width := 79; width < 200; width++ {
		for line := range strings.Lines(Numbers(small().Members, width)) {
			if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > width {
				t.Fatalf("width %d: a line of %d:\n%s", width, n, line)
			}
		}
	}
}
