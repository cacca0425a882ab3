package shim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"time"

	"mosimg/agent/capsule/control"
)

// quietTime bounds the wait for a moment in which a job can be dumped. A program
// that works in transactions lets go of its locks for a moment at least after each.
// quietShort and quietStep are times between two looks: see restless.
const (
	quietTime  = 2 * time.Second
	quietShort = 10 * time.Microsecond
	quietStep  = time.Millisecond
)

// quiet freezes the job in a moment in which it can be dumped, and lets it run
// between the looks. CRIU then stops a tree in which nothing is born and
// nothing dies: it has been seen to stumble over a process that ended under
// its hands ("Unable to detach from N").
func (s *shim) quiet(ctx context.Context, st control.Status) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	for tries, until := 0, time.Now().Add(quietTime); ; tries++ {
		// Not after a look at the running job: it could take the lock again in between, and
		// the time that it is without one may be shorter than that.
		if err := s.job.Freeze(ctx); err != nil {
			return err
		}
		pids, err := s.inTree(st.Leader)
		if err != nil {
			return err
		}
		busy := locked(pids)
		if busy == nil {
			busy, err = awaitingChild(pids)
		}
		if busy == nil || err != nil {
			s.log.Debug("quiet", "tries", tries, "err", err)
			return err
		}
		if st.Stopped { // it must not run, so waiting would change nothing
			return busy
		}
		if err := s.job.Thaw(); err != nil {
			return err
		}
		if time.Now().After(until) {
			return fmt.Errorf("%w, and did so for %v whenever it was looked at", busy, quietTime)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		restless(tries)
	}
}

// restless lets a job run for a while that is another one each time, from some
// microseconds to some milliseconds. A freeze waits for the end of a system call such as fsync,
// so looks at even times would all come at the same point of a
// transaction; and what follows that point is over in microseconds.
func restless(tries int) {
	d := quietShort << (tries % 9)
	d += rand.N(d)
	if d > quietStep {
		time.Sleep(d)
		return
	}
	for began := time.Now(); time.Since(began) < d; { // a sleep would take longer
	}
}

// thawSeized lets a frozen job go once CRIU holds each of its threads, because
// CRIU has to run code in them. The end of ctx is CRIU's.
func (s *shim) thawSeized(ctx context.Context, leader int) {
	for ctx.Err() == nil {
		pids, err := s.inTree(leader)
		held := err == nil
		if held {
			held, err = allThreads(pids, "tZX")
		}
		if err == nil && held {
			if err := s.job.Thaw(); err != nil {
				s.log.Error("cannot thaw a job for its dump", "err", err)
			}
			return
		}
		time.Sleep(quietStep / 4)
	}
}

// awaitingChild finds a thread that waits for a child which it has made by vfork:
// with that frozen it would wait for ever, and CRIU for it.
func awaitingChild(pids []int) (busy, err error) {
	for _, pid := range pids {
		rest, err := allThreads([]int{pid}, "RSTtZXI")
		if err != nil {
			return nil, err
		}
		if !rest {
			return fmt.Errorf("process %d (%s) is in the middle of starting another one", pid, nameOf(pid)), nil
		}
	}
	return nil, nil
}

// allThreads tells whether every thread of processes is in one of the states,
// by their letters in proc_pid_stat(5).
func allThreads(pids []int, states string) (bool, error) {
	tids, err := threadsOf(pids)
	if err != nil {
		return false, err
	}
	for _, tid := range tids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", tid))
		if err != nil {
			return false, err
		}
		// The name may have anything in it, so its end is the last parenthesis.
		f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		if len(f) == 0 || !strings.Contains(states, f[0]) {
			return false, nil
		}
	}
	return true, nil
}
