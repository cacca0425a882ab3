package forward

import (
	"io"
	"sync"

	"mosimg/agent/homefiles/link"
)

// queue is messages for the kernel, in order and without a bound: its filler
// must never wait.
type queue struct {
	mu     sync.Mutex
	more   sync.Cond
	list   []*link.Buf // guarded by mu
	closed bool        // guarded by mu
}

func newQueue() *queue {
	q := &queue{}
	q.more.L = &q.mu
	return q
}

func (q *queue) put(b *link.Buf) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.list = append(q.list, b)
	q.more.Signal()
}

// next waits for a message; io.EOF after close.
func (q *queue) next() (*link.Buf, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for len(q.list) == 0 && !q.closed {
		q.more.Wait()
	}
	if q.closed {
		return nil, io.EOF
	}
	b := q.list[0]
	q.list = q.list[1:]
	return b, nil
}

func (q *queue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.more.Broadcast()
}
