package shim

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// inetTables are the kernel's lists of sockets that have an address of this node.
var inetTables = []string{"tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6", "icmp", "icmp6"}

// pinned tells, in words, what ties the processes to this node although CRIU
// would carry it: a socket with an address of this node would have no peer on
// another, or be a different server there.
func pinned(pids []int) error {
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
