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

	"mosimg/agent/capsule"
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
// instead (package pages), after one with op "capsule" a conversation with
// the copy's shim (capsule.Bridge). The end of the connection calls off the order
// under way. An unknown op is refused.
type message struct {
	Op    op
	Order Order
	Copy  *Placement    `json:",omitempty"` // of ops ask and ended
	End   *End          `json:",omitempty"` // of op ended
	Spec  *control.Spec `json:",omitempty"` // of op start
	Move  *Proposal     `json:",omitempty"` // of op propose
}

// Proposal is a node's wish to be rid of a job, which its home may refuse.
type Proposal struct {
	To  api.NodeID
	Bid Bid
	// Must says that the node is leaving: locked jobs go too.
	Must   bool
	Reason string
}

type reply struct {
	Error   *control.Error `json:",omitempty"`
	Verdict Verdict        `json:",omitempty"`
	Epoch   uint64         `json:",omitempty"`
	Pids    Pids           `json:",omitempty"`
	Facts   *Facts         `json:",omitempty"`
	// Why tells of a home's jobs why they stay where they are.
	Why map[JobID]string `json:",omitempty"`
}

type op string

const (
	opStart    op = "start"
	opInspect  op = "inspect"
	opPrepare  op = "prepare"
	opFreeze   op = "freeze"
	opRestore  op = "restore"
	opResume   op = "resume"
	opThaw     op = "thaw"
	opDiscard  op = "discard"
	opPages    op = "pages"
	opCapsule  op = "capsule"
	opAsk      op = "ask"
	opUnlocked op = "unlocked"
	opEnded    op = "ended"
	opPropose  op = "propose"
	opWhy      op = "why"
)

// maxMessage bounds a message. Most have some hundred bytes; the largest is a
// program with its arguments and environment, of which the kernel takes 2 MiB.
const maxMessage = 8 << 20

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

// ErrNoAnswer is that of a node that was asked and has not answered: it may
// have done what it was asked for.
var ErrNoAnswer = errors.New("no answer")

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
		return r, fault.New(fault.Unavailable, string(m.Op), fmt.Sprintf("job %s on node %d", m.Order.Job, node), fmt.Errorf("%w: %w", ErrNoAnswer, fault.HungUp("the node's agent", err)), "")
	}
	return r, r.Error.Err()
}

func (c Client) order(ctx context.Context, what op, o Order) error {
	_, err := c.call(ctx, c.Node, message{Op: what, Order: o})
	return err
}

// Prepare implements Peer.
func (c Client) Prepare(ctx context.Context, o Order) error { return c.order(ctx, opPrepare, o) }

// Start implements Peer.
func (c Client) Start(ctx context.Context, o Order, spec control.Spec) error {
	_, err := c.call(ctx, c.Node, message{Op: opStart, Order: o, Spec: &spec})
	return err
}

// Inspect implements Peer.
func (c Client) Inspect(ctx context.Context, o Order) (Facts, error) {
	r, err := c.call(ctx, c.Node, message{Op: opInspect, Order: o})
	if err == nil && r.Facts == nil {
		err = fault.New(fault.Unavailable, string(opInspect), "job "+string(o.Job), "an empty answer", "run the same mosimg on both nodes")
	}
	if err != nil {
		return Facts{}, err
	}
	return *r.Facts, nil
}

// Freeze implements Peer.
func (c Client) Freeze(ctx context.Context, o Order) (Pids, error) {
	r, err := c.call(ctx, c.Node, message{Op: opFreeze, Order: o})
	return r.Pids, err
}

// Restore implements Peer.
func (c Client) Restore(ctx context.Context, o Order) (Pids, error) {
	r, err := c.call(ctx, c.Node, message{Op: opRestore, Order: o})
	return r.Pids, err
}

// Capsule is that of a copy on c.Node, for its streams and signals.
func (c Client) Capsule(home api.NodeID, job JobID, epoch uint64) *capsule.Capsule {
	return capsule.Remote(capsuleName(job, epoch), func(ctx context.Context) (net.Conn, error) {
		conn, err := c.Dial(ctx, c.Node)
		if err != nil {
			return nil, fault.New(fault.Unavailable, "connect to", fmt.Sprintf("node %d", c.Node), err, "")
		}
		if err := writeMessage(conn, message{Op: opCapsule, Order: Order{Job: job, Home: home, Epoch: epoch}}); err != nil {
			conn.Close()
			return nil, err
		}
		return conn, nil
	})
}

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

// Unlocked implements Judge.
func (c Client) Unlocked(ctx context.Context, home api.NodeID, job JobID, p Placement) error {
	_, err := c.call(ctx, home, message{Op: opUnlocked, Order: Order{Job: job, Home: home}, Copy: &p})
	return err
}

// Ended implements Judge.
func (c Client) Ended(ctx context.Context, home api.NodeID, job JobID, p Placement, end End) error {
	_, err := c.call(ctx, home, message{Op: opEnded, Order: Order{Job: job, Home: home}, Copy: &p, End: &end})
	return err
}

// Propose asks a job's home to move it away from the copy p, and returns when
// that is done.
func (c Client) Propose(ctx context.Context, home api.NodeID, job JobID, p Placement, move Proposal) error {
	_, err := c.call(ctx, home, message{Op: opPropose, Order: Order{Job: job, Home: home}, Copy: &p, Move: &move})
	return err
}

// Why asks c.Node why the jobs of a home stay there.
func (c Client) Why(ctx context.Context, home api.NodeID) (map[JobID]string, error) {
	r, err := c.call(ctx, c.Node, message{Op: opWhy, Order: Order{Home: home}})
	return r.Why, err
}

// Server answers other agents for this one's node and home.
type Server struct {
	Node *Node
	Home *Home
	// Propose is asked by nodes that want to be rid of one of our jobs; Why is
	// what this node tells a home of its jobs. Either may be nil.
	Propose func(ctx context.Context, job JobID, from Placement, move Proposal) error
	Why     func(home api.NodeID) map[JobID]string
	Log     *slog.Logger
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
	if m.Op == opCapsule {
		if err := s.Node.bridge(ctx, conn, m.Order, from); err != nil {
			s.Log.Debug("capsule of another node's job", "from", from, "job", m.Order.Job, "err", err)
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
	if m.Op == opAsk || m.Op == opEnded || m.Op == opUnlocked || m.Op == opPropose {
		return s.tell(ctx, m, from)
	}
	if m.Order.Home != from {
		return reply{Error: control.FromError(fault.New(fault.Refused, string(m.Op), "job "+string(m.Order.Job), fmt.Sprintf("node %d is not its home", from), ""))}
	}
	var r reply
	var err error
	switch m.Op {
	case opStart:
		if m.Spec == nil {
			err = fault.New(fault.Usage, "start", "job "+string(m.Order.Job), "no program", "")
			break
		}
		err = s.Node.Start(ctx, m.Order, *m.Spec)
	case opInspect:
		var f Facts
		f, err = s.Node.Inspect(ctx, m.Order)
		r.Facts = &f
	case opPrepare:
		err = s.Node.Prepare(ctx, m.Order)
	case opFreeze:
		r.Pids, err = s.Node.Freeze(ctx, m.Order)
	case opRestore:
		r.Pids, err = s.Node.Restore(ctx, m.Order)
	case opResume:
		err = s.Node.Resume(ctx, m.Order)
	case opThaw:
		err = s.Node.Thaw(ctx, m.Order)
	case opDiscard:
		err = s.Node.Discard(ctx, m.Order)
	case opWhy:
		if s.Why != nil {
			r.Why = s.Why(from)
		}
	default:
		err = fault.New(fault.Usage, "serve", string(m.Op), errors.New("unknown request"), "run the same mosimg on both nodes")
	}
	r.Error = control.FromError(err)
	return r
}

// tell answers a node that asks or tells about its copy.
func (s Server) tell(ctx context.Context, m message, from api.NodeID) reply {
	if m.Copy == nil || m.Copy.Node != from || m.Op == opEnded && m.End == nil || m.Op == opPropose && m.Move == nil {
		return reply{Error: control.FromError(fault.New(fault.Usage, string(m.Op), "job "+string(m.Order.Job), "it is not the asker's copy", ""))}
	}
	if m.Op == opPropose {
		if s.Propose == nil {
			return reply{Error: control.FromError(fault.New(fault.Refused, "move", "job "+string(m.Order.Job), "its home moves no jobs for others", ""))}
		}
		// A move that is begun is not called off because its source has hung up: it may have to freeze first.
		return reply{Error: control.FromError(s.Propose(context.WithoutCancel(ctx), m.Order.Job, *m.Copy, *m.Move))}
	}
	if m.Op == opUnlocked {
		return reply{Error: control.FromError(s.Home.Unlocked(ctx, m.Order.Home, m.Order.Job, *m.Copy))}
	}
	if m.Op == opEnded {
		return reply{Error: control.FromError(s.Home.Ended(ctx, m.Order.Home, m.Order.Job, *m.Copy, *m.End))}
	}
	v, epoch, err := s.Home.Ask(ctx, m.Order.Home, m.Order.Job, *m.Copy)
	return reply{Error: control.FromError(err), Verdict: v, Epoch: epoch}
}
