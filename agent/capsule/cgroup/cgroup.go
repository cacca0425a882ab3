// Package cgroup makes and steers the control groups of a capsule: version 2
// only, and of that only what needs no controller (freeze, kill, who is in it).
// So it works on a host that gives all controllers to version 1.
package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Mount is where the cgroup2 file system is on this machine.
func Mount() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	dir, err := findMount(f)
	if err != nil {
		return "", err
	}
	if dir == "" {
		return "", fault.New(fault.Environment, "find", "cgroup2", "it is not mounted", "mount -t cgroup2 none /sys/fs/cgroup")
	}
	return dir, nil
}

// findMount finds the first mount of cgroup2's root in a mountinfo table
// (proc_pid_mountinfo(5)): its usual place on a host with version 2, or
// another one beside the controllers of version 1.
func findMount(r io.Reader) (string, error) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		mount, fs, ok := strings.Cut(sc.Text(), " - ")
		f := strings.Fields(mount)
		if !ok || len(f) < 5 || f[3] != "/" || !strings.HasPrefix(fs, "cgroup2 ") {
			continue
		}
		return unescape(f[4]), nil
	}
	return "", sc.Err()
}

// unescape undoes the octal escapes that mountinfo has for blanks.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// Leaf is a group that processes are in. It is held by a descriptor, so it can
// still be steered when its path is out of sight, as in a capsule.
type Leaf struct {
	dir  string
	root *os.Root
}

// Create makes the group at dir and its parents, or takes the one that is there.
func Create(dir string) (*Leaf, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fault.New(fault.Environment, "make", dir, err, "the agent needs root and a cgroup2 that is mounted read-write")
	}
	return Open(dir)
}

// Open opens the group at dir.
func Open(dir string) (*Leaf, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	if _, err := root.Stat("cgroup.freeze"); err != nil {
		root.Close()
		return nil, fault.New(fault.Environment, "open", dir, "not a cgroup2 that can be frozen", "Linux 5.14 or newer is needed")
	}
	return &Leaf{dir: dir, root: root}, nil
}

// Close lets go of the group; it stays as it is.
func (l *Leaf) Close() error { return l.root.Close() }

// Dir is where the group was opened.
func (l *Leaf) Dir() string { return l.dir }

// File opens the group's directory, for starting a process in it.
func (l *Leaf) File() (*os.File, error) { return l.root.Open(".") }

func (l *Leaf) write(name, value string) error {
	f, err := l.root.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", filepath.Base(l.dir), err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("cgroup %s: %w", filepath.Base(l.dir), err)
	}
	return nil
}

// Move moves a process, with all its threads, into the group.
func (l *Leaf) Move(pid int) error { return l.write("cgroup.procs", strconv.Itoa(pid)) }

// Procs are the processes in the group, by their pids in our own namespace.
// Process 0 stands for one that is outside of it.
func (l *Leaf) Procs() ([]int, error) {
	data, err := l.root.ReadFile("cgroup.procs")
	if err != nil {
		return nil, err
	}
	var pids []int
	for f := range strings.FieldsSeq(string(data)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("cgroup %s: read cgroup.procs: %w", filepath.Base(l.dir), err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// CPUMicros is how long the group's processes have run, those too that have
// ended: in microseconds. It needs no controller.
func (l *Leaf) CPUMicros() (int64, error) {
	data, err := l.root.ReadFile("cpu.stat")
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(eventOf(string(data), "usage_usec"), 10, 64)
}

// Kill kills every process in the group, those too that are being forked.
func (l *Leaf) Kill() error { return l.write("cgroup.kill", "1") }

// Freeze stops every process in the group where it stands, and returns when
// all have stopped. A process in an uninterruptible wait holds it up.
func (l *Leaf) Freeze(ctx context.Context) error {
	if err := l.write("cgroup.freeze", "1"); err != nil {
		return err
	}
	return l.await(ctx, "frozen", "1")
}

// Thaw lets a frozen group run on.
func (l *Leaf) Thaw() error { return l.write("cgroup.freeze", "0") }

// Frozen tells whether the group is frozen or told to be.
func (l *Leaf) Frozen() (bool, error) {
	data, err := l.root.ReadFile("cgroup.freeze")
	return strings.TrimSpace(string(data)) == "1", err
}

// AwaitEmpty returns when the last process of the group has ended.
func (l *Leaf) AwaitEmpty(ctx context.Context) error { return l.await(ctx, "populated", "0") }

// pollStep bounds one wait for a change of cgroup.events, so that the end of a
// context is seen.
const pollStep = 50 * time.Millisecond

// await waits until cgroup.events says that key has this value.
func (l *Leaf) await(ctx context.Context, key, want string) error {
	f, err := l.root.Open("cgroup.events")
	if err != nil {
		return err
	}
	defer f.Close()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	for {
		data := make([]byte, 256)
		n, err := f.ReadAt(data, 0)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if eventOf(string(data[:n]), key) == want {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("cgroup %s: waiting for %s %s: %w", filepath.Base(l.dir), key, want, context.Cause(ctx))
		}
		raw.Control(func(fd uintptr) { //nolint:errcheck // fails only on a closed file; the read tells
			unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}, int(pollStep.Milliseconds())) //nolint:errcheck // a wait cut short is no harm
		})
	}
}

// eventOf is the value of key in a table of "key value" lines.
func eventOf(table, key string) string {
	for line := range strings.Lines(table) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == key {
			return f[1]
		}
	}
	return ""
}

// Remove kills what is in the group and removes it. The kernel may need a
// moment until the dead are gone.
func Remove(ctx context.Context, dir string) error {
	l, err := Open(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	if err := l.Kill(); err != nil {
		return err
	}
	if err := l.AwaitEmpty(ctx); err != nil {
		return err
	}
	for {
		err := unix.Rmdir(dir)
		if err == nil || err == unix.ENOENT {
			return nil
		}
		if err != unix.EBUSY || ctx.Err() != nil {
			return &os.PathError{Op: "remove", Path: dir, Err: err}
		}
		time.Sleep(time.Millisecond)
	}
}
