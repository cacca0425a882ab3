package migrate

import (
	"context"
	"time"

	"mosimg/internal/fault"
)

// DefaultLease is DESIGN's home_lease.
const DefaultLease = 5 * time.Minute

// Times of the lease: how often a guest's home is asked, and after how long
// without an answer the guest is held.
const (
	leaseCheck = 2 * time.Second
	leaseHold  = 10 * time.Second
)

// lease is what is to happen to a guest whose home has not answered for a
// while. It is pure, so that the rule can be read and tested.
type lease string

const (
	leaseGood    lease = "good"
	leaseWaiting lease = "held" // frozen, until the home is back
	leaseOver    lease = "over" // killed
)

func leaseAfter(silent, most time.Duration) lease {
	switch {
	case silent >= most:
		return leaseOver
	case silent >= leaseHold:
		return leaseWaiting
	}
	return leaseGood
}

// Run keeps copies in order until ctx ends: what an earlier agent left, what a
// home that could not be reached has not decided, and the leases of guests.
func (n *Node) Run(ctx context.Context) {
	n.Settle(ctx)
	tick := time.NewTicker(leaseCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n.Settle(ctx)
		n.renew(ctx)
	}
}

// renew asks the homes of all guests that run here.
func (n *Node) renew(ctx context.Context) {
	n.mu.Lock()
	var guests []*jobCopy
	for _, cp := range n.copies {
		if rec := cp.record(); rec.Home != n.conf.Self && rec.Phase == running {
			guests = append(guests, cp)
		}
	}
	n.mu.Unlock()
	done := make(chan struct{})
	for _, cp := range guests {
		go func() {
			n.renewCopy(ctx, cp)
			done <- struct{}{}
		}()
	}
	for range guests {
		<-done
	}
}

func (n *Node) renewCopy(ctx context.Context, cp *jobCopy) {
	if !cp.turn.TryLock() {
		return // it is being moved: its home is there
	}
	defer cp.turn.Unlock()
	rec := cp.record()
	if rec.Phase != running {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, leaseHold)
	defer cancel()
	if err := n.rootLost(rec); err != nil {
		n.log.Warn("a guest is killed", "job", rec.Job, "home", rec.Home, "why", err)
		if err := cp.c.Kill(ctx); err != nil { // watch sees its end
			n.log.Warn("lease of a guest", "err", err)
		}
		return
	}
	asked := time.Now()
	v, _, err := n.conf.Judge.Ask(ctx, rec.Home, rec.Job, Placement{n.conf.Self, rec.Epoch})
	log := n.log.With("job", rec.Job, "home", rec.Home)
	if err == nil || fault.KindOf(err) == fault.Refused {
		cp.heard.Store(asked.UnixNano())
	}
	switch {
	case err == nil && v == Discard:
		log.Warn("a guest whose home does not know it is killed")
		err = n.remove(ctx, cp)
	case err == nil && rec.Held:
		if err = cp.c.Cont(ctx); err == nil {
			log.Info("the home is back: its guest goes on")
			err = n.note(cp, func(r *copyRecord) { r.Held = false })
		}
	case err != nil:
		err = n.overdue(ctx, cp, rec)
	}
	if err != nil {
		log.Warn("lease of a guest", "err", err)
	}
}

// overdue does what the lease says about a guest whose home is silent; turn is held.
func (n *Node) overdue(ctx context.Context, cp *jobCopy, rec copyRecord) error {
	most := n.conf.Lease
	if most == 0 {
		most = DefaultLease
	}
	// Its own time: that of the question may be over.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTime)
	defer cancel()
	log := n.log.With("job", rec.Job, "home", rec.Home)
	switch leaseAfter(time.Since(time.Unix(0, cp.heard.Load())), most) {
	case leaseWaiting:
		if rec.Held {
			return nil
		}
		st, err := cp.c.Status(ctx)
		if err != nil || st.Stopped { // its user has stopped it, and only its user lets it go on
			return err
		}
		log.Warn("the home does not answer: its guest is held")
		// Journalled first: an agent that dies in between lets go what was never held, which does nothing.
		if err := n.note(cp, func(r *copyRecord) { r.Held = true }); err != nil {
			return err
		}
		return cp.c.Stop(ctx)
	case leaseOver:
		log.Warn("the home has not answered for the whole lease: its guest is killed", "lease", most)
		return n.remove(ctx, cp)
	}
	return nil
}
