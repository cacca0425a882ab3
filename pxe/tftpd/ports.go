package tftpd

import (
	"fmt"
	"strconv"
	"strings"
	"sync/atomic"
)

// Ports says from which ports files are sent. The zero value is one of the
// kernel's for each transfer.
type Ports struct {
	// Single sends everything from the port that requests come to: all that
	// some firewalls and NATs let pass.
	Single bool
	// First and Last are a range, one port for each transfer; 0 for none.
	First, Last uint16
}

// ParsePorts reads "" (any port), "single" or a range such as "40000-40255".
func ParsePorts(s string) (Ports, error) {
	switch s {
	case "":
		return Ports{}, nil
	case "single":
		return Ports{Single: true}, nil
	}
	a, b, ok := strings.Cut(s, "-")
	first, err1 := strconv.ParseUint(a, 10, 16)
	last, err2 := strconv.ParseUint(b, 10, 16)
	if !ok || err1 != nil || err2 != nil || first < 1 || last < first {
		return Ports{}, fmt.Errorf("%q is neither single nor a range of ports such as 40000-40255", s)
	}
	return Ports{First: uint16(first), Last: uint16(last)}, nil
}

// places is how many transfers can run at a time.
func (p Ports) places() int {
	if p.First == 0 {
		return maxTransfers
	}
	return min(maxTransfers, int(p.Last-p.First)+1)
}

// portRange gives out the ports of a range in turn, so that a late packet of
// an ended transfer does not meet the next one.
type portRange struct {
	Ports
	next atomic.Uint32
}

// ports to try for one transfer, in this order.
func (r *portRange) candidates() []uint16 {
	if r.First == 0 {
		return []uint16{0}
	}
	n := uint32(r.Last-r.First) + 1
	start := r.next.Add(1)
	all := make([]uint16, n)
	for i := range n {
		all[i] = r.First + uint16((start+i)%n)
	}
	return all
}
