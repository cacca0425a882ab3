package jobs

import (
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/agent/jobs/wire"
)

// order is a signal, a stop or a cont on its way to the job. It waits while
// the job moves. If a connection breaks when it may have been carried out, it is
// sent again; by its id the shim knows a signal that it has had. Nothing of it is
// journalled: its mosrun keeps it until it is heard, and gives it to the next agent again.
type order struct {
	verb   control.Verb
	signal unix.Signal
	group  bool
	id     uint64 // mosrun's; 0 is that of an older one, of which the shim knows no repetition
}

// same tells whether an order asks for the same as another one.
func (o order) same(other order) bool {
	other.id = o.id
	return o == other
}

// orderTime bounds one try of an order.
const orderTime = 5 * time.Second

// order puts an order into the queue, unless it came before, and returns up to
// which one all are heard. As with the kernel's own, a signal that
// is on its way is not sent a second time; of stop and cont the last one counts.
func (j *job) order(o order) (heard uint64) {
	j.change(func() {
		if o.id == 0 || o.id > j.ordered {
			j.ordered = max(j.ordered, o.id)
			j.enqueue(o)
		}
		heard = j.heard()
	})
	return heard
}

// enqueue is order; mu is held.
func (j *job) enqueue(o order) {
	first := 0
	if j.sending {
		first = 1 // that one may have arrived: it is not ours any more
	}
	waiting := slices.Clone(j.orders[first:])
	if o.verb == control.Signal && slices.ContainsFunc(waiting, o.same) {
		return
	}
	if o.verb != control.Signal {
		waiting = slices.DeleteFunc(waiting, func(old order) bool { return old.verb != control.Signal })
	}
	j.orders = append(append(j.orders[:first:first], waiting...), o)
}

// heard is the last order of which, and of all before, nothing remains to be
// done; mu is held. One that was given while the same one waited has become that one, so
// only what still waits matters.
func (j *job) heard() uint64 {
	heard := j.ordered
	for _, o := range j.orders {
		if o.id != 0 {
			heard = min(heard, o.id-1)
		}
	}
	return heard
}

// doom makes the job end as soon as its node can be told, whatever happens to
// this agent.
func (j *job) doom() error {
	err := j.setInfo(func(i *Info) { i.Killed = true })
	j.change(func() { j.info.Killed = true })
	return err
}

// steer carries out orders, in their order, until ctx ends.
func (j *job) steer(ctx context.Context) {
	wait := newPause()
	for {
		var o order
		var changed chan struct{}
		err := j.await(ctx, func() bool {
			changed = j.changed
			switch {
			case j.rec.End != nil:
				return false
			case j.info.Killed:
				o = order{verb: control.Kill}
			case len(j.orders) > 0:
				o = j.orders[0]
			default:
				return false
			}
			j.sending = j.place != nil && o.verb != control.Kill
			return j.place != nil
		})
		if err != nil {
			return
		}
		err = j.deliver(ctx, o)
		switch {
		case o.verb == control.Kill:
			// Done when the job has ended. It may have hit a frozen copy just before the job went on elsewhere.
		case err == nil || final(err):
			j.done(o, err)
			wait.reset()
			continue
		default:
			j.mu.Lock()
			j.sending = false
			j.mu.Unlock()
			j.s.log.Debug("an order is tried again", "job", j.id, "order", o.verb, "signal", o.signal, "err", err)
		}
		if !wait.wait(ctx, changed) {
			return
		}
	}
}

func (j *job) deliver(ctx context.Context, o order) error {
	p, err := j.awaitPlace(ctx)
	if err != nil {
		return err
	}
	c, ctx, cancel, err := j.capsule(ctx, p, orderTime)
	if err != nil {
		return err
	}
	defer cancel()
	switch o.verb {
	case control.Kill:
		return c.Kill(ctx)
	case control.Stop:
		return c.Stop(ctx)
	case control.Cont:
		return c.Cont(ctx)
	default:
		return c.SignalOnce(ctx, o.id, o.signal, o.group)
	}
}

// final tells whether a signal need not be tried again: the program is gone,
// though a daemon of its is left, or the kernel does not know the signal.
func final(err error) bool { return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) }

// done takes an order from the queue.
func (j *job) done(o order, err error) {
	j.s.log.Debug("order", "job", j.id, "order", o.verb, "signal", o.signal, "err", err)
	var s *session
	var heard uint64
	j.change(func() {
		j.orders, j.sending = slices.Delete(j.orders, 0, 1), false
		if err == nil && o.verb != control.Signal {
			j.stopped = o.verb == control.Stop
		}
		s, heard = j.session, j.heard()
	})
	if s == nil {
		return
	}
	if err == nil && o.verb == control.Stop {
		s.tell(wire.KindStopped, nil)
	}
	if o.id != 0 {
		s.tellHeard(heard)
	}
}
