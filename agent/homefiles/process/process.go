// Package process starts programs that outlive the agent that starts them, and
// knows them again: by their number and the time they were started, since
// numbers are used again.
package process

import (
	"errors"
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

// Self is this process.
func Self() (ID, error) {
	start, err := startTime(os.Getpid())
	return ID{os.Getpid(), start}, err
}

// maxWord bounds what a process says when it has started, and wordTime how long it may take.
const (
	maxWord  = 4096
	wordTime = 20 * time.Second
)

// Start starts this program again with other arguments, in a session of its
// own. Its file descriptor 3 is a pipe: what it says there before it closes it
// is returned when that is "ready", and is the error otherwise. Its messages
// go to the file log.
func Start(log string, args ...string) (id ID, err error) {
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
	defer func() {
		if err != nil {
			cmd.Process.Kill() //nolint:errcheck // it may be gone
		}
		go cmd.Wait() //nolint:errcheck // its end is seen elsewhere; here it is only reaped
	}()
	if id.PID = cmd.Process.Pid; err == nil {
		id.Start, err = startTime(id.PID)
	}
	if err == nil {
		err = r.SetReadDeadline(time.Now().Add(wordTime))
	}
	var word []byte
	if err == nil {
		word, err = io.ReadAll(io.LimitReader(r, maxWord))
	}
	switch {
	case err != nil:
	case len(word) == 0:
		err = fmt.Errorf("it died at once: see %s", log)
	case string(word) != readyWord:
		err = errors.New(strings.TrimSpace(string(word)))
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

// grace is how long a process may take to end by itself, and after KILL.
const grace = 3 * time.Second

// End ends the process and reports whether it is gone: by TERM, once, and after a
// while by KILL, which does not help while it waits in the kernel.
func (id ID) End() bool {
	fd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil {
		return !id.Alive()
	}
	defer unix.Close(fd)
	// The descriptor is of this process only if the number is still its own.
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if !id.Alive() {
			return true
		}
		_ = unix.PidfdSendSignal(fd, sig, nil, 0) // it may end just now
		if ended(fd) {
			return true
		}
	}
	return !id.Alive()
}

// ended waits for the end of a process.
func ended(fd int) bool {
	for until := time.Now().Add(grace); ; {
		left := time.Until(until)
		if left <= 0 {
			return false
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return err == nil
		}
	}
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
