// Package nofile knows how many files this process was allowed to have open
// when it was started. Package syscall raises the soft limit to the hard one
// before main runs and tells nobody what it was; a program that is run on
// behalf of this one must be given what its user has set.
//
// It works by being initialised before package syscall: Go initialises, among the
// packages whose imports are done, the one with the lowest import path first
// (release notes of Go 1.21), and this one imports nothing.
package nofile

import "unsafe"

var limit struct{ cur, max uint64 }

var known bool

//go:linkname rawSyscall6 syscall.RawSyscall6
func rawSyscall6(trap, a1, a2, a3, a4, a5, a6 uintptr) (r1, r2, errno uintptr)

func init() {
	const rlimitNofile = 7
	if sysPrlimit64 == 0 {
		return
	}
	_, _, errno := rawSyscall6(sysPrlimit64, 0, rlimitNofile, 0, uintptr(unsafe.Pointer(&limit)), 0, 0)
	known = errno == 0
}

// Soft is the soft limit at the start, if it is known.
func Soft() (soft uint64, ok bool) { return limit.cur, known }
