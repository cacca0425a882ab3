package preflight

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Port is one that the head needs.
type Port struct {
	Proto  string // "udp" or "tcp"
	Number int
	For    string // "DHCP": for people
	Flag   string // the flag that moves it, "" if none does
	Hint   string // what else may be done when it is taken
	// Device limits the search to sockets that are bound to no device or to
	// this one (its index), as DHCP servers are; 0 for any.
	Device int
	// Addrs are those that the head binds; empty means all of them.
	Addrs []netip.Addr
}

// Taken finds the processes that have one of the ports, all at once. The
// kernel alone would not tell: a DHCP server that shares its port can be
// joined without an error, and each would then get some of the packets.
func Taken(proc string, ports []Port) error {
	var l fault.List
	for _, p := range ports {
		for _, s := range sockets(proc, p.Proto) {
			if s.port != p.Number || !overlaps(p, s) {
				continue
			}
			hint := "stop it"
			if p.Flag != "" {
				hint += ", or use another port with " + p.Flag
			}
			if p.Hint != "" {
				hint += ", " + p.Hint
			}
			l.Add(fault.New(fault.Environment, "bind", fmt.Sprintf("%s port %d (%s)", p.Proto, p.Number, p.For), "it is taken by "+owner(proc, s.inode), hint))
			break
		}
	}
	return l.All("bind ports", "")
}

type socket struct {
	addr   netip.Addr
	port   int
	inode  string
	device int
}

func overlaps(p Port, s socket) bool {
	if p.Device != 0 && s.device != 0 && s.device != p.Device {
		return false
	}
	return s.addr.IsUnspecified() || len(p.Addrs) == 0 || slices.Contains(p.Addrs, s.addr)
}

// sockets lists bound UDP or listening TCP sockets of this network namespace.
func sockets(proc, proto string) []socket {
	devices := boundDevices(proto)
	var out []socket
	for _, name := range []string{proto, proto + "6"} {
		f, err := os.Open(filepath.Join(proc, "thread-self/net", name))
		if err != nil {
			continue
		}
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if s, ok := parseSocket(sc.Text(), proto); ok {
				s.device = devices[s.inode]
				out = append(out, s)
			}
		}
		f.Close()
	}
	return out
}

// parseSocket reads a line of /proc/net/{udp,tcp}{,6}:
//
//	sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ...
func parseSocket(line, proto string) (socket, bool) {
	w := strings.Fields(line)
	if len(w) < 10 {
		return socket{}, false
	}
	const listen = "0A" // TCP_LISTEN
	if proto == "tcp" && w[3] != listen {
		return socket{}, false
	}
	host, port, ok := strings.Cut(w[1], ":")
	n, err1 := strconv.ParseUint(port, 16, 16)
	raw, err2 := hex.DecodeString(host)
	if !ok || err1 != nil || err2 != nil || len(raw)%4 != 0 {
		return socket{}, false
	}
	// Each 32-bit word is printed in the machine's byte order, which is
	// little-endian on all that we run on.
	for i := 0; i < len(raw); i += 4 {
		raw[i], raw[i+1], raw[i+2], raw[i+3] = raw[i+3], raw[i+2], raw[i+1], raw[i]
	}
	a, ok := netip.AddrFromSlice(raw)
	return socket{addr: a.Unmap(), port: int(n), inode: w[9]}, ok
}

// boundDevices tells which UDP sockets are bound to a device, by inode. It
// needs the kernel's udp_diag; without it every socket counts as unbound.
func boundDevices(proto string) map[string]int {
	out := map[string]int{}
	if proto != "udp" {
		return out
	}
	socks, err := netlink.SocketDiagUDP(unix.AF_INET)
	if err != nil {
		return out
	}
	for _, s := range socks {
		if s.ID.Interface != 0 {
			out[strconv.FormatUint(uint64(s.INode), 10)] = int(s.ID.Interface)
		}
	}
	return out
}

// owner names the process that holds a socket.
func owner(proc, inode string) string {
	want := "socket:[" + inode + "]"
	fds, _ := filepath.Glob(filepath.Join(proc, "[0-9]*/fd/*"))
	for _, fd := range fds {
		if l, err := os.Readlink(fd); err != nil || l != want {
			continue
		}
		dir := filepath.Dir(filepath.Dir(fd))
		comm, _ := os.ReadFile(filepath.Join(dir, "comm"))
		return fmt.Sprintf("%s (process %s)", strings.TrimSpace(string(comm)), filepath.Base(dir))
	}
	return "a process that cannot be seen from here"
}
