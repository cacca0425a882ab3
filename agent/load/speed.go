package load

import (
	"math"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// ReferenceSpeed is the speed of the reference CPU: one that takes
// referenceChunk (164 million steps a second) for a chunk of work, as a virtual CPU of
// a server's AMD EPYC did on 2026-11-23. MOSIX's standard was a Pentium II at 400 MHz first and a
// Pentium III at 1 GHz later; what counts is only that all nodes use the same.
const ReferenceSpeed = 10000

// A chunk of work is speedSteps steps of a 64-bit integer generator (Marsaglia's
// xorshift, 2003), each followed by a load from and a store to a random word of
// speedWords: more than a first-level cache holds and less than most of the
// second, since half of what programs wait for is that.
const (
	speedSteps     = 1 << 17
	speedWords     = 1 << 14 // 128 KiB
	referenceChunk = 800 * time.Microsecond

	speedRounds = 5
	speedRound  = 40 * time.Millisecond // of CPU time
)

// Speed measures the speed of one CPU of this machine, in units of which
// ReferenceSpeed is the reference's: the quickest chunk of speedRounds rounds, each of as many as fit into
// speedRound. It takes 0.2 s, counted by the thread's own clock, so that other processes lengthen it, but hardly
// change the result. On a CPU of a fiftieth of the reference's speed a round is three chunks. The rounds are pause apart, and a chunk is
// short: what a virtual CPU's neighbours take away from it is in no clock of its own, and comes in bursts.
func Speed(pause time.Duration) (int, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	table := make([]uint64, speedWords)
	work(table)                          // it comes into the caches, and the clock of the CPU up
	best := time.Duration(math.MaxInt64) // of a chunk
	for i := range speedRounds {
		if i > 0 {
			time.Sleep(pause)
		}
		began, err := threadTime()
		if err != nil {
			return 0, err
		}
		for last := began; last-began < speedRound; {
			work(table)
			now, err := threadTime()
			if err != nil {
				return 0, err
			}
			if now > last { // a coarse clock may stand still
				best = min(best, now-last)
			}
			last = now
		}
	}
	return max(1, int(ReferenceSpeed*float64(referenceChunk)/float64(best)+0.5)), nil
}

// work is a chunk. The result goes back into the table, so that no compiler can
// leave it out.
func work(table []uint64) {
	x := table[0] | 1
	for range speedSteps {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		w := &table[x%speedWords]
		*w += x
		x += *w >> 60
	}
	table[0] = x
}

func threadTime() (time.Duration, error) {
	var ts unix.Timespec
	err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano()), err
}
