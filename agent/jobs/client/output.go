package client

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"mosimg/agent/jobs/wire"
)

// outputKeep is how much of a stream waits for a slow reader of ours before
// the connection waits too. The capsule keeps one MiB and what is in the job's pipe,
// so one slow stream never holds up the other.
const outputKeep = 4 << 20

// output is one stream on its way from the job to one of our descriptors.
// Bytes come with their offset, may come again after a reconnection, and are
// acknowledged when the descriptor has taken them.
type output struct {
	kind wire.Kind
	fd   int
	told func() // there is something to acknowledge

	mu       sync.Mutex // guards the following
	cond     sync.Cond  // signalled when any of it changes
	queue    []byte     // bytes [written, written+len(queue)), but for those of a write under way
	received uint64     // written + len(queue), once no write is under way
	written  uint64
	acked    uint64 // what the agent knows of written
	err      error  // why the descriptor takes nothing any more
	errTold  bool   // the agent knows
	stopped  bool
}

func newOutput(kind wire.Kind, fd int, told func()) *output {
	o := &output{kind: kind, fd: fd, told: told}
	o.cond.L = &o.mu
	return o
}

// receive takes a piece of the stream. It waits while too much waits to be
// written.
func (o *output) receive(offset uint64, data []byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if offset > o.received {
		return fmt.Errorf("the agent leaves out bytes %d to %d of an output stream", o.received, offset)
	}
	have := o.received - offset // of data
	if uint64(len(data)) <= have {
		return nil // all of it came before
	}
	data = data[have:]
	o.received += uint64(len(data))
	if o.err != nil {
		o.written = o.received // dropped
		o.told()
		return nil
	}
	o.queue = append(o.queue, data...)
	o.cond.Broadcast()
	for len(o.queue) > outputKeep && o.err == nil && !o.stopped {
		o.cond.Wait()
	}
	return nil
}

// run writes until stop.
func (o *output) run() {
	for {
		o.mu.Lock()
		for len(o.queue) == 0 && !o.stopped {
			o.cond.Wait()
		}
		if o.stopped {
			o.mu.Unlock()
			return
		}
		data := o.queue
		o.queue = nil
		o.mu.Unlock()
		o.write(data)
	}
}

// write writes all of data, or notes why that cannot be.
func (o *output) write(data []byte) {
	for len(data) > 0 {
		n, err := unix.Write(o.fd, data[:min(len(data), wire.MaxData)])
		switch err {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			// Somebody who shares the descriptor made it non-blocking.
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(o.fd), Events: unix.POLLOUT}}, -1)
			continue
		}
		o.mu.Lock()
		if err != nil {
			o.err = err
			o.queue = nil
			o.written = o.received
			data = nil
		} else {
			o.written += uint64(n)
			data = data[n:]
		}
		o.cond.Broadcast()
		o.mu.Unlock()
		o.told()
	}
}

// attach begins anew with an agent that is told of everything written so far.
func (o *output) attach() (written uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.acked, o.errTold = o.written, false
	return o.written
}

// ack is the next thing to tell the agent, if there is one.
func (o *output) ack() (offset uint64, due bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case o.err != nil && !o.errTold:
		o.errTold = true
		return wire.Closed, true
	case o.written > o.acked:
		o.acked = o.written
		return o.written, true
	}
	return 0, false
}

// drain waits until all that was received is written, and returns why not
// all of it could be.
func (o *output) drain() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.written < o.received && !o.stopped {
		o.cond.Wait()
	}
	return o.err
}

func (o *output) stop() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stopped = true
	o.cond.Broadcast()
}
