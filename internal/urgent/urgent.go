// Package urgent keeps the processes that carry jobs quick while the jobs want
// every CPU, and alive while they want all memory. An agent that is late looks
// dead to its cluster, a late shim makes its job stand still for longer, and all
// of them are small beside the job that makes memory short.
package urgent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// niceness beside the 0 of most programs gives nine times their share.
const niceness = -10

// spared is the oom_score_adj of a process that is killed for memory after all
// ordinary ones, and not never: -1000 would be that.
const spared = -900

// Ordinary is the oom_score_adj that a job begins with.
const Ordinary = 0

// Raise makes this process more urgent than an ordinary one, and among the last to be
// killed for memory: its threads, and what it starts from now on unless that says otherwise.
// Where the kernel first divides CPUs among sessions (sched_autogroup), the session is
// raised with it if this process leads it. The error says what was refused; a process that is
// not root may not raise itself.
func Raise() error { return errors.Join(raiseThreads(), raiseSession(), SetOOM(spared)) }

func raiseSession() error {
	if sid, err := unix.Getsid(0); err != nil || sid != unix.Getpid() {
		return nil // somebody's shell may be in it
	}
	return RaiseSession(unix.Getpid())
}

// RaiseSession makes the session of a process as urgent as Raise makes its own; the
// process itself inherits its niceness. Without autogroups there is nothing to do.
func RaiseSession(pid int) error {
	path := "/proc/self/autogroup" // /proc may be that of another pid namespace
	if pid != unix.Getpid() {
		path = fmt.Sprintf("/proc/%d/autogroup", pid)
	}
	if _, err := os.Stat("/proc/self/autogroup"); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(niceness)), 0); err != nil {
		return fmt.Errorf("raise priority of a session: %w", err)
	}
	return nil
}

// SetOOM sets this process's oom_score_adj, -1000 to 1000.
func SetOOM(adj int) error {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.Itoa(adj)), 0); err != nil {
		return fmt.Errorf("set oom_score_adj %d: %w", adj, err)
	}
	return nil
}

func raiseThreads() error {
	// A new thread has the niceness of the one that made it, so that none is missed
	// once a round finds no new one.
	done := make(map[string]bool)
	for {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return fmt.Errorf("raise priority: %w", err)
		}
		before := len(done)
		for _, t := range tasks {
			if done[t.Name()] {
				continue
			}
			tid, err := ownTID(t.Name())
			if errors.Is(err, fs.ErrNotExist) {
				continue // it has ended
			}
			if err != nil {
				return fmt.Errorf("raise priority: %w", err)
			}
			if err := unix.Setpriority(unix.PRIO_PROCESS, tid, niceness); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("raise priority to niceness %d: %w", niceness, err)
			}
			done[t.Name()] = true
		}
		if len(done) == before {
			return nil
		}
	}
}

// ownTID is the number that a thread of ours has for ourselves: /proc may be that of
// another pid namespace, as it is for a shim.
func ownTID(task string) (int, error) {
	status, err := os.ReadFile("/proc/self/task/" + task + "/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if ids, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(ids)
			if len(f) == 0 {
				break
			}
			return strconv.Atoi(f[len(f)-1])
		}
	}
	return 0, fmt.Errorf("no NSpid in the status of thread %s", task)
}
