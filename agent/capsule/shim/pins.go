package shim

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// inetTables are the kernel's lists of sockets that have an address of this node.
var inetTables = []string{"tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6"}

// pinned tells, in words, what ties the processes to this node although CRIU
// would carry it, or what must not go to another.
func pinned(pids []int, owner int) error {
	if err := foreignUser(pids, owner); err != nil {
		return err
	}
	return pinnedBySocket(pids)
}

// foreignUser finds a process that has come by another user's rights, by a
// set-user-ID program: it would have them on the other machine too.
func foreignUser(pids []int, owner int) error {
	for _, pid := range pids {
		uids, err := uidsOf(pid)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				continue // ended meanwhile
			}
			return err
		}
		for _, uid := range uids {
			if uid != owner {
				return fmt.Errorf("process %d (%s) has the rights of user %d", pid, nameOf(pid), uid)
			}
		}
	}
	return nil
}

// uidsOf are a process's real, effective, saved and file system user.
func uidsOf(pid int) (uids []int, err error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(data)) {
		rest, ok := strings.CutPrefix(line, "Uid:")
		if !ok {
			continue
		}
		for f := range strings.FieldsSeq(rest) {
			uid, err := strconv.Atoi(f)
			if err != nil {
				return nil, fmt.Errorf("/proc/%d/status: %w", pid, err)
			}
			uids = append(uids, uid)
		}
	}
	return uids, nil
}

// locked finds a file lock that this node's kernel keeps: it would stay
// behind. Locks in home files are kept at the home, and are not seen here.
func locked(pids []int) error {
	for _, pid := range pids {
		infos, err := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", pid))
		if err != nil {
			return err
		}
		for _, name := range infos {
			data, err := os.ReadFile(name)
			if err != nil || !strings.Contains(string(data), "\nlock:") {
				continue
			}
			file, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, filepath.Base(name)))
			if err != nil {
				continue
			}
			return fmt.Errorf("process %d (%s) holds a lock on %s", pid, nameOf(pid), file)
		}
	}
	return nil
}

// pinnedBySocket finds a socket that has an address of this node: a socket with an address of this node would have no peer on
// another, or be a different server there.
func pinnedBySocket(pids []int) error {
	inet := make(map[string]string)
	for _, table := range inetTables {
		f, err := os.Open("/proc/self/net/" + table)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		err = inodes(f, strings.TrimSuffix(table, "6"), inet)
		f.Close()
		if err != nil {
			return err
		}
	}
	for _, pid := range pids {
		links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			return err
		}
		for _, l := range links {
			target, err := os.Readlink(l)
			if err != nil {
				continue // closed meanwhile
			}
			if kind := inet[target]; kind != "" {
				return fmt.Errorf("process %d (%s) has a network socket (%s)", pid, nameOf(pid), kind)
			}
		}
	}
	return nil
}

// inodes reads a table of /proc/net: a head line, then lines of which the
// tenth field is the socket's inode. They go into m as links of /proc/PID/fd
// show them.
func inodes(r io.Reader, kind string, m map[string]string) error {
	sc := bufio.NewScanner(r)
	sc.Scan()
	for sc.Scan() {
		if f := strings.Fields(sc.Text()); len(f) >= 10 && f[9] != "0" {
			m["socket:["+f[9]+"]"] = kind
		}
	}
	return sc.Err()
}

// nameOf is a process's name for a message.
func nameOf(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "gone"
	}
	return strings.TrimSpace(string(data))
}
