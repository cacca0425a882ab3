// Package load measures how busy this machine is and keeps what is heard of
// the others. It follows MOSIX (Barak 2001): each node measures itself every
// second and sends one small message to a random member, with its own vector
// and the freshest that it has heard; decisions are made from that cache
// alone. Arithmetic, wire format and cache are free of clock and network;
// who calls them brings both.
package load

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"mosimg/internal/api"
)

// Interval is MOSIX's unit of time: measure and send once in it.
const Interval = time.Second

// Decay is the load after a sample of the number of runnable processes. It
// follows a rise at 5:3 and a fall at 7:1 ("values taken from MOSIX" in
// Kerrighed's port), so a machine looks busy sooner than it looks idle, and
// jobs do not rush to one that pauses for a moment.
func Decay(load, sample float64) float64 {
	if sample > load {
		return (5*load + 3*sample) / 8
	}
	return (7*load + sample) / 8
}

// Mean is the load by which a machine itself decides whether to send a job away:
// it follows a rise at 5:3 as well, and falls at once, so that after one job
// has left the next is not sent for a load that is not there any more.
func Mean(load, sample float64) float64 { return min(sample, Decay(load, sample)) }

// Sampler measures this machine. It is not safe for concurrent use.
type Sampler struct {
	// Proc is where procfs is mounted; "" means /proc.
	Proc string
	// Runnable, if set, tells the number of runnable processes in place of the
	// machine's: where several agents share one machine, each must see its own.
	Runnable func() float64

	load float64
	mean float64
	seq  uint64
	prev counters
}

// counters only rise; what counts is their difference over an interval.
type counters struct {
	at        time.Time
	busy, all uint64        // jiffies of all CPUs together
	waited    time.Duration // that runnable processes have waited for a CPU
}

// Sample measures. Node and Guests are the caller's to fill. The first
// Utilisation is the mean since boot.
func (s *Sampler) Sample(now time.Time) (api.LoadVector, error) {
	if s.seq == 0 {
		s.seq = uint64(max(now.Unix(), 1))
	} else {
		s.seq++
	}
	v := api.LoadVector{Seq: s.seq}
	proc := s.Proc
	if proc == "" {
		proc = "/proc"
	}
	data, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return v, err
	}
	st, err := parseStat(data)
	if err != nil {
		return v, fmt.Errorf("%s/stat: %w", proc, err)
	}
	c := counters{at: now, busy: st.busy, all: st.all}
	data, err = os.ReadFile(filepath.Join(proc, "schedstat"))
	exact := err == nil
	if exact {
		if c.waited, err = parseSchedstat(data); err != nil {
			return v, fmt.Errorf("%s/schedstat: %w", proc, err)
		}
	}
	if d := c.all - s.prev.all; c.all > s.prev.all && c.busy >= s.prev.busy {
		v.Utilisation = min(1, float64(c.busy-s.prev.busy)/float64(d))
	}
	sample := runnable(st, s.prev, c, v.Utilisation, exact)
	if s.Runnable != nil {
		sample = s.Runnable()
	}
	s.load, s.mean = Decay(s.load, sample), Mean(s.mean, sample)
	s.prev = c
	v.Load, v.CPUs = s.load, st.cpus

	data, err = os.ReadFile(filepath.Join(proc, "meminfo"))
	if err != nil {
		return v, err
	}
	if v.MemTotal, v.MemFree, err = parseMeminfo(data); err != nil {
		return v, fmt.Errorf("%s/meminfo: %w", proc, err)
	}
	if data, err = os.ReadFile(filepath.Join(proc, "uptime")); err == nil {
		first, _, _ := strings.Cut(string(data), " ")
		up, _ := strconv.ParseFloat(first, 64)
		v.UptimeSec = int64(up)
	}
	return v, nil
}

// Mean is the load that counts here: see the function Mean.
func (s *Sampler) Mean() float64 { return s.mean }

// runnable is the mean number of runnable processes over the last interval:
// those that ran (the busy CPUs) and those that waited for one (the time that
// all of them waited, over the time that passed). MOSIX counted at each timer
// tick for the same mean. A single look at procs_running is what is left when
// the kernel keeps no scheduler statistics; it sees mostly what woke up in
// the same moment as we did (measured: 4 on an idle emulated machine).
func runnable(st stat, prev, cur counters, utilisation float64, exact bool) float64 {
	passed := cur.at.Sub(prev.at)
	if !exact || prev.at.IsZero() || passed <= 0 || cur.waited < prev.waited {
		return float64(st.running)
	}
	return utilisation*float64(st.cpus) + float64(cur.waited-prev.waited)/float64(passed)
}

type stat struct {
	running   int // without the process that reads
	cpus      int
	busy, all uint64
}

// parseStat reads /proc/stat (Documentation/filesystems/proc.rst, 1.7).
func parseStat(data []byte) (stat, error) {
	st := stat{running: -1}
	sc := bufio.NewScanner(bytes.NewReader(data))
	sc.Buffer(nil, 1<<20) // the line "intr" is long on big machines
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 2 {
			continue
		}
		switch {
		case f[0] == "cpu":
			// user nice system idle iowait irq softirq steal; the guest
			// times that follow are part of user already.
			for i, w := range f[1:min(len(f), 9)] {
				n, err := strconv.ParseUint(w, 10, 64)
				if err != nil {
					return st, fmt.Errorf("cpu time %q", w)
				}
				st.all += n
				if i != 3 && i != 4 {
					st.busy += n
				}
			}
		case strings.HasPrefix(f[0], "cpu"):
			st.cpus++
		case f[0] == "procs_running":
			n, err := strconv.Atoi(f[1])
			if err != nil || n < 0 {
				return st, fmt.Errorf("procs_running %q", f[1])
			}
			st.running = max(0, n-1) // we run while we read
		}
	}
	if err := sc.Err(); err != nil {
		return st, err
	}
	if st.running < 0 || st.all == 0 {
		return st, errors.New("no line procs_running or cpu")
	}
	return st, nil
}

// parseSchedstat sums the time that runnable processes have waited, field 8
// of each CPU (Documentation/scheduler/sched-stats.rst).
func parseSchedstat(data []byte) (time.Duration, error) {
	var sum uint64
	cpus := 0
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 9 || !strings.HasPrefix(f[0], "cpu") {
			continue
		}
		ns, err := strconv.ParseUint(f[8], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("waiting time %q of %s", f[8], f[0])
		}
		sum += ns
		cpus++
	}
	if cpus == 0 {
		return 0, errors.New("no line of a CPU")
	}
	return time.Duration(sum), nil
}

func parseMeminfo(data []byte) (total, free int64, err error) {
	free = -1
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		var to *int64
		switch f[0] {
		case "MemTotal:":
			to = &total
		case "MemAvailable:":
			to = &free
		default:
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil || kib < 0 || kib > 1<<52 {
			return 0, 0, fmt.Errorf("%s %q", f[0], f[1])
		}
		*to = kib << 10
	}
	if total == 0 || free < 0 {
		return 0, 0, errors.New("no line MemTotal or MemAvailable")
	}
	return total, free, nil
}
