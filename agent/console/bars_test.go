package console

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
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

var status = api.AgentStatus{State: api.StateMember, Node: 3, Name: "node3", Address: "10.77.0.9", MAC: "52:54:00:00:00:01",
	Fingerprint: "aaaa-bbbb-cccc-dddd", Head: "https://10.77.0.1:4660", CRIU: api.CRIUStatus{Usable: true, Version: "4.1.1"}}

// cluster is of n machines, of which this is number 3.
func cluster(n int) api.MemberTable {
	t := api.MemberTable{Cluster: "c", Self: 3}
	for i := 1; i <= n; i++ {
		t.Members = append(t.Members, api.Member{Node: api.NodeID(i), Name: fmt.Sprintf("node%d", i), Liveness: api.Alive, Self: i == 3,
			Load: &api.LoadVector{Load: float64(i%4) / 2, CPUs: 1, Speed: 10000, MemTotal: 1 << 30, MemFree: int64(i%5) << 27, Guests: i % 3}})
	}
	return t
}

// What a person in front of a node sees: on a screen of a VGA text mode, on a
// larger one, and on one that is too small for a panel.
func TestPanelLines(t *testing.T) {
	four := cluster(4)
	four.Members[1].Liveness = api.Dead
	four.Members[3].Load.Blocked = true
	pending := status
	pending.State, pending.Node = api.StatePending, 0
	var all strings.Builder
	for _, tc := range []struct {
		name          string
		st            api.AgentStatus
		t             api.MemberTable
		width, height int
	}{
		{"80x25", status, four, 80, 25},
		{"40x25", status, four, 40, 25},
		{"128x48", status, cluster(12), 128, 48},
		{"80x25, 200 nodes", status, cluster(200), 80, 25},
		{"80x25, no member yet", pending, api.MemberTable{}, 80, 25},
		{"80x12", status, four, 80, 12},
		{"20x25", status, four, 20, 25},
		{"no size", status, four, 0, 0},
	} {
		lines := panelLines(tc.st, tc.t, tc.width, tc.height)
		fmt.Fprintf(&all, "== %s\n%s\n", tc.name, strings.Join(lines, "\n"))
		if len(lines) > 0 && len(lines) > tc.height-logRows {
			t.Errorf("%s: %d lines leave no room for messages", tc.name, len(lines))
		}
		for _, l := range lines {
			if utf8.RuneCountInString(l) >= tc.width {
				t.Errorf("%s: too long: %q", tc.name, l)
			}
		}
	}
	golden(t, "panel.txt", all.String())
}

// A panel must not scroll the messages below it, nor they it; and a screen is
// given back whole.
func TestPanelStaysInPlace(t *testing.T) {
	var p panel
	first := p.draw([]string{"a", "b", "-"}, 25)
	if !strings.HasPrefix(first, "\x1b[4;25r\x1b[25;1H") {
		t.Errorf("the first drawing is %q; want the messages below line 3 and the cursor there", first)
	}
	again := p.draw([]string{"c", "b", "-"}, 25)
	if !strings.HasPrefix(again, "\x1b7\x1b[1;1H") || !strings.HasSuffix(again, "\x1b8") || strings.ContainsAny(again, "\n\r") || strings.Contains(again, "r\x1b[25") {
		t.Errorf("the second drawing is %q; want it in place, and the cursor where it was", again)
	}
	if less := p.draw([]string{"a", "-"}, 25); !strings.HasPrefix(less, "\x1b[3;25r\x1b[25;1H") || !strings.Contains(less, "\x1b[3;1H\x1b[K") {
		t.Errorf("a smaller panel: %q; want the line that it leaves blank", less)
	}
	if other := p.draw([]string{"a", "-"}, 50); !strings.HasPrefix(other, "\x1b[3;50r") {
		t.Errorf("on another size: %q", other)
	}
	if end := p.draw(nil, 10); end != "\x1b7\x1b[r\x1b8" {
		t.Errorf("on a screen too small: %q; want it given back", end)
	}
	if end := p.leave(); end != "" {
		t.Errorf("given back twice: %q", end)
	}
}

// record keeps what is shown.
type record struct {
	mu   sync.Mutex
	text strings.Builder
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

// take is what was shown since it was last asked.
func (r *record) take() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	defer r.text.Reset()
	return r.text.String()
}

// source is what a test lets a console show.
type source struct {
	mu sync.Mutex
	t  api.MemberTable
}

func (s *source) Source() Source {
	return Source{Status: func() api.AgentStatus { return status }, Members: func() api.MemberTable {
		s.mu.Lock()
		defer s.mu.Unlock()
		t := s.t
		t.Members = append([]api.Member(nil), t.Members...)
		return t
	}}
}

func (s *source) set(f func(*api.MemberTable)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.t)
}

// A serial line keeps what was printed, often in a file: an hour of changing loads
// adds nothing, and a node that goes adds one line.
func TestSerialLineTellsChangesOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		src := &source{t: cluster(3)}
		var out record
		enter := make(chan struct{})
		go Show(ctx, &out, src.Source(), nil, enter)
		time.Sleep(1500 * time.Millisecond)
		var all strings.Builder
		step := func(name string) {
			text := out.take()
			fmt.Fprintf(&all, "== %s\n%s", name, text)
		}
		step("three members")
		for i := range 3600 {
			src.set(func(t *api.MemberTable) {
				v := *t.Members[0].Load
				v.Load, v.Guests, v.MemFree = float64(i%9), i%5, int64(i)<<10
				t.Members[0].Load = &v
			})
			time.Sleep(time.Second)
		}
		step("an hour later")
		for range 10 { // a busy node misses a probe now and then
			src.set(func(t *api.MemberTable) { t.Members[1].Liveness = api.Suspect })
			time.Sleep(3 * time.Second)
			src.set(func(t *api.MemberTable) { t.Members[1].Liveness = api.Alive })
			time.Sleep(3 * time.Second)
		}
		step("node 2 was suspect now and then")
		src.set(func(t *api.MemberTable) { t.Members[1].Liveness = api.Dead })
		time.Sleep(5 * time.Second)
		step("node 2 is dead")
		src.set(func(t *api.MemberTable) { *t = cluster(60); t.Members[2].Load.Leaving = true })
		time.Sleep(5 * time.Second)
		step("57 more have joined, node 2 is back, node 3 is leaving")
		src.set(func(t *api.MemberTable) { *t = cluster(2) })
		time.Sleep(5 * time.Second)
		enter <- struct{}{}
		time.Sleep(time.Second)
		step("Enter")
		cancel()
		synctest.Wait()
		golden(t, "serial.txt", all.String())
	})
}

// The panel is drawn each second, and taken away at the end.
func TestPanel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		src := &source{t: cluster(3)}
		var out record
		go Panel(ctx, &out, func() (int, int) { return 80, 25 }, src.Source())
		time.Sleep(500 * time.Millisecond)
		if text := out.take(); !strings.Contains(text, "node3 *") {
			t.Errorf("at first: %q", text)
		}
		src.set(func(t *api.MemberTable) { t.Members[0].Name = "renamed" })
		time.Sleep(time.Second)
		if text := out.take(); !strings.Contains(text, "renamed") || strings.Contains(text, "\n") {
			t.Errorf("a second later: %q", text)
		}
		cancel()
		synctest.Wait()
		if text := out.take(); text != "\x1b7\x1b[r\x1b8" {
			t.Errorf("at the end: %q; want the whole screen for messages", text)
		}
	})
}

func TestIsScreen(t *testing.T) {
	for dev, want := range map[string]bool{"/dev/tty0": true, "/dev/tty12": true, "/dev/ttyS0": false, "/dev/ttyAMA0": false, "/dev/hvc0": false, "/dev/tty": false} {
		if got := isScreen(dev); got != want {
			t.Errorf("isScreen(%q) = %v; want %v", dev, got, want)
		}
	}
}
