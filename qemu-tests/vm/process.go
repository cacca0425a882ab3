package vm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
)

// Process names one process for good: numbers are used again, a number
// together with its start time is not.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks after boot, /proc/PID/stat field 22
}

// ProcessOf is the process that has this number now.
func ProcessOf(pid int) (Process, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, err
	}
	start, _, err := parseStat(stat)
	return Process{pid, start}, err
}

// Alive reports whether the process still runs. A zombie does not.
func (p Process) Alive() bool {
	if p.PID <= 0 {
		return false
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID))
	if err != nil {
		return false
	}
	start, state, err := parseStat(stat)
	return err == nil && start == p.Start && state != 'Z' && state != 'X'
}

// Signal sends a signal to the process, and never to another one that has its
// number now.
func (p Process) Signal(sig os.Signal) error {
	// FindProcess holds a pidfd where the kernel has them: after it, the
	// check below is about the process that the signal will reach.
	proc, err := os.FindProcess(p.PID)
	if err != nil {
		return err
	}
	defer proc.Release()
	if !p.Alive() {
		return os.ErrProcessDone
	}
	return proc.Signal(sig)
}

// parseStat takes start time and state from /proc/PID/stat. The second field
// is the command in brackets and may itself hold brackets and spaces.
func parseStat(stat []byte) (start uint64, state byte, err error) {
	i := bytes.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, 0, errors.New("malformed /proc stat")
	}
	f := bytes.Fields(stat[i+1:])
	const stateField, startField = 3, 22 // proc(5), from 1
	if len(f) <= startField-stateField {
		return 0, 0, errors.New("malformed /proc stat")
	}
	start, err = strconv.ParseUint(string(f[startField-stateField]), 10, 64)
	return start, f[0][0], err
}
