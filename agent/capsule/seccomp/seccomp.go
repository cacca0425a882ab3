// Package seccomp keeps a job away from what CRIU cannot carry.
//
// A program that holds an io_uring, a perf event or a user fault descriptor
// cannot be moved, and one that put itself under Landlock or keeps keys in a
// kernel keyring would lose them at a move without being told. The filter makes these
// calls fail the way an older or stricter kernel does, so that programs fall
// back. It is no sandbox: what a job may do is decided by its user and its
// capability bounding set.
//
// The filter looks at the call's number, and at arguments only for clone,
// unshare and socket; so the kernel (5.11 or newer) allows every other call from a
// bitmap without running it.
package seccomp

import (
	"fmt"
	"unsafe"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data (linux/seccomp.h). arg0 is the low half on
// our little-endian machines; all flags that we test are in it.
const (
	offNr   = 0
	offArch = 4
	offArg0 = 16
	offArg2 = 32
)

// x32Bit marks calls of the x32 ABI, which has numbers of its own and is used
// by next to nobody.
const x32Bit = 0x40000000

// newNamespaces are the clone flags that make namespaces. CRIU does not carry
// nested ones. CLONE_NEWTIME is not among them, as clone uses its bit for the
// exit signal.
const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// rule is a system call that fails with errno: always, or when an argument says so.
type rule struct {
	name        string
	amd64, i386 uint32
	errno       unix.Errno
	flags       uint32 // if not 0: when the first argument has one of these
	third       uint32 // if not 0: when the third argument is this
}

func always(name string, amd64, i386 uint32, errno unix.Errno) rule {
	return rule{name: name, amd64: amd64, i386: i386, errno: errno}
}

// rules: numbers from arch/x86/entry/syscalls/syscall_64.tbl and _32.tbl.
var rules = []rule{
	always("io_uring_setup", 425, 425, unix.ENOSYS),
	always("io_uring_enter", 426, 426, unix.ENOSYS),
	always("io_uring_register", 427, 427, unix.ENOSYS),
	always("perf_event_open", 298, 336, unix.EPERM),
	always("userfaultfd", 323, 374, unix.EPERM),
	always("bpf", 321, 357, unix.EPERM),
	always("memfd_secret", 447, 447, unix.ENOSYS),
	// Carried without an error, but lost: worse than not having them.
	always("landlock_create_ruleset", 444, 444, unix.ENOSYS),
	always("landlock_add_rule", 445, 445, unix.ENOSYS),
	always("landlock_restrict_self", 446, 446, unix.ENOSYS),
	always("mseal", 462, 462, unix.ENOSYS),
	always("add_key", 248, 286, unix.ENOSYS),
	always("request_key", 249, 287, unix.ENOSYS),
	always("keyctl", 250, 288, unix.ENOSYS),
	// The flags of clone3 are behind a pointer, where a filter cannot look;
	// every libc falls back to clone.
	always("clone3", 435, 435, unix.ENOSYS),
	{name: "clone", amd64: 56, i386: 120, errno: unix.EPERM, flags: newNamespaces},
	// CRIU refuses any process with a multipath TCP socket, and Go's listeners
	// are of that kind where they can. (i386 may hide it behind socketcall.)
	{name: "socket", amd64: 41, i386: 359, errno: unix.EPROTONOSUPPORT, third: unix.IPPROTO_MPTCP},
	{name: "unshare", amd64: 272, i386: 310, errno: unix.EPERM, flags: newNamespaces | unix.CLONE_NEWTIME},
}

func fail(errno unix.Errno) bpf.Instruction {
	return bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO | uint32(errno)}
}

// table is the part of the filter for one architecture: it always returns.
func table(number func(rule) uint32) []bpf.Instruction {
	is := []bpf.Instruction{bpf.LoadAbsolute{Off: offNr, Size: 4}}
	for _, r := range rules {
		if r.flags == 0 && r.third == 0 {
			is = append(is, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: number(r), SkipTrue: 1}, fail(r.errno))
			continue
		}
		load, pass := bpf.LoadAbsolute{Off: offArg0, Size: 4}, bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: r.flags, SkipTrue: 1}
		if r.third != 0 {
			load, pass = bpf.LoadAbsolute{Off: offArg2, Size: 4}, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: r.third, SkipTrue: 1}
		}
		is = append(is,
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: number(r), SkipTrue: 4},
			load, pass,
			fail(r.errno),
			bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
		)
	}
	return append(is, bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW})
}

// program is the whole filter.
func program() []bpf.Instruction {
	amd64 := table(func(r rule) uint32 { return r.amd64 })
	i386 := table(func(r rule) uint32 { return r.i386 })
	is := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.AUDIT_ARCH_X86_64, SkipTrue: uint8(3 + len(amd64))},
		bpf.LoadAbsolute{Off: offNr, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: x32Bit, SkipTrue: 1},
		fail(unix.ENOSYS),
	}
	is = append(is, amd64...)
	is = append(is, bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AUDIT_ARCH_I386, SkipTrue: 1}, fail(unix.ENOSYS))
	return append(is, i386...)
}

// Install puts the filter on the calling thread and on all that it starts or
// executes. The caller has locked the goroutine to its thread and
// has CAP_SYS_ADMIN, so that set-user-ID programs go on working.
func Install() error {
	raw, err := bpf.Assemble(program())
	if err != nil {
		return fmt.Errorf("assemble the seccomp filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, in := range raw {
		filter[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("install the seccomp filter: %w", errno)
	}
	return nil
}
