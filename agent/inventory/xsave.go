package inventory

import (
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From include/uapi/linux/ptrace.h and elf.h.
const (
	ptraceGetRegSet = 0x4204
	ntX86XState     = 0x202
)

// xsaveBytes is the size of the CPU's extended state as the kernel saves it
// (CPUID leaf 0xD, EBX), or 0 when the CPU has no XSAVE. CRIU restores a
// process only where it is as large or larger. Go has no CPUID without
// assembly, but ptrace reports the size of that register set: a child is
// stopped at its exec, asked and killed, before it runs an instruction.
func xsaveBytes() int {
	// ptrace belongs to a thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0
	}
	defer null.Close()
	fd := null.Fd()
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"xsave"}, &syscall.ProcAttr{
		Files: []uintptr{fd, fd, fd},
		Sys:   &syscall.SysProcAttr{Ptrace: true},
	})
	if err != nil {
		return 0
	}
	defer func() {
		unix.Kill(pid, unix.SIGKILL)
		var ws unix.WaitStatus
		for {
			_, err := unix.Wait4(pid, &ws, 0, nil)
			if err == unix.EINTR || err == nil && ws.Stopped() {
				continue
			}
			return
		}
	}()
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, 0, nil); err != nil || !ws.Stopped() {
		return 0
	}
	var buf [32 << 10]byte // AMX's state is the largest so far, 11 KiB in all
	iov := unix.Iovec{Base: &buf[0]}
	iov.SetLen(len(buf))
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceGetRegSet, uintptr(pid), ntX86XState, uintptr(unsafe.Pointer(&iov)), 0, 0); errno != 0 {
		return 0
	}
	return int(iov.Len)
}
