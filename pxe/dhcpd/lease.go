package dhcpd

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Times of leases.
const (
	// DefaultLeaseTime is long enough that a busy head may be restarted, and
	// short enough that a pool of spare addresses comes back within a shift.
	DefaultLeaseTime = time.Hour
	// offerHold is how long an offered address is kept for its machine.
	// EDK2 takes up to 60 s from offer to request (4+8+16+32 s of retries).
	offerHold = time.Minute
	// quarantine is how long an address is left alone after a machine said
	// that somebody else uses it (dnsmasq: DECLINE_BACKOFF 600).
	quarantine = 10 * time.Minute
	// longestLease is more than any configuration allows. A lease that ends
	// later was given when the head's clock was wrong, and must not block
	// its address until then.
	longestLease = 31 * 24 * time.Hour
)

// Network is what the leases of one interface are made from.
type Network struct {
	// Server is the head's own address in it.
	Server netip.Addr
	// Subnet is the network with its mask.
	Subnet netip.Prefix
	// First and Last bound the pool, both included.
	First, Last netip.Addr
	// Reserved are fixed addresses by MAC (lower case, colons). They may lie
	// outside the pool.
	Reserved map[string]netip.Addr
	// Router and DNS are told to clients when set.
	Router netip.Addr
	DNS    []netip.Addr
	// LeaseTime is DefaultLeaseTime when zero.
	LeaseTime time.Duration
}

// Lease is an address given to a machine. It is remembered after it expired,
// so that the machine gets it again while nobody else needs it.
type Lease struct {
	MAC     string
	Addr    netip.Addr
	Expires time.Time
}

// live tells whether the lease still holds.
func (l Lease) live(now time.Time) bool {
	left := l.Expires.Sub(now)
	return left > 0 && left < longestLease
}

// Counts are the addresses of a pool by use.
type Counts struct {
	Size, Leased, Offered, Quarantined int
}

func (c Counts) String() string {
	return fmt.Sprintf("%d addresses: %d leased, %d offered, %d in quarantine", c.Size, c.Leased, c.Offered, c.Quarantined)
}

// ErrExhausted is why a machine gets no offer.
type ErrExhausted struct{ Counts }

func (e ErrExhausted) Error() string { return "no free address: the pool has " + e.Counts.String() }

// Table decides which machine has which address. Leases are keyed by MAC, not
// by client id: firmware, iPXE and Linux on one machine send different client
// ids, and must get one address. Its methods may be called concurrently; time
// is always given, never read.
type Table struct {
	net Network

	// mu guards the following.
	mu     sync.Mutex
	byMAC  map[string]Lease
	byAddr map[netip.Addr]string // address -> MAC; the inverse of byMAC
	offers map[netip.Addr]offer
	shun   map[netip.Addr]time.Time // in quarantine until then
}

type offer struct {
	mac   string
	until time.Time
}

// NewTable makes a table that knows the leases given before. Those that no
// longer fit the network are dropped.
func NewTable(n Network, known []Lease) *Table {
	t := &Table{
		net: n, byMAC: map[string]Lease{}, byAddr: map[netip.Addr]string{},
		offers: map[netip.Addr]offer{}, shun: map[netip.Addr]time.Time{},
	}
	// The newest claim to an address wins.
	slices.SortFunc(known, func(a, b Lease) int { return a.Expires.Compare(b.Expires) })
	for _, l := range known {
		if t.mayHave(l.MAC, l.Addr) {
			t.set(l)
		}
	}
	return t
}

// Network is what the table was made for.
func (t *Table) Network() Network { return t.net }

func (n Network) leaseTime() time.Duration { return cmp.Or(n.LeaseTime, DefaultLeaseTime) }

func (n Network) inPool(a netip.Addr) bool {
	return a != n.Server && n.First.Compare(a) <= 0 && a.Compare(n.Last) <= 0
}

// mayHave tells whether the network's rules allow mac to have a.
func (t *Table) mayHave(mac string, a netip.Addr) bool {
	if r, ok := t.net.Reserved[mac]; ok {
		return a == r
	}
	if !t.net.inPool(a) {
		return false
	}
	for _, r := range t.net.Reserved {
		if r == a {
			return false
		}
	}
	return true
}

func (t *Table) set(l Lease) {
	if old, ok := t.byMAC[l.MAC]; ok {
		delete(t.byAddr, old.Addr)
	}
	if mac, ok := t.byAddr[l.Addr]; ok {
		delete(t.byMAC, mac)
	}
	t.byMAC[l.MAC], t.byAddr[l.Addr] = l, l.MAC
}

// free tells whether mac could be given a now: no one else holds it.
func (t *Table) free(now time.Time, mac string, a netip.Addr) bool {
	if now.Before(t.shun[a]) {
		return false
	}
	if o, ok := t.offers[a]; ok && o.mac != mac && now.Before(o.until) {
		return false
	}
	holder, ok := t.byAddr[a]
	return !ok || holder == mac || !t.byMAC[holder].live(now)
}

// Offer picks an address for a machine and holds it for a minute: its
// reservation, its last address, the one it wishes for, one that nobody ever
// had, and at last the one whose lease expired longest ago.
func (t *Table) Offer(now time.Time, mac string, wish netip.Addr) (netip.Addr, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a, ok := t.pick(now, mac, wish)
	if !ok {
		return netip.Addr{}, ErrExhausted{t.counts(now)}
	}
	for x, o := range t.offers {
		if o.mac == mac || !now.Before(o.until) {
			delete(t.offers, x)
		}
	}
	t.offers[a] = offer{mac, now.Add(offerHold)}
	return a, nil
}

func (t *Table) pick(now time.Time, mac string, wish netip.Addr) (netip.Addr, bool) {
	if r, ok := t.net.Reserved[mac]; ok {
		return r, !now.Before(t.shun[r])
	}
	if l, ok := t.byMAC[mac]; ok && t.free(now, mac, l.Addr) {
		return l.Addr, true
	}
	if wish.IsValid() && t.mayHave(mac, wish) && t.free(now, mac, wish) {
		return wish, true
	}
	reserved := map[netip.Addr]bool{}
	for _, r := range t.net.Reserved {
		reserved[r] = true
	}
	var oldest netip.Addr
	var since time.Time
	for a := t.net.First; a.IsValid() && a.Compare(t.net.Last) <= 0; a = a.Next() {
		if reserved[a] || a == t.net.Server || !t.free(now, mac, a) {
			continue
		}
		holder, had := t.byAddr[a]
		if !had {
			return a, true
		}
		if e := t.byMAC[holder].Expires; !oldest.IsValid() || e.Before(since) {
			oldest, since = a, e
		}
	}
	return oldest, oldest.IsValid()
}

// Commit gives a machine the address that it asks for. save must make the
// lease durable; it is called before the table changes, and without an answer
// to the client when it fails. The reason says why not when ok is false.
func (t *Table) Commit(now time.Time, mac string, a netip.Addr, save func(Lease) error) (reason string, err error) {
	t.mu.Lock()
	l := Lease{MAC: mac, Addr: a, Expires: now.Add(t.net.leaseTime())}
	switch {
	case !t.net.Subnet.Contains(a):
		reason = "it is not in " + t.net.Subnet.String()
	case !t.mayHave(mac, a):
		reason = "it is not this machine's to have"
	case !t.free(now, mac, a):
		reason = "another machine has it"
	case t.byMAC[mac].Addr.IsValid() && t.byMAC[mac].Addr != a && t.free(now, mac, t.byMAC[mac].Addr) && t.offers[a].mac != mac:
		// It was given another one since, and nobody offered it this one.
		reason = "this machine's address is " + t.byMAC[mac].Addr.String()
	}
	if reason == "" {
		// Hold it while the lease is written: others wait for other
		// addresses, not for the disk.
		t.offers[a] = offer{mac, now.Add(offerHold)}
	}
	t.mu.Unlock()
	if reason != "" {
		return reason, nil
	}
	if err := save(l); err != nil {
		return "", err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.offers, a)
	t.set(l)
	return "", nil
}

// Release ends a machine's lease. The address stays its own while it is free.
func (t *Table) Release(now time.Time, mac string, a netip.Addr, save func(Lease) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	l, ok := t.byMAC[mac]
	if !ok || l.Addr != a || !l.live(now) {
		return nil
	}
	l.Expires = now
	if err := save(l); err != nil {
		return err
	}
	t.set(l)
	return nil
}

// Decline puts an address in quarantine: the machine that was given it found
// someone else using it. Only that machine is believed.
func (t *Table) Decline(now time.Time, mac string, a netip.Addr) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byAddr[a] != mac && t.offers[a].mac != mac {
		return false
	}
	delete(t.offers, a)
	if t.byAddr[a] == mac {
		delete(t.byAddr, a)
		delete(t.byMAC, mac)
	}
	t.shun[a] = now.Add(quarantine)
	return true
}

// Withdraw ends the hold of an offer that the machine did not take.
func (t *Table) Withdraw(mac string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for a, o := range t.offers {
		if o.mac == mac {
			delete(t.offers, a)
		}
	}
}

// Holder is the MAC that has an address now, or "".
func (t *Table) Holder(now time.Time, a netip.Addr) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	mac := t.byAddr[a]
	if mac == "" || !t.byMAC[mac].live(now) {
		return ""
	}
	return mac
}

// Knows tells whether a machine has an address of ours or was offered one.
func (t *Table) Knows(now time.Time, mac string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l, ok := t.byMAC[mac]; ok && l.live(now) {
		return true
	}
	for _, o := range t.offers {
		if o.mac == mac && now.Before(o.until) {
			return true
		}
	}
	return false
}

// Counts tells how the pool is used.
func (t *Table) Counts(now time.Time) Counts {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts(now)
}

func (t *Table) counts(now time.Time) Counts {
	var c Counts
	for a := t.net.First; a.IsValid() && a.Compare(t.net.Last) <= 0; a = a.Next() {
		if a == t.net.Server {
			continue
		}
		c.Size++
		mac, had := t.byAddr[a]
		o, offered := t.offers[a]
		switch {
		case now.Before(t.shun[a]):
			c.Quarantined++
		case had && t.byMAC[mac].live(now):
			c.Leased++
		case offered && now.Before(o.until):
			c.Offered++
		}
	}
	return c
}
