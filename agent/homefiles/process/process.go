// Package process starts programs that outlive the agent that starts them, and
// knows them again: by their number and the time they were started, since
// numbers are used again.
package process

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ID names a process for ever.
type ID struct {
	PID   int
	Start uint64 // in clock ticks since the machine was started
}

// maxWord bounds what a process says when it has started.
const maxWord = 4096

// Start starts this program again with other arguments, in a session of its
// own. Its file descriptor 3 is a pipe: what it says there before it closes it
// is returned when that is "ready", and is the error otherwise. Its messages
// go to the file log.
func Start(log string, args ...string) (ID, error) {
	out, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return ID{}, err
	}
	defer out.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return ID{}, err
	}
	defer r.Close()
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: append([]string{"mosagent"}, args...), Dir: "/",
		Env:    []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"},
		Stderr: out, ExtraFiles: []*os.File{w},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return ID{}, err
	}
	go cmd.Wait() //nolint:errcheck // its end is seen elsewhere; here it is only reaped
	word, err := io.ReadAll(io.LimitReader(r, maxWord))
	if err == nil && string(word) != readyWord {
		err = fmt.Errorf("%s", bytes.TrimSpace(word))
		if len(word) == 0 {
			err = fmt.Errorf("it died at once: see %s", log)
		}
	}
	id := ID{PID: cmd.Process.Pid}
	if err == nil {
		id.Start, err = startTime(id.PID)
	}
	if err != nil {
		cmd.Process.Kill() //nolint:errcheck // it may be gone
	}
	return id, err
}

const readyWord = "ready"

// Ready tells who called Start that this process works, or with err why not.
func Ready(err error) {
	f := os.NewFile(3, "ready")
	if err != nil {
		fmt.Fprint(f, err)
	} else {
		fmt.Fprint(f, readyWord)
	}
	f.Close()
}

// Alive tells whether the process still runs.
func (id ID) Alive() bool {
	start, err := startTime(id.PID)
	return err == nil && start == id.Start
}

// grace is how long a process may take to end by itself.
const grace = 3 * time.Second

// End ends the process and returns when it is gone: by TERM, and by KILL if that
// does not help. It reports whether it ended by itself.
func (id ID) End() bool {
	for began := time.Now(); id.Alive(); time.Sleep(5 * time.Millisecond) {
		switch waited := time.Since(began); {
		case waited < grace:
			_ = unix.Kill(id.PID, unix.SIGTERM) // it may end just now
		case waited < 2*grace:
			_ = unix.Kill(id.PID, unix.SIGKILL) // as above
		default:
			return false
		}
	}
	return true
}

// startTime is field 22 of /proc/PID/stat; a zombie counts as gone.
func startTime(pid int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStat(string(data))
}

func parseStat(stat string) (uint64, error) {
	// The name may have anything in it, so its end is the last parenthesis.
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	const state, start = 0, 19
	if len(f) <= start {
		return 0, fmt.Errorf("stat of a process: %q", stat)
	}
	if f[state] == "Z" || f[state] == "X" {
		return 0, os.ErrProcessDone
	}
	return strconv.ParseUint(f[start], 10, 64)
}
