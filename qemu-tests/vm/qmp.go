package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
)

// qmp speaks QEMU's control protocol (docs/interop/qmp-spec): one JSON value
// a line, replies carry the id of their command, events come in between.
type qmp struct {
	conn net.Conn
	done chan struct{} // closed when the connection ended

	mu     sync.Mutex // guards the following
	nextID int
	waits  map[int]chan qmpReply
}

type qmpReply struct {
	ID     *int            `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

type qmpCommand struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        int    `json:"id"`
}

var errQMPClosed = errors.New("the machine is off")

// newQMP begins a conversation on a fresh connection from QEMU.
func newQMP(ctx context.Context, conn net.Conn) (*qmp, error) {
	q := &qmp{conn: conn, done: make(chan struct{}), waits: make(map[int]chan qmpReply)}
	go q.read()
	// The greeting has no id and is dropped like an event; QEMU takes
	// commands without anyone having read it.
	if _, err := q.execute(ctx, "qmp_capabilities", nil); err != nil {
		q.close()
		return nil, err
	}
	return q, nil
}

func (q *qmp) close() {
	q.conn.Close()
	<-q.done
}

func (q *qmp) read() {
	defer close(q.done)
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var r qmpReply
		if json.Unmarshal(lines.Bytes(), &r) != nil || r.ID == nil {
			continue
		}
		q.mu.Lock()
		if ch := q.waits[*r.ID]; ch != nil {
			delete(q.waits, *r.ID)
			ch <- r
		}
		q.mu.Unlock()
	}
}

// execute runs one command and returns its result.
func (q *qmp) execute(ctx context.Context, command string, args any) (json.RawMessage, error) {
	ch := make(chan qmpReply, 1)
	q.mu.Lock()
	q.nextID++
	id := q.nextID
	q.waits[id] = ch
	b, err := json.Marshal(qmpCommand{command, args, id})
	if err == nil {
		_, err = q.conn.Write(append(b, '\n'))
	}
	q.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", command, errors.Join(errQMPClosed, err))
	}
	select {
	case r := <-ch:
		if r.Error != nil {
			return nil, fmt.Errorf("%s: %s: %s", command, r.Error.Class, r.Error.Desc)
		}
		return r.Return, nil
	case <-q.done:
		return nil, fmt.Errorf("%s: %w", command, errQMPClosed)
	case <-ctx.Done():
		q.mu.Lock()
		delete(q.waits, id)
		q.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", command, context.Cause(ctx))
	}
}
