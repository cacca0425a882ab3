package load

import (
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"mosimg/internal/api"
)

func TestDecay(t *testing.T) {
	for _, tc := range []struct{ old, sample, want float64 }{
		{0, 0, 0},
		{0, 8, 3}, // rises at 5:3
		{8, 0, 7}, // falls at 7:1
		{4, 4, 4},
		{2, 3, (5*2.0 + 3*3) / 8},
	} {
		if got := Decay(tc.old, tc.sample); got != tc.want {
			t.Errorf("Decay(%v, %v) = %v; want %v", tc.old, tc.sample, got, tc.want)
		}
	}
}

// The jobs of a busy machine must not rush to one that pauses for a second:
// after it the machine still looks as busy as it was, but for an eighth.
func TestDecayForgetsSlowlyAndLearnsFast(t *testing.T) {
	l := 0.0
	up := 0
	for ; l < 3.6; up++ {
		l = Decay(l, 4)
	}
	down := 0
	for ; l > 0.4; down++ {
		l = Decay(l, 0)
	}
	if up > 6 || down < 15 {
		t.Errorf("90 %% of a step up took %d s, down %d s; want at most 6 and at least 15", up, down)
	}
}

const stat1 = "cpu  100 0 100 800 0 0 0 0 50 0\ncpu0 50 0 50 400 0 0 0 0 0 0\ncpu1 50 0 50 400 0 0 0 0 0 0\nintr 1 2 3\nprocs_running 3\nprocs_blocked 0\n"
const stat2 = "cpu  250 0 100 850 0 0 0 0 90 0\ncpu0 50 0 50 400 0 0 0 0 0 0\ncpu1 50 0 50 400 0 0 0 0 0 0\nprocs_running 9\n"

func procDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestSample(t *testing.T) {
	const mem = "MemTotal:        2048 kB\nMemFree: 1 kB\nMemAvailable:    1024 kB\n"
	sched := func(wait string) string {
		return "version 15\ntimestamp 1\ncpu0 0 0 0 0 0 0 5 " + wait + " 7\ndomain0 3 0 0\ncpu1 0 0 0 0 0 0 5 0 7\n"
	}
	now := time.Unix(1000, 0)
	s := Sampler{Proc: procDir(t, map[string]string{"stat": stat1, "meminfo": mem, "uptime": "77.5 1\n", "schedstat": sched("1000000000")})}
	v, err := s.Sample(now)
	if err != nil {
		t.Fatal(err)
	}
	want := api.LoadVector{Seq: 1000, Load: 2 * 3 / 8.0, Utilisation: 0.2, CPUs: 2, MemTotal: 2 << 20, MemFree: 1 << 20, UptimeSec: 77}
	if d := cmp.Diff(want, v); d != "" {
		t.Errorf("first sample (-want +got):\n%s", d)
	}
	// In the next second both CPUs are busy for 3/4, and 2.5 processes wait.
	s.Proc = procDir(t, map[string]string{"stat": stat2, "meminfo": mem, "schedstat": sched("3500000000")})
	if v, err = s.Sample(now.Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	want = api.LoadVector{Seq: 1001, Load: Decay(0.75, 2*0.75+2.5), Utilisation: 0.75, CPUs: 2, MemTotal: 2 << 20, MemFree: 1 << 20}
	if d := cmp.Diff(want, v, cmpopts.EquateApprox(0, 1e-9)); d != "" {
		t.Errorf("second sample (-want +got):\n%s", d)
	}
}

// Without scheduler statistics the number of runnable processes is used,
// without ourselves.
func TestSampleWithoutSchedstat(t *testing.T) {
	s := Sampler{Proc: procDir(t, map[string]string{"stat": stat1, "meminfo": "MemTotal: 1 kB\nMemAvailable: 1 kB\n"})}
	s.Sample(time.Unix(1, 0))
	v, err := s.Sample(time.Unix(2, 0))
	if want := Decay(0.75, 2); err != nil || v.Load != want {
		t.Errorf("load = %v, %v; want %v", v.Load, err, want)
	}
}

func TestBrokenProc(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"empty":     {"stat": "", "meminfo": ""},
		"no cpu":    {"stat": "procs_running 1\n", "meminfo": ""},
		"words":     {"stat": "cpu a b c d\nprocs_running 1\n"},
		"negative":  {"stat": "cpu 1 1 1 1\nprocs_running -4\n"},
		"no memory": {"stat": stat1, "meminfo": "MemTotal: 1 kB\n"},
		"schedstat": {"stat": stat1, "meminfo": "MemTotal: 1 kB\nMemAvailable: 1 kB\n", "schedstat": "version 15\n"},
	} {
		s := Sampler{Proc: procDir(t, files)}
		if _, err := s.Sample(time.Unix(1, 0)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestThisMachine(t *testing.T) {
	var s Sampler
	v, err := s.Sample(time.Now())
	if err != nil || v.CPUs < 1 || v.MemTotal < v.MemFree || v.MemFree <= 0 {
		t.Errorf("Sample = %+v, %v", v, err)
	}
}

func vector(n api.NodeID, seq uint64) api.LoadVector {
	return api.LoadVector{Node: n, Seq: seq, Load: 1.5, Utilisation: 1, CPUs: 4, MemTotal: 8 << 30, MemFree: 1 << 30, Guests: 2, UptimeSec: 90, Speed: 10000, Blocked: seq%2 == 1, Leaving: n > 1}
}

func everybody(api.NodeID) bool { return true }

func TestWire(t *testing.T) {
	in := []Aged{{vector(1, 7), 0}, {vector(70000, math.MaxUint64), 1500 * time.Millisecond}}
	out, err := decode(encode(in))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(in, out); d != "" {
		t.Errorf("after the wire (-sent +got):\n%s", d)
	}
	many := make([]Aged, 200)
	for i := range many {
		many[i] = Aged{vector(api.NodeID(i+1), 1), 0}
	}
	if b := encode(many); len(b) > MaxMessage {
		t.Errorf("a message has %d bytes; want at most %d", len(b), MaxMessage)
	}
}

func TestWireRefuses(t *testing.T) {
	good := encode([]Aged{{vector(1, 7), 0}})
	bad := func(at int, bytes ...byte) []byte {
		b := append([]byte(nil), good...)
		copy(b[at:], bytes)
		return b
	}
	if _, err := decode(bad(1, version+1)); !errors.Is(err, ErrVersion) {
		t.Errorf("a later version: %v; want ErrVersion", err)
	}
	for name, b := range map[string][]byte{
		"empty":            {},
		"other kind":       bad(0, 'X'),
		"cut":              good[:len(good)-1],
		"node 0":           bad(2, 0, 0, 0, 0),
		"negative node":    bad(2, 0xff),
		"load NaN":         bad(2+16, 0x7f, 0xc0, 0, 0),
		"load infinite":    bad(2+16, 0x7f, 0x80, 0, 0),
		"load negative":    bad(2+16, 0xbf, 0x80, 0, 0),
		"free above total": bad(2+34, 0x7f),
		"speed negative":   bad(2+50, 0xff),
		"too long":         append([]byte{Kind, version}, make([]byte, 40*entryLen)...),
	} {
		if _, err := decode(b); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(encode([]Aged{{vector(1, 7), time.Second}}))
	f.Add([]byte{Kind, version})
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := decode(b)
		if err != nil {
			return
		}
		again, err := decode(encode(list))
		if err != nil || !cmp.Equal(list, again) {
			t.Errorf("not stable: %v, then %v, %v", list, again, err)
		}
	})
}

func FuzzProc(f *testing.F) {
	f.Add([]byte(stat1))
	f.Fuzz(func(_ *testing.T, b []byte) {
		parseStat(b)
		parseMeminfo(b)
		parseSchedstat(b)
	})
}

func TestTableKeepsTheNewest(t *testing.T) {
	now := time.Unix(10000, 0)
	tab := NewTable(1)
	take := func(at time.Time, list ...Aged) {
		t.Helper()
		if err := tab.Take(encode(list), at, everybody); err != nil {
			t.Fatal(err)
		}
	}
	seq := func() uint64 { v, _, _ := tab.Get(2, now); return v.Seq }
	take(now, Aged{vector(2, 5), time.Second})
	take(now, Aged{vector(2, 4), 0})
	if seq() != 5 {
		t.Errorf("an older vector replaced a newer one: %d", seq())
	}
	if _, age, _ := tab.Get(2, now.Add(2*time.Second)); age != 3*time.Second {
		t.Errorf("age = %v; want 3s: one on the way, two here", age)
	}
	// Its clock was set back: believed once the old vector is out of date.
	take(now.Add(30*time.Second), Aged{vector(2, 3), 0})
	if seq() != 5 {
		t.Error("lower number believed too early")
	}
	take(now.Add(2*MaxAge), Aged{vector(2, 3), 0})
	if seq() != 3 {
		t.Error("a node whose clock was set back is not believed again")
	}
	// News of ourselves from others, of strangers, and too old news.
	tab.SetOwn(vector(1, 9), now)
	take(now, Aged{vector(1, 99), 0})
	if v, _, _ := tab.Get(1, now); v.Seq != 9 {
		t.Error("another node's word about us was believed")
	}
	tab.Take(encode([]Aged{{vector(3, 1), 0}}), now, func(api.NodeID) bool { return false })
	take(now, Aged{vector(4, 1), MaxAge + time.Second})
	for n := api.NodeID(3); n <= 4; n++ {
		if _, _, ok := tab.Get(n, now); ok {
			t.Errorf("node %d is in the table", n)
		}
	}
}

func TestMessageIsOwnThenFreshest(t *testing.T) {
	now := time.Unix(10000, 0)
	tab := NewTable(7)
	if tab.Message(now) != nil {
		t.Error("a message before the first measurement")
	}
	tab.SetOwn(vector(7, 1), now.Add(-time.Second))
	for i := range 100 {
		n := api.NodeID(100 + i)
		tab.Take(encode([]Aged{{vector(n, 1), time.Duration(i) * time.Second}}), now, everybody)
	}
	list, err := decode(tab.Message(now))
	if err != nil {
		t.Fatal(err)
	}
	if list[0].Node != 7 || list[1].Node != 100 || list[2].Node != 101 {
		t.Errorf("message begins with %d, %d, %d; want ourselves, then the freshest", list[0].Node, list[1].Node, list[2].Node)
	}
	for _, v := range list {
		if v.Age > MaxAge {
			t.Errorf("news of age %v passed on", v.Age)
		}
	}
}

// A cluster of 60 nodes in a bubble: each sends to two at random each second.
// News must reach everybody in a few seconds, or mosmon shows old loads.
func TestNewsSpreads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 60
		rng := rand.New(rand.NewPCG(1, 2))
		tabs := make([]*Table, n)
		for i := range tabs {
			tabs[i] = NewTable(api.NodeID(i + 1))
		}
		var worst, sum time.Duration
		for sec := range 40 {
			for i, tab := range tabs {
				tab.SetOwn(vector(api.NodeID(i+1), uint64(sec+1)), time.Now())
			}
			for i, tab := range tabs {
				msg := tab.Message(time.Now())
				for range 2 {
					if to := rng.IntN(n); to != i {
						if err := tabs[to].Take(msg, time.Now(), everybody); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			time.Sleep(Interval)
			worst, sum = 0, 0
			for _, tab := range tabs {
				for id := api.NodeID(1); id <= n; id++ {
					_, age, ok := tab.Get(id, time.Now())
					if !ok {
						age = time.Hour
					}
					worst = max(worst, age)
					sum += age
				}
			}
		}
		mean := sum / (n * n)
		t.Logf("mean age %v, worst %v", mean, worst)
		if mean > 5*time.Second || worst > 30*time.Second {
			t.Errorf("mean age %v, worst %v; want under 5s and 30s", mean, worst)
		}
	})
}

// Once a job has left, the next must not be sent for a load that is gone.
func TestMeanFallsAtOnce(t *testing.T) {
	for _, tc := range []struct{ old, sample, want float64 }{{4, 1, 1}, {0, 8, 3}, {2, 2, 2}} {
		if got := Mean(tc.old, tc.sample); got != tc.want {
			t.Errorf("Mean(%v, %v) = %v; want %v", tc.old, tc.sample, got, tc.want)
		}
	}
}
