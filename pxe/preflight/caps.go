package preflight

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Capabilities checks that this process may open the head's sockets: ports
// below the unprivileged range, and packets of its own making on an interface
// (SO_BINDTODEVICE and the search for other DHCP servers).
func Capabilities(proc string, dhcp bool, ports []Port) error {
	eff, err := effective(filepath.Join(proc, "self/status"))
	if err != nil {
		return fault.New(fault.Environment, "read capabilities", "", err, "")
	}
	first := 1024
	if b, err := os.ReadFile(filepath.Join(proc, "sys/net/ipv4/ip_unprivileged_port_start")); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			first = n
		}
	}
	low := false
	for _, p := range ports {
		low = low || p.Number < first
	}
	var missing []string
	if low && eff&(1<<unix.CAP_NET_BIND_SERVICE) == 0 {
		missing = append(missing, "CAP_NET_BIND_SERVICE")
	}
	if dhcp && eff&(1<<unix.CAP_NET_RAW) == 0 {
		missing = append(missing, "CAP_NET_RAW")
	}
	if len(missing) == 0 {
		return nil
	}
	return fault.New(fault.Environment, "start head", "", "this process lacks "+strings.Join(missing, " and "),
		"run it as root, or give it these capabilities (see configs/mosimg-head.service)")
}

// effective reads CapEff of a status file.
func effective(name string) (uint64, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		}
	}
	return 0, os.ErrNotExist
}
