package tftpd

import (
	"errors"
	"fmt"
	"time"
)

const (
	// maxWait bounds the backoff: the wait for an ACK doubles up to it.
	maxWait = 8 * time.Second
	// maxTries is how often something is sent again without an answer. With
	// waits of 1, 2, 4, 8, 8 and 8 s a machine that is gone is given up
	// after half a minute.
	maxTries = 5
	// minPause is the least time between the word of a gap and its repair.
	minPause = time.Millisecond
)

// transfer is one file on its way to one client: what was sent, what was
// acknowledged, and when to do something about it. It knows no socket and no
// clock. Something happened (start, packet, expire, again, gone) goes in, a
// step with what to send comes out.
//
// Blocks are counted from 1 without end. Invariant: acked <= sent <= blocks
// and sent-acked <= window.
type transfer struct {
	terms
	data   []byte
	blocks uint64 // the last one is shorter than terms.block, maybe empty

	offering bool // the OACK is not acknowledged
	acked    uint64
	sent     uint64

	due    time.Time // when expire is to be called
	tries  int       // sent again since the client was last heard
	sentAt time.Time // when the last step's packets went out
	heard  time.Time // the last acknowledgement of something new
	rtt    time.Duration
	// timed is the block (0 is the OACK) whose acknowledgement tells the
	// next rtt, sent once at timedAt; the latter is zero when there is none.
	timed   uint64
	timedAt time.Time
	// repaired: the window was sent again since the last progress.
	repaired bool
	// gap: the client acknowledged a part of the window; at due the rest
	// is sent again.
	gap bool

	resent uint64 // packets sent again, for the log
}

// outcome is how a transfer stands.
type outcome int

const (
	running  outcome = iota
	finished         // the client has the file
	aborted          // the client does not want it (any more)
	silent           // the client does not answer
)

// step is what a transfer does next.
type step struct {
	oack     bool   // send the OACK
	from, to uint64 // send these blocks; 0: none
	outcome  outcome
	err      error // why it was aborted or silent
}

func newTransfer(data []byte, t terms) *transfer {
	return &transfer{terms: t, data: data, blocks: uint64(len(data)/t.block) + 1}
}

// payload is the bytes of block n.
func (t *transfer) payload(n uint64) []byte {
	from := int(n-1) * t.block
	return t.data[from:min(from+t.block, len(t.data))]
}

// started tells whether the client has acknowledged anything.
func (t *transfer) started() bool { return !t.heard.IsZero() }

// start is the answer to the request, at first or when the client begins again.
func (t *transfer) start(now time.Time) step {
	t.acked, t.sent, t.tries, t.repaired, t.gap, t.timedAt = 0, 0, 0, false, false, time.Time{}
	t.offering = len(t.answer) > 0
	if t.offering {
		t.timed, t.timedAt = 0, now
		t.sending(now)
		return step{oack: true}
	}
	return t.nextWindow(now)
}

// packet is what the client sent.
func (t *transfer) packet(now time.Time, p []byte) step {
	if text, ok := parseError(p); ok {
		return step{outcome: aborted, err: fmt.Errorf("the client broke it off: %q", text)}
	}
	ack, ok := parseAck(p)
	if !ok {
		return step{}
	}
	if t.offering {
		if ack != 0 {
			return step{}
		}
		t.offering = false
		t.progress(now)
		return t.nextWindow(now)
	}
	// The number on the wire is 16 bits of ours; a window is far smaller
	// than that, so the difference is exact.
	ahead := uint64(ack - uint16(t.acked))
	switch {
	case ahead > t.sent-t.acked:
		return step{} // old, or of what was never sent
	case ahead == 0:
		return t.repeated(now)
	}
	t.acked += ahead
	t.progress(now)
	if t.acked == t.blocks {
		return step{outcome: finished}
	}
	do := t.nextWindow(now)
	// In the middle of the window it means that the client misses what comes
	// next, and that the next window begins there (RFC 7440 section 4). But
	// many acknowledge so a block that came twice, too, and then have all
	// of the window. So the window moves on, and what was sent before is
	// sent again when no other ACK comes in the time that one takes: who
	// does it at once sends everything several times on such a network.
	if t.gap = do.from > t.acked+1 || do.from == 0; t.gap {
		t.due = now.Add(max(t.rtt*5/4, minPause))
	}
	return do
}

// repeated is an ACK of nothing new. In lock-step it is never answered, since
// otherwise one packet that the network doubles makes each later one go
// twice (the sorcerer's apprentice, RFC 1123 section 4.2.3.1). With windows
// it is also how a client says that it misses the first block. It is
// believed once for each window, and only when it comes later than a
// packet that was merely doubled would.
func (t *transfer) repeated(now time.Time) step {
	if t.window == 1 || t.repaired || t.rtt == 0 || now.Sub(t.sentAt) < t.rtt/2 {
		return step{}
	}
	t.repaired = true
	return t.resend(now)
}

// expire is the passing of the due time.
func (t *transfer) expire(now time.Time) step {
	if now.Before(t.due) {
		return step{}
	}
	if t.gap {
		t.gap, t.repaired = false, true
		return t.resend(now)
	}
	if t.tries == maxTries {
		return step{outcome: silent, err: t.silence()}
	}
	t.tries++
	return t.resend(now)
}

// silence says what the client did not answer, and what is often behind it.
func (t *transfer) silence() error {
	switch {
	case !t.started() && t.block > defaultBlock && !t.offering:
		return fmt.Errorf("the client never acknowledged a block of %d bytes: does the network carry packets of that size?", t.block)
	case !t.started():
		return errors.New("the client never answered: did a firewall drop the reply, or was it switched off?")
	case t.acked == 0:
		return fmt.Errorf("the client agreed to blocks of %d bytes, %d at a time, and acknowledged none: does the network carry packets of that size?", t.block, t.window)
	}
	return fmt.Errorf("the client fell silent after %d of %d blocks", t.acked, t.blocks)
}

// again is the same request once more. Before the client has acknowledged
// anything, the reply was lost or slow: it is repeated at once. Later it is
// either a late duplicate, which is nothing to act on while the transfer
// moves, or a machine that was switched off and on and begins anew.
func (t *transfer) again(now time.Time) step {
	switch {
	case !t.started():
		return t.resend(now)
	case now.Sub(t.heard) < t.timeout:
		return step{}
	}
	return t.start(now)
}

// gone is the network's word that nobody listens at the client's port.
func (t *transfer) gone() step {
	if t.started() && t.sent == t.blocks {
		// It has closed its socket after the last block: its ACK was lost.
		return step{outcome: finished}
	}
	return step{outcome: aborted, err: errors.New("the client closed its port")}
}

// progress notes an acknowledgement of something new.
func (t *transfer) progress(now time.Time) {
	if !t.timedAt.IsZero() && t.acked >= t.timed {
		t.rtt, t.timedAt = max(now.Sub(t.timedAt), 1), time.Time{}
	}
	t.heard, t.tries, t.repaired, t.gap = now, 0, false, false
}

// nextWindow is what of the window after the acknowledged blocks was not sent yet.
func (t *transfer) nextWindow(now time.Time) (do step) {
	from := t.sent + 1
	t.sent = min(t.acked+uint64(t.window), t.blocks)
	if from <= t.sent {
		do.from, do.to = from, t.sent
		if t.timedAt.IsZero() {
			t.timed, t.timedAt = t.sent, now
		}
	}
	t.sending(now)
	return do
}

// resend repeats what is not acknowledged.
func (t *transfer) resend(now time.Time) step {
	t.sending(now)
	t.timedAt = time.Time{} // what was sent twice tells no time (Karn's rule)
	if t.offering {
		t.resent++
		return step{oack: true}
	}
	t.resent += t.sent - t.acked
	return step{from: t.acked + 1, to: t.sent}
}

// sending notes that packets go out, and sets the time by which something has
// to come back.
func (t *transfer) sending(now time.Time) {
	wait := t.timeout << t.tries
	if t.timeout < maxWait {
		wait = min(wait, maxWait)
	}
	t.sentAt, t.due = now, now.Add(wait)
}
