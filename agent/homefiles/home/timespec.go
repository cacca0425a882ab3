//go:build !386

package home

import "golang.org/x/sys/unix"

func setSec(ts *unix.Timespec, sec int64)   { ts.Sec = sec }
func setNsec(ts *unix.Timespec, nsec int32) { ts.Nsec = int64(nsec) }
