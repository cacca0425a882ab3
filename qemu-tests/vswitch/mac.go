package vswitch

// maxTable bounds the address table, as in a real switch: beyond it, frames
// to addresses not in it are flooded.
const maxTable = 4096

// group reports whether m is a multicast or broadcast address.
func (m MAC) group() bool { return m[0]&1 != 0 }

// macTable knows behind which port an address lives. Entries do not age:
// ports forget theirs when they are unplugged or lose their machine.
type macTable map[MAC]*Port

// learn notes that src lives behind p. A machine that moved is found at its
// new port at once.
func (t macTable) learn(src MAC, p *Port) {
	if src.group() {
		return // no valid source; learning it would swallow broadcasts
	}
	if _, known := t[src]; known || len(t) < maxTable {
		t[src] = p
	}
}

// lookup is the port for dst, or nil when the frame is to be flooded.
func (t macTable) lookup(dst MAC) *Port {
	if dst.group() {
		return nil
	}
	return t[dst]
}

// forget drops all addresses behind p.
func (t macTable) forget(p *Port) {
	for m, q := range t {
		if q == p {
			delete(t, m)
		}
	}
}
