package runbench

import (
	"crypto/sha256"
	"fmt"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Verb is the first argument that makes a program which calls Work one that only
// computes; the others are what it does, and how often.
const Verb = "bench-work"

// Kinds of work.
const (
	Hash     = "hash"     // SHA-256 of a MiB: the processor alone
	Syscalls = "syscalls" // a thousand calls of getppid: what a job's filter of system calls costs
)

var block = make([]byte, 1<<20)

var kinds = map[string]func(){
	Hash: func() { sha256.Sum256(block) },
	Syscalls: func() {
		for range 1000 {
			unix.Getppid()
		}
	},
}

// Work does a kind of work n times and prints the CPU and the wall-clock seconds
// that it took; ParseWork reads that.
func Work(kind, n string) error {
	do := kinds[kind]
	times, err := strconv.Atoi(n)
	if do == nil || err != nil || times < 1 {
		return fault.New(fault.Usage, "do", kind+" "+n, "no such work", "use: mosimg bench run")
	}
	wall, cpu, err := measure(func() {
		for range times {
			do()
		}
	})
	if err != nil {
		return err
	}
	_, err = fmt.Printf("%.6f %.6f\n", cpu.Seconds(), wall.Seconds())
	return err
}

func measure(do func()) (wall, cpu time.Duration, err error) {
	before, err := cpuTime()
	if err != nil {
		return 0, 0, err
	}
	began := time.Now()
	do()
	wall = time.Since(began)
	after, err := cpuTime()
	return wall, after - before, err
}

// cpuTime is what this process has used, in user and in system mode.
func cpuTime() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano()), err
}

// Calibrate tells how often a kind of work takes about d here.
func Calibrate(kind string, d time.Duration) (int, error) {
	for n := 1; ; n *= 2 {
		_, cpu, err := measure(func() {
			for range n {
				kinds[kind]()
			}
		})
		if err != nil {
			return 0, err
		}
		if cpu > 100*time.Millisecond {
			return max(1, int(float64(n)*d.Seconds()/cpu.Seconds())), nil
		}
	}
}

// ParseWork reads what Work has printed, in seconds.
func ParseWork(text string) (cpu, wall float64, err error) {
	if _, err := fmt.Sscanf(text, "%f %f\n", &cpu, &wall); err != nil || cpu <= 0 || wall <= 0 {
		return 0, 0, fault.New(fault.Internal, "read", "times of a program", fmt.Sprintf("it said %q", text), "")
	}
	return cpu, wall, nil
}
