package agentapi

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerGroups are the supplementary groups of the process that connected, as
// SO_PEERCRED gives its user and group. SO_PEERGROUPS has no wrapper in
// x/sys/unix: it is an array of gid_t.
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 32)
	for {
		size := uint32(4 * len(groups))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		if errno == unix.ERANGE && int(size) > 4*len(groups) {
			groups = make([]uint32, size/4) // as many as it says
			continue
		}
		if errno != 0 {
			return nil, os.NewSyscallError("getsockopt SO_PEERGROUPS", errno)
		}
		return groups[:size/4], nil
	}
}
