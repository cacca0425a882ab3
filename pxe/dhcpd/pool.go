package dhcpd

import (
	"sync"
	"time"
)

// poolWatch reports once that a pool is nearly used up, while there is still
// time to do something about it.
type poolWatch struct {
	// mu guards the following.
	mu sync.Mutex
	// skip is how many more leases cannot use up the pool: counting a pool of
	// 65536 at each lease would cost more than the lease.
	skip int
	told bool
}

// rarely lets something be told now and then.
type rarely struct {
	// mu guards the following.
	mu   sync.Mutex
	next time.Time
	more int // that were not told
}

// due tells whether it may be told now, and how often it was not since.
func (r *rarely) due(now time.Time) (more int, ok bool) {
	const pause = 5 * time.Second
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Before(r.next) {
		r.more++
		return 0, false
	}
	more, r.more, r.next = r.more, 0, now.Add(pause)
	return more, true
}

// reserve is what should be left: a tenth, but one address at least.
func (c Counts) reserve() int { return max(1, c.Size/10) }

// free is what is left to give to machines that were never here.
func (c Counts) free() int { return c.Size - c.Leased - c.Offered - c.Quarantined }

// leased is called after each lease. It returns the counts when they must be
// told now.
func (w *poolWatch) leased(now time.Time, t *Table) (Counts, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.skip > 0 {
		w.skip--
		return Counts{}, false
	}
	c := t.Counts(now)
	over := c.free() - c.reserve()
	if over > 0 {
		// Half of it: quarantine takes addresses too.
		w.skip = over / 2
		if over > c.reserve() {
			w.told = false // there was time to breathe
		}
		return Counts{}, false
	}
	tell := !w.told
	w.told = true
	return c, tell
}
