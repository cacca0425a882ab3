package dhcpd

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"mosimg/pxe/limit"
)

// Times of leases.
const (
	// DefaultLeaseTime is long enough that a busy head may be restarted, and
	// short enough that a pool of spare addresses comes back within a shift.
	DefaultLeaseTime = time.Hour
	// StrangerLeaseTime is enough to boot and to be seen by an operator. A
	// machine's service processor, ROM and system may all ask, and a room of
	// guests must not use up the pool (coresmd, Warewulf: 2 to 5 minutes).
	StrangerLeaseTime = 5 * time.Minute
	// offerHold is how long an offered address is kept for its machine.
	// EDK2 takes up to 60 s from offer to request (4+8+16+32 s of retries).
	offerHold = time.Minute
	// quarantine is how long an address is left alone after a machine said
	// that somebody else uses it (dnsmasq: DECLINE_BACKOFF 600).
	quarantine = 10 * time.Minute
	// declines are the addresses that one machine may put in quarantine in
	// that time. One whose router answers every ARP request (proxy ARP)
	// declines whatever it gets, and would use up the pool.
	declines = 3
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
	net      Network
	reserved map[netip.Addr]bool // the addresses in net.Reserved

	// mu guards the following.
	mu     sync.Mutex
	byMAC  map[string]Lease
	byAddr map[netip.Addr]string // address -> MAC; the inverse of byMAC
	offers map[netip.Addr]offer
	shun   map[netip.Addr]time.Time // in quarantine until then
	// believe bounds the declines of each machine.
	believe *limit.Limiter
}

type offer struct {
	mac   string
	until time.Time
	// vacant: somebody looked whether the address is in use.
	vacant bool
}

// NewTable makes a table that knows the leases given before. Those that no
// longer fit the network are dropped.
func NewTable(n Network, known []Lease) *Table {
	t := &Table{
		reserved: map[netip.Addr]bool{},
		net:      n, byMAC: map[string]Lease{}, byAddr: map[netip.Addr]string{},
		offers: map[netip.Addr]offer{}, shun: map[netip.Addr]time.Time{},
		believe: limit.New(declines/quarantine.Seconds(), declines, 4096),
	}
	for _, r := range n.Reserved {
		t.reserved[r] = true
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
	return t.net.inPool(a) && !t.reserved[a]
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
// reservation, its last address, the one that it was offered, the one it wishes
// for, one that nobody ever had, and at last the one whose lease expired
// longest ago. vacant tells that nobody else can be using it: it is reserved,
// leased to this machine, or was found Vacant for it a moment ago.
func (t *Table) Offer(now time.Time, mac string, wish netip.Addr) (a netip.Addr, vacant bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var held netip.Addr
	for x, o := range t.offers {
		switch {
		case !now.Before(o.until):
			delete(t.offers, x)
		case o.mac == mac:
			held = x
		}
	}
	a, ok := t.pick(now, mac, held, wish)
	if !ok {
		return netip.Addr{}, false, ErrExhausted{t.counts(now)}
	}
	_, reserved := t.net.Reserved[mac]
	l := t.byMAC[mac]
	vacant = reserved || l.Addr == a && l.live(now) || held == a && t.offers[a].vacant
	if held.IsValid() {
		delete(t.offers, held)
	}
	t.offers[a] = offer{mac, now.Add(offerHold), vacant}
	return a, vacant, nil
}

// Vacant notes that nobody answers for an address that mac was offered.
func (t *Table) Vacant(mac string, a netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o, ok := t.offers[a]; ok && o.mac == mac {
		o.vacant = true
		t.offers[a] = o
	}
}

// Occupied puts an address in quarantine: somebody who was not given it
// answers for it.
func (t *Table) Occupied(now time.Time, a netip.Addr) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.offers, a)
	t.shun[a] = now.Add(quarantine)
}

func (t *Table) pick(now time.Time, mac string, held, wish netip.Addr) (netip.Addr, bool) {
	if r, ok := t.net.Reserved[mac]; ok {
		return r, !now.Before(t.shun[r])
	}
	if l, ok := t.byMAC[mac]; ok && t.free(now, mac, l.Addr) {
		return l.Addr, true
	}
	for _, a := range []netip.Addr{held, wish} {
		if a.IsValid() && t.mayHave(mac, a) && t.free(now, mac, a) {
			return a, true
		}
	}
	var oldest netip.Addr
	var since time.Time
	for a := t.net.First; a.IsValid() && a.Compare(t.net.Last) <= 0; a = a.Next() {
		if t.reserved[a] || a == t.net.Server || !t.free(now, mac, a) {
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

// Verdict is what a table says to a machine that asks for an address.
type Verdict int

const (
	// Granted: the lease is stored.
	Granted Verdict = iota
	// Wrong: the machine cannot have this address and must be told.
	Wrong
	// NotOurs: another server may have given it; we know nothing of either.
	NotOurs
)

// Commit gives a machine the address that it asks for, for some time. save must
// make the lease durable; it is called before the table changes, and without an
// answer to the client when it fails. chosen tells that the machine took our
// offer. The reason says why not when the verdict is Wrong.
func (t *Table) Commit(now time.Time, mac string, a netip.Addr, life time.Duration, chosen bool, save func(Lease) error) (v Verdict, reason string, err error) {
	t.mu.Lock()
	v, reason = t.judge(now, mac, a, chosen)
	if v == Granted {
		// Hold it while the lease is written: others wait for other
		// addresses, not for the disk.
		t.offers[a] = offer{mac, now.Add(offerHold), true}
	}
	t.mu.Unlock()
	if v != Granted {
		return v, reason, nil
	}
	l := Lease{MAC: mac, Addr: a, Expires: now.Add(life)}
	if err := save(l); err != nil {
		return Granted, "", err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.offers, a)
	t.set(l)
	return Granted, "", nil
}

func (t *Table) judge(now time.Time, mac string, a netip.Addr, chosen bool) (Verdict, string) {
	mine, had := t.byMAC[mac]
	_, reserved := t.net.Reserved[mac]
	switch {
	case !t.net.Subnet.Contains(a):
		return Wrong, "it is not in " + t.net.Subnet.String()
	case !t.mayHave(mac, a):
		// RFC 2131 section 4.3.2: a server without a record of the client
		// must be silent, since the address may come from another one.
		if !chosen && !had && !reserved && !t.net.inPool(a) && a != t.net.Server && !t.reserved[a] {
			return NotOurs, ""
		}
		return Wrong, "it is not this machine's to have"
	case !t.free(now, mac, a):
		return Wrong, "another machine has it"
	case had && mine.Addr != a && t.free(now, mac, mine.Addr) && t.offers[a].mac != mac:
		// It was given another one since, and nobody offered it this one.
		return Wrong, "this machine's address is " + mine.Addr.String()
	}
	return Granted, ""
}

// Release ends a machine's lease. The address stays its own while it is free.
func (t *Table) Release(now time.Time, mac string, a netip.Addr, save func(Lease) error) error {
	l, ok := t.lease(mac)
	if !ok || l.Addr != a || !l.live(now) {
		return nil
	}
	ended := l
	ended.Expires = now
	if err := save(ended); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byMAC[mac] == l { // not renewed meanwhile
		t.set(ended)
	}
	return nil
}

func (t *Table) lease(mac string) (Lease, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	l, ok := t.byMAC[mac]
	return l, ok
}

// Decline puts an address in quarantine: the machine that was given it found
// someone else using it. Only that machine is believed, and not without end;
// for the rest it loses the address. save makes durable that it has it no more.
func (t *Table) Decline(now time.Time, mac string, a netip.Addr, save func(Lease) error) (quarantined bool, err error) {
	t.mu.Lock()
	leased := t.byAddr[a] == mac
	if !leased && t.offers[a].mac != mac {
		t.mu.Unlock()
		return false, nil
	}
	delete(t.offers, a)
	if leased {
		delete(t.byAddr, a)
		delete(t.byMAC, mac)
	}
	quarantined = t.believe.Allow(mac, now)
	if quarantined {
		t.shun[a] = now.Add(quarantine)
	}
	t.mu.Unlock()
	if leased {
		err = save(Lease{MAC: mac, Addr: a, Expires: now})
	}
	return quarantined, err
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
