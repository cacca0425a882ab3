package nodecli

import (
	"bufio"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/nofile"
)

// caller is what a program inherits from the process that starts it, as far as
// this process has it: all that a job is given of it. To be called before
// anything changes what is asked here (signals above all).
//
// Of ignored signals it finds those that the Go runtime leaves alone at its
// start: HUP, INT, and the stop signals. That is what nohup and a shell's `&` need.
func caller() (api.JobStart, error) {
	start := api.JobStart{Env: os.Environ()}
	token := make([]byte, 16)
	_, _ = rand.Read(token) // never fails
	start.Token = hex.EncodeToString(token)

	f, err := os.Open("/proc/self/status")
	if err != nil {
		return start, err
	}
	defer f.Close()
	if start.Umask, start.Ignored, err = parseStatus(f); err != nil {
		return start, fmt.Errorf("/proc/self/status: %w", err)
	}
	nice, err := unix.Getpriority(unix.PRIO_PROCESS, 0)
	if err != nil {
		return start, os.NewSyscallError("getpriority", err)
	}
	start.Nice = 20 - nice // getpriority(2): the kernel's own call answers 1 to 40
	groups, err := os.Getgroups()
	if err != nil {
		return start, os.NewSyscallError("getgroups", err)
	}
	for _, g := range groups {
		start.Groups = append(start.Groups, uint32(g))
	}
	for r := range rlimits {
		var l unix.Rlimit
		if err := unix.Prlimit(0, r, nil, &l); err != nil {
			return start, os.NewSyscallError("prlimit", err)
		}
		if soft, ok := nofile.Soft(); ok && r == unix.RLIMIT_NOFILE {
			l.Cur = soft
		}
		start.Limits = append(start.Limits, api.JobLimit{Resource: r, Cur: l.Cur, Max: l.Max})
	}
	start.NoStdin = isNull(0)
	return start, nil
}

// rlimits is RLIM_NLIMITS of asm-generic/resource.h.
const rlimits = 16

// parseStatus reads a status file of proc(5).
func parseStatus(r io.Reader) (umask int, ignored []int, err error) {
	var haveMask, haveSig bool
	s := bufio.NewScanner(r)
	for s.Scan() {
		key, value, _ := strings.Cut(s.Text(), ":")
		value = strings.TrimSpace(value)
		switch key {
		case "Umask":
			n, err := strconv.ParseUint(value, 8, 12)
			if err != nil {
				return 0, nil, err
			}
			umask, haveMask = int(n), true
		case "SigIgn":
			bits, err := strconv.ParseUint(value, 16, 64)
			if err != nil {
				return 0, nil, err
			}
			for n := 1; n <= 64; n++ {
				// 32 and 33 are the C library's own, for threads: no program is told of them.
				if bits>>(n-1)&1 != 0 && n != 32 && n != 33 {
					ignored = append(ignored, n)
				}
			}
			haveSig = true
		}
	}
	if err := s.Err(); err != nil {
		return 0, nil, err
	}
	if !haveMask || !haveSig {
		return 0, nil, errors.New("it tells no Umask or no SigIgn")
	}
	return umask, ignored, nil
}

// isNull tells whether a descriptor is /dev/null, which is also what the Go
// runtime puts in the place of one that was closed at the start.
func isNull(fd int) bool {
	var st unix.Stat_t
	return unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3)
}

// workingDir is the path of the working directory, if that is a way to it for
// this user: a job enters it by its path.
func workingDir() (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(buf)
	if err != nil {
		return "", fmt.Errorf("the working directory has no path: %w", err)
	}
	dir := strings.TrimRight(string(buf[:n]), "\x00")
	var here, there unix.Stat_t
	err = unix.Stat(".", &here)
	if err == nil {
		err = unix.Chdir(dir)
	}
	if err == nil {
		err = unix.Stat(".", &there)
	}
	if err != nil {
		return "", fmt.Errorf("the working directory %s cannot be entered: %w", dir, err)
	}
	if !strings.HasPrefix(dir, "/") || here.Dev != there.Dev || here.Ino != there.Ino {
		return "", fmt.Errorf("the working directory %s is another one by its path", dir)
	}
	return dir, nil
}
