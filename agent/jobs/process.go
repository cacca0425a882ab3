package jobs

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
)

// process is a process of this machine. It is held by its folder in /proc and
// by a pidfd, so that another one that gets its number is not taken for it.
type process struct {
	dir *os.Root
	fd  *os.File
}

// openProcess holds on to a process. What it is must be looked at afterwards: by
// facts, whose success says that it was there when the pidfd was made.
func openProcess(pid int) (*process, error) {
	if pid <= 0 {
		return nil, errors.New("it is in a pid namespace that this machine's does not contain")
	}
	dir, err := os.OpenRoot("/proc/" + strconv.Itoa(pid))
	if err != nil {
		return nil, err
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		dir.Close()
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	return &process{dir: dir, fd: os.NewFile(uintptr(fd), "pidfd")}, nil
}

// close lets go of it.
func (p *process) close() {
	p.dir.Close()
	p.fd.Close()
}

// awaitEnd returns nil when the process has ended, or the end of ctx. p is closed.
func (p *process) awaitEnd(ctx context.Context) error {
	defer p.close()
	stop := context.AfterFunc(ctx, func() { p.fd.Close() })
	defer stop()
	rc, err := p.fd.SyscallConn()
	if err != nil {
		return err
	}
	var perr error
	err = rc.Read(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		var n int
		n, perr = unix.Poll(fds, 0)
		return n > 0 || perr != nil && perr != unix.EINTR
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(err, perr)
}

// facts are what a job inherits from its mosrun by the kernel's word.
type facts struct {
	euid   int
	nice   int
	began  uint64 // start time, clock ticks since the boot
	limits []control.Limit
}

func (p *process) facts() (f facts, err error) {
	stat, err := p.dir.ReadFile("stat")
	if err != nil {
		return f, err
	}
	if f.nice, f.began, err = parseStat(string(stat)); err != nil {
		return f, err
	}
	status, err := p.dir.ReadFile("status")
	if err != nil {
		return f, err
	}
	if f.euid, err = parseEUID(string(status)); err != nil {
		return f, err
	}
	limits, err := p.dir.ReadFile("limits")
	if err != nil {
		return f, err
	}
	f.limits, err = parseLimits(string(limits))
	return f, err
}

// Places in /proc/PID/stat after the command, which may have anything in it
// and ends at the last parenthesis: fields 19 and 22 of proc_pid_stat(5).
const (
	statNice  = 19 - 3
	statStart = 22 - 3
)

func parseStat(stat string) (nice int, began uint64, err error) {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) <= statStart {
		return 0, 0, fmt.Errorf("/proc/PID/stat: %q", stat)
	}
	if nice, err = strconv.Atoi(f[statNice]); err == nil {
		began, err = strconv.ParseUint(f[statStart], 10, 64)
	}
	return nice, began, err
}

// parseEUID reads "Uid: real effective saved file-system" of /proc/PID/status.
func parseEUID(status string) (int, error) {
	for line := range strings.Lines(status) {
		if f := strings.Fields(line); len(f) == 5 && f[0] == "Uid:" {
			return strconv.Atoi(f[2])
		}
	}
	return 0, errors.New("/proc/PID/status has no Uid")
}

// Columns of /proc/PID/limits (proc_pid_limits in fs/proc/base.c): a name of 25
// characters, then soft and hard limit of 20, one space between; the lines are
// in the order of the resources' numbers.
const (
	limitSoft = 26
	limitHard = limitSoft + 21
	limitEnd  = limitHard + 20
)

// parseLimits reads what anybody may read about any process; prlimit(2) would want CAP_SYS_RESOURCE.
func parseLimits(text string) ([]control.Limit, error) {
	var limits []control.Limit
	number := -1 // the first line is the heading
	for line := range strings.Lines(text) {
		if number >= 0 {
			if len(line) < limitEnd {
				return nil, fmt.Errorf("/proc/PID/limits: line %q", line)
			}
			soft, err := parseLimit(line[limitSoft:limitHard])
			hard, herr := parseLimit(line[limitHard:limitEnd])
			if err := errors.Join(err, herr); err != nil {
				return nil, fmt.Errorf("/proc/PID/limits: line %q: %w", line, err)
			}
			limits = append(limits, control.Limit{Resource: number, Cur: soft, Max: hard})
		}
		number++
	}
	if len(limits) == 0 {
		return nil, errors.New("/proc/PID/limits is empty")
	}
	return limits, nil
}

func parseLimit(s string) (uint64, error) {
	s = strings.TrimSpace(s)
	if s == "unlimited" {
		return math.MaxUint64, nil
	}
	return strconv.ParseUint(s, 10, 64)
}
