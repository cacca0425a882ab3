package shim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"time"

	"mosimg/agent/capsule/control"
	"mosimg/internal/fault"
)

// quietTime bounds the wait for a moment in which a job can be dumped. A program
// that works in transactions lets go of its locks for a moment at least after each.
// quietStep is the longest of the times between two looks: see slowly. What is in
// between, as reading the next statement from a pipe, takes sqlite3 20 to 50 µs.
const (
	quietTime = 2 * time.Second
	quietStep = 80 * time.Microsecond
)

// quiet freezes the job in a moment in which it can be dumped, and lets it run
// between the looks. CRIU then stops a tree in which nothing is born and
// nothing dies: it has been seen to stumble over a process that ended under
// its hands ("Unable to detach from N").
func (s *shim) quiet(ctx context.Context, st control.Status, gate net.Conn) error {
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
		if busy == nil && err == nil && gate != nil {
			busy, err = askGate(ctx, gate)
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
		slowly(tries)
	}
}

// askGate asks the agent about what is not to be seen from here: the locks that the
// home keeps.
func askGate(ctx context.Context, gate net.Conn) (busy, err error) {
	stop := context.AfterFunc(ctx, func() { _ = gate.SetDeadline(deadlinePast) }) // fails if it is closed
	defer stop()
	var a control.Answer
	err = control.Send(gate, control.Request{Verb: control.Quiet})
	if err == nil {
		_, err = control.Receive(gate, &a)
	}
	if err != nil {
		return nil, fault.HungUp("the agent", err)
	}
	if err := a.Error.Err(); fault.KindOf(err) != fault.Refused {
		return nil, err
	}
	return a.Error.Err(), nil
}

// slowly lets a job run for some microseconds, and now and then for longer. A
// freeze waits for the end of a system call such as fsync, so looks at a distance
// would nearly all come right after one, with the lock held; so the job goes
// through its transaction in steps that are shorter than the time that it is without a lock.
func slowly(tries int) {
	if tries%64 == 63 {
		time.Sleep(time.Millisecond)
		return
	}
	for began, d := time.Now(), rand.N(quietStep); time.Since(began) < d; { // a sleep would take longer
	}
}

// thawSeized lets a frozen job go once CRIU holds each of its threads, because
// CRIU has to run code in them. The end of ctx is CRIU's.
func (s *shim) thawSeized(ctx context.Context, leader int) {
	// Not until each is seen to stand: CRIU may be at work in the first ones by then, and
	// wait for us. Held is held; a look later the last one has also been told to stop.
	for times := 0; ctx.Err() == nil; time.Sleep(seizeStep) {
		pids, err := s.inTree(leader)
		if err == nil {
			times++
			held, err := allTraced(pids)
			if err != nil || !held {
				times = 0
			}
		}
		if times > 1 {
			if err := s.job.Thaw(); err != nil {
				s.log.Error("cannot thaw a job for its dump", "err", err)
			}
			return
		}
	}
}

// seizeStep is the time between two looks at what CRIU holds. It goes through a
// thread in some microseconds.
const seizeStep = 300 * time.Microsecond

// allTraced tells whether every thread of processes has a tracer or is dead.
func allTraced(pids []int) (bool, error) {
	tids, err := threadsOf(pids)
	if err != nil {
		return false, err
	}
	for _, tid := range tids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
		if err != nil {
			return false, err
		}
		if !traced(string(data)) {
			return false, nil
		}
	}
	return true, nil
}

// traced reads State and TracerPid of /proc/PID/status.
func traced(status string) bool {
	for line := range strings.Lines(status) {
		f := strings.Fields(line)
		switch {
		case len(f) < 2:
		case f[0] == "State:" && strings.Contains("ZX", f[1]):
			return true
		case f[0] == "TracerPid:":
			return f[1] != "0"
		}
	}
	return false
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
