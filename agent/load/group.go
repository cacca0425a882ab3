package load

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Group measures the processes of one control group, without a controller. It
// is not safe for concurrent use.
type Group struct {
	// Dir is the group's folder.
	Dir string
	// Proc is where procfs is mounted; "" means /proc.
	Proc string

	at     time.Time
	cpu    time.Duration
	waited map[int]time.Duration // by thread
}

// Use is what the processes of a group take.
type Use struct {
	// Load is the mean number of threads that ran or waited for a CPU since the
	// sample before; 0 in the first.
	Load  float64
	CPU   time.Duration // that they have used, those too that have ended
	Bytes int64         // resident; shared pages count for each process
	// Counted is not set if the kernel does not tell how long threads wait
	// (CONFIG_SCHED_INFO): Load is then what they were given and not what they want.
	Counted bool
}

// Sample measures. Processes end while they are looked at: what is gone counts
// as nothing.
func (g *Group) Sample(now time.Time) (Use, error) {
	var u Use
	data, err := os.ReadFile(filepath.Join(g.Dir, "cpu.stat"))
	if err != nil {
		return u, err
	}
	if u.CPU, err = parseUsage(string(data)); err != nil {
		return u, fmt.Errorf("%s/cpu.stat: %w", g.Dir, err)
	}
	data, err = os.ReadFile(filepath.Join(g.Dir, "cgroup.procs"))
	if err != nil {
		return u, err
	}
	proc := g.Proc
	if proc == "" {
		proc = "/proc"
	}
	waited := make(map[int]time.Duration)
	var wait time.Duration
	for pid := range strings.FieldsSeq(string(data)) {
		dir := filepath.Join(proc, pid)
		if data, err := os.ReadFile(filepath.Join(dir, "statm")); err == nil {
			u.Bytes += parseResident(string(data))
		}
		threads, _ := os.ReadDir(filepath.Join(dir, "task"))
		for _, th := range threads {
			data, err := os.ReadFile(filepath.Join(dir, "task", th.Name(), "schedstat"))
			tid, aerr := strconv.Atoi(th.Name())
			if err != nil || aerr != nil {
				continue
			}
			w, err := parseWaited(string(data))
			if err != nil {
				return u, fmt.Errorf("%s/task/%d/schedstat: %w", dir, tid, err)
			}
			u.Counted = true
			waited[tid] = w
			// A number may have come again since the last sample.
			if d := w - g.waited[tid]; d > 0 {
				wait += d
			}
		}
	}
	if passed := now.Sub(g.at); !g.at.IsZero() && passed > 0 {
		u.Load = float64(max(0, u.CPU-g.cpu)+wait) / float64(passed)
	}
	g.at, g.cpu, g.waited = now, u.CPU, waited
	return u, nil
}

// parseUsage finds usage_usec in cpu.stat (Documentation/admin-guide/cgroup-v2.rst).
func parseUsage(stat string) (time.Duration, error) {
	for line := range strings.Lines(stat) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "usage_usec" {
			us, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil || us < 0 || us > int64(1<<63-1)/int64(time.Microsecond) {
				return 0, fmt.Errorf("usage_usec %q", f[1])
			}
			return time.Duration(us) * time.Microsecond, nil
		}
	}
	return 0, errors.New("no line usage_usec")
}

// parseWaited reads a thread's schedstat: nanoseconds that it ran, and that it
// waited to run, and how often (Documentation/scheduler/sched-stats.rst).
func parseWaited(stat string) (time.Duration, error) {
	f := strings.Fields(stat)
	if len(f) != 3 {
		return 0, fmt.Errorf("%q is not three numbers", stat)
	}
	ns, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil || ns < 0 {
		return 0, fmt.Errorf("waiting time %q", f[1])
	}
	return time.Duration(ns), nil
}

// parseResident reads /proc/PID/statm: pages in all, resident, ...
func parseResident(statm string) int64 {
	f := strings.Fields(statm)
	if len(f) < 2 {
		return 0
	}
	n, err := strconv.ParseInt(f[1], 10, 40)
	if err != nil || n < 0 {
		return 0
	}
	return n * int64(os.Getpagesize())
}

// Pressure is the share of the last 10 s, 0 to 1, in which every process of the
// machine waited for memory; 0 if the kernel does not tell (CONFIG_PSI).
func (s *Sampler) Pressure() (float64, error) {
	proc := s.Proc
	if proc == "" {
		proc = "/proc"
	}
	data, err := os.ReadFile(filepath.Join(proc, "pressure/memory"))
	if err != nil {
		// Without PSI, or with psi=0 (EOPNOTSUPP), there is nothing to tell.
		return 0, nil //nolint:nilerr // see above
	}
	full, err := parsePressure(string(data))
	if err != nil {
		return 0, fmt.Errorf("%s/pressure/memory: %w", proc, err)
	}
	return full, nil
}

// parsePressure finds avg10 in the line "full" (Documentation/accounting/psi.rst).
func parsePressure(psi string) (float64, error) {
	for line := range strings.Lines(psi) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "full" {
			continue
		}
		value, ok := strings.CutPrefix(f[1], "avg10=")
		percent, err := strconv.ParseFloat(value, 64)
		if !ok || err != nil || !(percent >= 0 && percent <= 100) {
			return 0, fmt.Errorf("%q", f[1])
		}
		return percent / 100, nil
	}
	return 0, errors.New("no line full")
}

// Gone tells whether a sample failed because the group is not there any more.
func Gone(err error) bool { return errors.Is(err, fs.ErrNotExist) }
