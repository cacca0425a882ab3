package home

import (
	"fmt"
	"math"
)

// Lock types of fcntl, the same in FUSE (include/uapi/asm-generic/fcntl.h).
const (
	readLock  = 0
	writeLock = 1
	unlock    = 2
)

// endOfFile as the end of a range: to the end of the file, however it grows.
const endOfFile = math.MaxInt64

// lockRange is a locked range of bytes, both ends included.
type lockRange struct {
	start, end uint64
	typ        uint32
}

func (r lockRange) String() string {
	switch {
	case r.start == 0 && r.end == endOfFile:
		return "all"
	case r.end == endOfFile:
		return fmt.Sprintf("bytes from %d", r.start)
	}
	return fmt.Sprintf("bytes %d to %d", r.start, r.end)
}

// rangeSet is what one owner holds on one inode, as the kernel keeps it: in
// order, without overlaps. The zero value holds nothing.
type rangeSet []lockRange

// set gives the ranges after the owner has set r, which replaces whatever it
// held there (fcntl(2)); typ unlock only takes away.
func (s rangeSet) set(r lockRange) rangeSet {
	var out rangeSet
	add := func(x lockRange) {
		if n := len(out); n > 0 && out[n-1].typ == x.typ && out[n-1].end+1 == x.start {
			out[n-1].end = x.end
			return
		}
		out = append(out, x)
	}
	placed := r.typ == unlock
	for _, x := range s {
		if !placed && x.start > r.end {
			add(r)
			placed = true
		}
		if x.end < r.start || x.start > r.end {
			add(x)
			continue
		}
		if x.start < r.start {
			add(lockRange{x.start, r.start - 1, x.typ})
		}
		if !placed {
			add(r)
			placed = true
		}
		if x.end > r.end {
			add(lockRange{r.end + 1, x.end, x.typ})
		}
	}
	if !placed {
		add(r)
	}
	return out
}
