package shim

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"mosimg/agent/capsule/control"
)

// measure looks at what the job takes. What cannot be read counts as nothing:
// processes end while they are looked at.
func (s *shim) measure(st control.Status) *control.Use {
	use := &control.Use{CPUMicros: s.cpuMicros()}
	pids, err := s.job.Procs()
	if err != nil {
		return use
	}
	use.Processes = len(pids)
	for _, pid := range pids {
		use.Bytes += residentBytes(pid)
	}
	if st.State == control.Running {
		if err := s.movable(st.Leader); err != nil {
			use.Pinned = err.Error()
		}
		if err := locked(pids); err != nil {
			use.Locked = err.Error()
		}
	}
	return use
}

// cpuMicros is the time that the job has run, here and before.
func (s *shim) cpuMicros() int64 {
	here, err := s.job.CPUMicros()
	if err != nil {
		s.log.Debug("time used is not known", "err", err)
	}
	return s.cpuBefore.Load() + here
}

// residentBytes is the memory of a process that is in RAM.
func residentBytes(pid int) int64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	return parseResident(string(data), os.Getpagesize())
}

// parseResident reads /proc/PID/statm: pages in all, resident, ...
func parseResident(statm string, page int) int64 {
	f := strings.Fields(statm)
	if len(f) < 2 {
		return 0
	}
	n, err := strconv.ParseInt(f[1], 10, 64)
	if err != nil {
		return 0
	}
	return n * int64(page)
}
