package seccomp

import (
	"encoding/binary"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// data is a struct seccomp_data for the interpreter, which reads big-endian.
func data(arch, nr, arg0 uint32) []byte {
	b := make([]byte, 64)
	binary.BigEndian.PutUint32(b[offArg2:], arg0) // no call of the table looks at both
	binary.BigEndian.PutUint32(b[offNr:], nr)
	binary.BigEndian.PutUint32(b[offArch:], arch)
	binary.BigEndian.PutUint32(b[offArg0:], arg0)
	return b
}

func TestFilter(t *testing.T) {
	vm, err := bpf.NewVM(program())
	if err != nil {
		t.Fatal(err)
	}
	const allow = unix.SECCOMP_RET_ALLOW
	errno := func(e unix.Errno) int { return unix.SECCOMP_RET_ERRNO | int(e) }
	for _, tt := range []struct {
		name           string
		arch, nr, arg0 uint32
		want           int
	}{
		{"read", unix.AUDIT_ARCH_X86_64, 0, 0, allow},
		{"io_uring_setup", unix.AUDIT_ARCH_X86_64, 425, 0, errno(unix.ENOSYS)},
		{"perf_event_open", unix.AUDIT_ARCH_X86_64, 298, 0, errno(unix.EPERM)},
		{"perf_event_open of i386 is another call on amd64", unix.AUDIT_ARCH_X86_64, 336, 0, allow},
		{"fork-like clone", unix.AUDIT_ARCH_X86_64, 56, uint32(unix.SIGCHLD), allow},
		{"thread-like clone", unix.AUDIT_ARCH_X86_64, 56, unix.CLONE_VM | unix.CLONE_THREAD, allow},
		{"clone of a user namespace", unix.AUDIT_ARCH_X86_64, 56, unix.CLONE_NEWUSER, errno(unix.EPERM)},
		{"clone3", unix.AUDIT_ARCH_X86_64, 435, 0, errno(unix.ENOSYS)},
		{"unshare of files", unix.AUDIT_ARCH_X86_64, 272, unix.CLONE_FILES, allow},
		{"unshare of time", unix.AUDIT_ARCH_X86_64, 272, unix.CLONE_NEWTIME, errno(unix.EPERM)},
		{"TCP socket", unix.AUDIT_ARCH_X86_64, 41, unix.IPPROTO_TCP, allow},
		{"multipath TCP socket", unix.AUDIT_ARCH_X86_64, 41, unix.IPPROTO_MPTCP, errno(unix.EPROTONOSUPPORT)},
		{"last number", unix.AUDIT_ARCH_X86_64, x32Bit - 1, 0, allow},
		{"x32 read", unix.AUDIT_ARCH_X86_64, x32Bit, 0, errno(unix.ENOSYS)},
		{"i386 exit", unix.AUDIT_ARCH_I386, 1, 0, allow},
		{"i386 userfaultfd", unix.AUDIT_ARCH_I386, 374, 0, errno(unix.EPERM)},
		{"i386 clone of a network", unix.AUDIT_ARCH_I386, 120, unix.CLONE_NEWNET, errno(unix.EPERM)},
		{"i386 clone", unix.AUDIT_ARCH_I386, 120, 17, allow},
		{"another architecture", unix.AUDIT_ARCH_AARCH64, 0, 0, errno(unix.ENOSYS)},
	} {
		got, err := vm.Run(data(tt.arch, tt.nr, tt.arg0))
		if err != nil || got != tt.want {
			t.Errorf("%s: filter = %#x, %v; want %#x", tt.name, got, err, tt.want)
		}
	}
}

// The kernel accepts the filter, and programs see ordinary errors from it.
func TestInstall(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("installing the filter without no_new_privs needs root")
	}
	if os.Getenv("SECCOMP_CHILD") != "" {
		runtime.LockOSThread()
		if err := Install(); err != nil {
			t.Fatal(err)
		}
		if _, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0); e != unix.ENOSYS {
			t.Errorf("io_uring_setup = %v; want %v", e, unix.ENOSYS)
		}
		if err := unix.Unshare(unix.CLONE_NEWUSER); err != unix.EPERM {
			t.Errorf("unshare = %v; want %v", err, unix.EPERM)
		}
		if out, err := exec.Command("/bin/sh", "-c", "echo yes").Output(); err != nil || string(out) != "yes\n" {
			t.Errorf("a shell under the filter says %q, %v", out, err)
		}
		return // the goroutine is not unlocked: its thread ends with it
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestInstall$", "-test.v")
	cmd.Env = append(os.Environ(), "SECCOMP_CHILD=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
