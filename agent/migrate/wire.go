package migrate

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"time"

	"mosimg/agent/capsule/control"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// Between two agents, on a connection of its own for each request (the caller
// makes it, and knows by TLS who is at the other end):
//
//	u32 length (big-endian), JSON message   ->
//	                                        <- u32 length, JSON reply
//
// After a message with op "pages" the connection carries a page stream
// instead (package pages). The end of the connection calls off the order
// under way. An unknown op is refused.
type message struct {
	Op    op
	Order Order
	Copy  *Placement `json:",omitempty"` // of ops ask and ended
	End   *End       `json:",omitempty"` // of op ended
}

type reply struct {
	Error   *control.Error `json:",omitempty"`
	Verdict Verdict        `json:",omitempty"`
	Epoch   uint64         `json:",omitempty"`
}

type op string

const (
	opPrepare op = "prepare"
	opFreeze  op = "freeze"
	opRestore op = "restore"
	opResume  op = "resume"
	opThaw    op = "thaw"
	opDiscard op = "discard"
	opPages   op = "pages"
	opAsk     op = "ask"
	opEnded   op = "ended"
)

// maxMessage bounds a message; they have some hundred bytes.
const maxMessage = 64 << 10

func writeMessage(w io.Writer, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...))
	return err
}

func readMessage(r io.Reader, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxMessage {
		return fmt.Errorf("message of %d bytes; %d is the most", n, maxMessage)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return err
	}
	return json.Unmarshal(body, v)
}

// Client is another node, over connections that Dial makes: a Peer, and a
// Judge if Dial reaches the home that is asked.
type Client struct {
	Dial func(ctx context.Context, node api.NodeID) (net.Conn, error)
	Node api.NodeID // of a Peer
}

func (c Client) call(ctx context.Context, node api.NodeID, m message) (reply, error) {
	conn, err := c.Dial(ctx, node)
	if err != nil {
		return reply{}, fault.New(fault.Unavailable, "connect to", fmt.Sprintf("node %d", node), err, "")
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var r reply
	err = writeMessage(conn, m)
	if err == nil {
		err = readMessage(conn, &r)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return r, fault.New(fault.Unavailable, string(m.Op), fmt.Sprintf("job %s on node %d", m.Order.Job, node), err, "")
	}
	return r, r.Error.Err()
}

func (c Client) order(ctx context.Context, what op, o Order) error {
	_, err := c.call(ctx, c.Node, message{Op: what, Order: o})
	return err
}

// Prepare implements Peer.
func (c Client) Prepare(ctx context.Context, o Order) error { return c.order(ctx, opPrepare, o) }

// Freeze implements Peer.
func (c Client) Freeze(ctx context.Context, o Order) error { return c.order(ctx, opFreeze, o) }

// Restore implements Peer.
func (c Client) Restore(ctx context.Context, o Order) error { return c.order(ctx, opRestore, o) }

// Resume implements Peer.
func (c Client) Resume(ctx context.Context, o Order) error { return c.order(ctx, opResume, o) }

// Thaw implements Peer.
func (c Client) Thaw(ctx context.Context, o Order) error { return c.order(ctx, opThaw, o) }

// Discard implements Peer.
func (c Client) Discard(ctx context.Context, o Order) error { return c.order(ctx, opDiscard, o) }

// Ask implements Judge.
func (c Client) Ask(ctx context.Context, home api.NodeID, job JobID, p Placement) (Verdict, uint64, error) {
	r, err := c.call(ctx, home, message{Op: opAsk, Order: Order{Job: job, Home: home}, Copy: &p})
	return r.Verdict, r.Epoch, err
}

// Ended implements Judge.
func (c Client) Ended(ctx context.Context, home api.NodeID, job JobID, p Placement, end End) error {
	_, err := c.call(ctx, home, message{Op: opEnded, Order: Order{Job: job, Home: home}, Copy: &p, End: &end})
	return err
}

// Server answers other agents for this one's node and home.
type Server struct {
	Node *Node
	Home *Home
	Log  *slog.Logger
}

// Serve serves one connection from node from, and closes it. A node orders
// only about jobs whose home it is, and asks only about its own copies.
func (s Server) Serve(ctx context.Context, conn net.Conn, from api.NodeID) {
	defer conn.Close()
	var m message
	if err := readMessage(conn, &m); err != nil {
		s.Log.Warn("migration request", "from", from, "err", err)
		return
	}
	if m.Op == opPages {
		if err := s.Node.take(ctx, conn, m.Order, from); err != nil {
			s.Log.Warn("pages", "from", from, "job", m.Order.Job, "err", err)
		}
		return
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { // nothing more is sent: what comes is the end
		_, err := conn.Read(make([]byte, 1))
		cancel(fmt.Errorf("the other side hung up: %w", err))
	}()
	r := s.do(ctx, m, from)
	err := writeMessage(conn, r)
	if err != nil && m.Op == opFreeze && r.Error == nil {
		// The home may or may not count on this copy being frozen.
		s.Node.Settle(context.WithoutCancel(ctx))
	}
}

func (s Server) do(ctx context.Context, m message, from api.NodeID) reply {
	if m.Op == opAsk || m.Op == opEnded {
		return s.tell(ctx, m, from)
	}
	if m.Order.Home != from {
		return reply{Error: control.FromError(fault.New(fault.Refused, string(m.Op), "job "+string(m.Order.Job), fmt.Sprintf("node %d is not its home", from), ""))}
	}
	var f func(context.Context, Order) error
	switch m.Op {
	case opPrepare:
		f = s.Node.Prepare
	case opFreeze:
		f = s.Node.Freeze
	case opRestore:
		f = s.Node.Restore
	case opResume:
		f = s.Node.Resume
	case opThaw:
		f = s.Node.Thaw
	case opDiscard:
		f = s.Node.Discard
	default:
		return reply{Error: control.FromError(fault.New(fault.Usage, "serve", string(m.Op), errors.New("unknown request"), "run the same mosimg on both nodes"))}
	}
	return reply{Error: control.FromError(f(ctx, m.Order))}
}

// tell answers a node that asks or tells about its copy.
func (s Server) tell(ctx context.Context, m message, from api.NodeID) reply {
	if m.Copy == nil || m.Copy.Node != from || m.Op == opEnded && m.End == nil {
		return reply{Error: control.FromError(fault.New(fault.Usage, string(m.Op), "job "+string(m.Order.Job), "it is not the asker's copy", ""))}
	}
	if m.Op == opEnded {
		return reply{Error: control.FromError(s.Home.Ended(ctx, m.Order.Home, m.Order.Job, *m.Copy, *m.End))}
	}
	v, epoch, err := s.Home.Ask(ctx, m.Order.Home, m.Order.Job, *m.Copy)
	return reply{Error: control.FromError(err), Verdict: v, Epoch: epoch}
}
