package agentapi

import (
	"os"
	"runtime"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// A job gets the groups that its caller has: all of them, and no others.
func TestPeerGroups(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("setgroups needs root")
	}
	for _, n := range []int{0, 1, 32, 33, 5000} {
		want := make([]uint32, n)
		for i := range want {
			want[i] = uint32(256*i + 7) // sorted, as the kernel keeps them
		}
		got := make(chan []uint32)
		go func() {
			defer close(got)
			runtime.LockOSThread() // and never unlocked: the thread's groups go with it
			var p unsafe.Pointer
			if n > 0 {
				p = unsafe.Pointer(&want[0])
			}
			if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(n), uintptr(p), 0); errno != 0 {
				t.Error(errno)
				return
			}
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer unix.Close(fds[0])
			defer unix.Close(fds[1])
			groups, err := peerGroups(uintptr(fds[0]))
			if err != nil {
				t.Error(err)
			}
			got <- groups
		}()
		if diff := cmp.Diff(want, <-got); diff != "" {
			t.Errorf("%d groups: %s", n, diff)
		}
	}
}
