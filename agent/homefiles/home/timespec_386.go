package home

import "golang.org/x/sys/unix"

// Seconds are 32 bits in this machine's old calls; times after 2038 are cut.

func setSec(ts *unix.Timespec, sec int64)   { ts.Sec = int32(min(sec, 1<<31-1)) }
func setNsec(ts *unix.Timespec, nsec int32) { ts.Nsec = nsec }
