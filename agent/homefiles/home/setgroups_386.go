package home

import "golang.org/x/sys/unix"

// The plain call has 16-bit groups on this machine.
const sysSetgroups = unix.SYS_SETGROUPS32
