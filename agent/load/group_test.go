package load

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// groupDir makes a control group and a procfs of files.
func groupDir(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A job that is given half a CPU and wants one counts as one: else two jobs on
// a CPU would look like one, and never be told apart from it.
func TestGroupCountsWhoWaits(t *testing.T) {
	dir := groupDir(t, map[string]string{
		"cpu.stat": "usage_usec 1000000\nuser_usec 1\n", "cgroup.procs": "7\n8\n",
		"7/statm": "100 10 0 0 0 0 0\n", "7/task/7/schedstat": "500 1000000000 1\n", "7/task/9/schedstat": "500 0 1\n",
		"8/statm": "100 5 0 0 0 0 0\n", // its threads have just ended
	})
	g := Group{Dir: dir, Proc: dir}
	now := time.Unix(100, 0)
	page := int64(os.Getpagesize())
	u, err := g.Sample(now)
	if want := (Use{CPU: time.Second, Bytes: 15 * page, Counted: true}); err != nil || u != want {
		t.Errorf("first sample: %+v, %v; want %+v", u, err, want)
	}
	for name, text := range map[string]string{"cpu.stat": "usage_usec 2000000\n", "7/task/7/schedstat": "500 1500000000 2\n", "7/task/9/schedstat": "500 500000000 2\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	u, err = g.Sample(now.Add(2 * time.Second))
	if want := (Use{Load: 1, CPU: 2 * time.Second, Bytes: 15 * page, Counted: true}); err != nil || u != want {
		t.Errorf("second sample: %+v, %v; want %+v: two threads with half a CPU, and half of the time waiting", u, err, want)
	}
	if _, err := (&Group{Dir: filepath.Join(dir, "none")}).Sample(now); !Gone(err) {
		t.Errorf("a group that is gone: %v", err)
	}
}

// The real thing: one busy loop is a load of one, whatever else runs here.
func TestGroupOfThisKernel(t *testing.T) {
	loop := exec.Command("sh", "-c", "while :; do :; done")
	if err := loop.Start(); err != nil {
		t.Fatal(err)
	}
	defer loop.Wait()
	defer loop.Process.Kill()
	// The CPU's part comes from the group; its part of waiting is the kernel's.
	dir := groupDir(t, map[string]string{"cpu.stat": "usage_usec 0\n", "cgroup.procs": fmt.Sprintln(loop.Process.Pid)})
	g := Group{Dir: dir}
	u, err := g.Sample(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if !u.Counted {
		t.Skip("this kernel has no schedstat for threads")
	}
	if u.Bytes <= 0 {
		t.Errorf("a shell takes %d bytes", u.Bytes)
	}
}

func TestPressure(t *testing.T) {
	for _, tc := range []struct {
		psi  string
		want float64
		bad  bool
	}{
		{"some avg10=3.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=12.50 avg60=0.00 avg300=0.00 total=1\n", 0.125, false},
		{"some avg10=3.00\n", 0, true},
		{"full avg10=NaN avg60=0\n", 0, true},
		{"full avg60=1 avg10=1\n", 0, true},
	} {
		s := Sampler{Proc: groupDir(t, map[string]string{"pressure/memory": tc.psi})}
		if got, err := s.Pressure(); got != tc.want || (err != nil) != tc.bad {
			t.Errorf("%q: %v, %v; want %v", tc.psi, got, err, tc.want)
		}
	}
	if got, err := (&Sampler{Proc: t.TempDir()}).Pressure(); got != 0 || err != nil {
		t.Errorf("without PSI: %v, %v", got, err)
	}
}

func FuzzGroup(f *testing.F) {
	f.Add("usage_usec 5", "1 2 3", "100 5 0", "full avg10=1.00")
	f.Fuzz(func(t *testing.T, usage, schedstat, statm, psi string) {
		d, err1 := parseUsage(usage)
		w, err2 := parseWaited(schedstat)
		p, err3 := parsePressure(psi)
		if d < 0 || w < 0 || !(p >= 0 && p <= 1) || parseResident(statm) < 0 {
			t.Errorf("%v %v, %v %v, %v %v, %d", d, err1, w, err2, p, err3, parseResident(statm))
		}
	})
}

// Measurements that differ much would make nodes that are alike look unlike, and
// send jobs round. The limit is wide: the neighbours of a virtual CPU
// slow it down for seconds. One takes less CPU than a user notices.
func TestSpeedRepeats(t *testing.T) {
	var speeds []int
	began, err := processTime()
	if err != nil {
		t.Fatal(err)
	}
	const runs = 3
	for range runs {
		s, err := Speed(time.Millisecond)
		if err != nil || s < 1 {
			t.Fatalf("Speed = %d, %v", s, err)
		}
		speeds = append(speeds, s)
	}
	ended, err := processTime()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("speeds %v, %v of CPU for each", speeds, (ended-began)/runs)
	if low, high := slices.Min(speeds), slices.Max(speeds); float64(high) > 1.5*float64(low) {
		t.Errorf("speeds %v of one CPU", speeds)
	}
	if each := (ended - began) / runs; each > 500*time.Millisecond {
		t.Errorf("a measurement takes %v of CPU time", each)
	}
}

func processTime() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano()), err
}
