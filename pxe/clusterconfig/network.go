package clusterconfig

import (
	"net/netip"

	"mosimg/internal/fault"
)

// printableASCII are the characters from '!' to '~'.
var printableASCII = func() string {
	var b []byte
	for c := byte('!'); c <= '~'; c++ {
		b = append(b, c)
	}
	return string(b)
}()

// maxPool bounds a pool: two bytes' worth of machines on one wire is more than
// Ethernet bears.
const maxPool = 1 << 16

// Resolve completes a network with the head's address on its interface and
// checks it as a whole. server is that address with its mask.
func (c *Config) Resolve(w Network, server netip.Prefix) (Network, error) {
	p := &parser{name: c.name}
	if p.name == "" {
		p.name = "defaults"
	}
	if !w.Subnet.IsValid() {
		w.Subnet = server.Masked()
		w.subnetLine = w.line
	}
	if !w.Subnet.Contains(server.Addr()) {
		p.bad(w.subnetLine, "subnet %s does not contain the head's address %s on %s", w.Subnet, server.Addr(), w.Interface)
	} else if !w.First.IsValid() {
		w.First, w.Last = upperHalf(w.Subnet)
		if w.Subnet.Bits() > 30 {
			p.bad(w.line, "subnet %s of %s has no room for machines", w.Subnet, w.Interface)
		}
	}
	p.checkNetwork(&w)
	for _, r := range w.Reservations {
		if r.Address == server.Addr() {
			p.bad(r.line, "%s is the head's own address", r.Address)
		}
	}
	if w.First == w.Last && w.First == server.Addr() {
		p.bad(w.poolLine, "the pool has no address but the head's own")
	}
	return w, p.faults.Err(fault.Usage, "check network of", w.Interface, "")
}

// checkNetwork checks pool, router and reservations against the subnet.
func (p *parser) checkNetwork(w *Network) {
	first, last := w.Subnet.Masked().Addr(), Broadcast(w.Subnet)
	usable := func(a netip.Addr) bool { return w.Subnet.Contains(a) && a != first && a != last }
	if w.First.IsValid() {
		switch {
		case !w.Subnet.Contains(w.First) || !w.Subnet.Contains(w.Last):
			p.bad(w.poolLine, "pool %s-%s is outside the subnet %s", w.First, w.Last, w.Subnet)
		case !usable(w.First) || !usable(w.Last):
			p.bad(w.poolLine, "pool %s-%s contains the network's or the broadcast address of %s", w.First, w.Last, w.Subnet)
		case distance(w.First, w.Last) >= maxPool:
			p.bad(w.poolLine, "pool %s-%s has more than %d addresses", w.First, w.Last, maxPool)
		}
	}
	if w.Router.IsValid() && !usable(w.Router) {
		p.bad(w.routerLine, "router %s is not an address in %s", w.Router, w.Subnet)
	}
	for _, r := range w.Reservations {
		if !r.Address.IsValid() {
			continue
		}
		switch {
		case !usable(r.Address):
			p.bad(r.line, "reserved address %s is not an address in %s", r.Address, w.Subnet)
		case w.First.IsValid() && w.First.Compare(r.Address) <= 0 && r.Address.Compare(w.Last) <= 0:
			p.bad(r.line, "reserved address %s overlaps the pool %s-%s", r.Address, w.First, w.Last)
		case r.Address == w.Router:
			p.bad(r.line, "reserved address %s is the router's", r.Address)
		}
	}
}

// upperHalf is the default pool: the lower half is left to machines with
// static addresses and to reservations.
func upperHalf(s netip.Prefix) (first, last netip.Addr) {
	lo, hi := toInt(s.Masked().Addr()), toInt(Broadcast(s))
	mid := lo + (hi-lo)/2 + 1
	mid = max(mid, lo+1)
	if hi-mid > maxPool {
		mid = hi - maxPool
	}
	return fromInt(mid), fromInt(hi - 1)
}

// Broadcast is the last address of a subnet.
func Broadcast(s netip.Prefix) netip.Addr {
	return fromInt(toInt(s.Masked().Addr()) | (1<<(32-s.Bits()) - 1))
}

func distance(a, b netip.Addr) uint32 { return toInt(b) - toInt(a) }

func toInt(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func fromInt(v uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
}
