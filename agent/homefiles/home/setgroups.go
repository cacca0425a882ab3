//go:build !386

package home

import "golang.org/x/sys/unix"

const sysSetgroups = unix.SYS_SETGROUPS
