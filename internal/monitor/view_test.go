package monitor

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/api"
)

// press gives a view some keys, on a screen of 80x24 with so many nodes.
func press(t *testing.T, v View, nodes int, keys ...Key) View {
	t.Helper()
	s := Snapshot{Table: big(nodes), Known: true}
	for _, k := range keys {
		var quit bool
		if v, quit = v.Press(k, s, 80, 24); quit {
			t.Fatalf("key %d ends it", k)
		}
	}
	return v
}

// The keys are MOSIX's: who knows mon finds them without the help.
func TestPress(t *testing.T) {
	for _, tc := range []struct {
		keys string
		want View
	}{
		{"m", View{Display: Memory}},
		{"r", View{Display: Memory}},
		{"s", View{Display: Speed}},
		{"u", View{Display: Utilisation}},
		{"ml", View{Display: Load}},
		{"mL", View{Display: Load}},
		{"g", View{Display: Guests}},
		{"n", View{Display: Table}},
		{"w", View{Numbering: Wide}},
		{"v", View{Numbering: Vertical}},
		{"V", View{Numbering: Tight}},
		{"Va", View{Numbering: Auto}},
		{"d", View{HideDead: true}},
		{"dd", View{}},
		{"t", View{Total: true}},
		{"tt", View{}},
		{"h", View{Help: true}},
		{"hm", View{}}, // leaves the help, and is no more than that
		{"xyz%\x00", View{}},
	} {
		var keys []Key
		for _, r := range tc.keys {
			keys = append(keys, Key(r))
		}
		if d := cmp.Diff(tc.want, press(t, View{}, 5, keys...)); d != "" {
			t.Errorf("%q (-want +got):\n%s", tc.keys, d)
		}
	}
	for _, k := range []Key{'q', 'Q', CtrlC} {
		for _, v := range []View{{}, {Help: true}} {
			if _, quit := v.Press(k, Snapshot{}, 80, 24); !quit {
				t.Errorf("key %d does not end it (%+v)", k, v)
			}
		}
	}
}

// Every node can be reached when not all of them fit, and none is lost at the ends.
func TestPaging(t *testing.T) {
	page := 80 - gauge // of tight columns
	for _, tc := range []struct {
		keys []Key
		want api.NodeID
	}{
		{[]Key{Right}, 2},
		{[]Key{Right, Left}, 1},
		{[]Key{Left}, 1},
		{[]Key{PageUp}, 1},
		{[]Key{PageDown}, api.NodeID(1 + page)},
		{[]Key{' ', PageUp}, 1},
		{[]Key{End}, api.NodeID(200 - page + 1)},
		{[]Key{End, Right}, api.NodeID(200 - page + 1)},
		{[]Key{PageDown, PageDown, PageDown}, api.NodeID(200 - page + 1)},
		{[]Key{End, Home}, 1},
		{[]Key{Down, Down, Up}, 2},
	} {
		v := press(t, View{}, 200, tc.keys...)
		s := Snapshot{Table: big(200)}
		if got := s.Table.Members[v.first(s.Table.Members, page)].Node; got != tc.want {
			t.Errorf("keys %v: the first node is %d; want %d", tc.keys, got, tc.want)
		}
	}
	// All fit: nothing moves. None is there: nothing breaks.
	if v := press(t, View{}, 5, Right, PageDown, End); v.first(big(5).Members, 5) != 0 {
		t.Errorf("five nodes that fit moved: %+v", v)
	}
	if v, _ := (View{}).Press(Right, Snapshot{}, 80, 24); v != (View{}) {
		t.Errorf("without nodes: %+v", v)
	}
	v := press(t, View{}, 5, 'h', PageDown, Down, PageDown, Up)
	if !v.Help || v.HelpLine < 0 || v.HelpLine >= len(help) {
		t.Errorf("paging of the help: %+v", v)
	}
}

func TestKeys(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want []Key
		rest string
	}{
		{"q", []Key{'q'}, ""},
		{"lé", []Key{'l', 'é'}, ""},
		{"\x1b[A\x1b[B\x1b[C\x1b[D", []Key{Up, Down, Right, Left}, ""},
		{"\x1bOA\x1bOH", []Key{Up, Home}, ""},
		{"\x1b[5~\x1b[6~\x1b[1~\x1b[4~\x1b[H\x1b[F", []Key{PageUp, PageDown, Home, End, Home, End}, ""},
		{"\x1b[1;5C\x1b[15~q", []Key{Right, Other, 'q'}, ""},
		{"m\x1b[", []Key{'m'}, "\x1b["},
		{"\x1b", nil, "\x1b"},
		{"\x1bq", []Key{Other, 'q'}, ""},
		{"\xc3", nil, "\xc3"},
		{"\xff\x03", []Key{Other, CtrlC}, ""},
		{"\x1b[0123456789012345678q", append([]Key{Other}, []Key{'0', '1', '2', '3', '4', '5', '6', '7', '8', '9', '0', '1', '2', '3', '4', '5', '6', '7', '8', 'q'}...), ""},
	} {
		keys, rest := Keys([]byte(tc.in))
		if !slices.Equal(keys, tc.want) || string(rest) != tc.rest {
			t.Errorf("Keys(%q) = %v, %q; want %v, %q", tc.in, keys, rest, tc.want, tc.rest)
		}
	}
}

// Whatever a terminal sends, reading it ends, and what is kept is short.
func FuzzKeys(f *testing.F) {
	for _, s := range []string{"q", "\x1b[A", "\x1b[5~", "\x1b[", "\xc3\xa9", "\x1b\x1b[C", "\x1b[9999999999999999999"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		keys, rest := Keys(b)
		if len(keys) > len(b) || len(rest) >= maxSequence || string(rest) != string(b[len(b)-len(rest):]) {
			t.Errorf("Keys(%q) = %v, %q", b, keys, rest)
		}
		v, s := View{}, Snapshot{Table: big(50), Known: true}
		for _, k := range keys {
			v, _ = v.Press(k, s, 40, 12)
			Render(v, s, 40, 12)
		}
	})
}
