package migrate

import (
	"context"

	"mosimg/agent/capsule/control"
	"mosimg/internal/api"
)

// Order is what a home tells a node about one of its jobs. Every order may
// be given again: the second time it changes nothing.
type Order struct {
	Job  JobID
	Home api.NodeID
	// Epoch names the copy that is meant.
	Epoch uint64
	// To is the destination of a Freeze.
	To Placement
	// Source is who will send the pages after a Prepare.
	Source api.NodeID
	// From is the epoch of the frozen copy that a Resume makes Epoch, when a job is taken back; else 0.
	From uint64
	// Owner is whom a job that comes runs as, for a Prepare.
	Owner control.Owner
	// Machine is the source's, and Bytes the job's size there, for a Prepare.
	Machine Machine
	Bytes   int64
	// Reason is why a move was called off; of a Resume, why a copy that has not
	// begun to run must not any more.
	Reason string
	// Locked and Moves are what the job's home knows of it, for a Start or Prepare:
	// the node that it comes to decides when it goes on.
	Locked bool `json:",omitempty"`
	Moves  int  `json:",omitempty"`
	// Bid is what the job's present node has reckoned, if it comes because of that.
	Bid Bid `json:",omitzero"`
}

// Bid is what a node's balancer tells with a job that it sends: see balance.Move.
// The zero value is that of a move that somebody wants.
type Bid struct {
	Load, Limit float64
}

// Pids maps the processes of a copy from their numbers in the capsule, which are
// the same everywhere, to those at its node.
type Pids map[uint32]uint32

// Facts are what a home wants to know of a copy before it moves it.
type Facts struct {
	Machine Machine
	Use     control.Use
}

// Peer is a node as a home sees it: itself (Node) or another (Client).
type Peer interface {
	// Start starts a job. The error wraps the errno when the program cannot be run.
	Start(context.Context, Order, control.Spec) error
	// Inspect looks at a copy that runs; fault.NotFound is one that has ended.
	Inspect(context.Context, Order) (Facts, error)
	// Prepare makes an empty capsule for the copy, or says why the job cannot be here.
	Prepare(context.Context, Order) error
	// Freeze dumps the copy to Order.To. After an error the job runs on, or will
	// when the node has asked its home.
	Freeze(context.Context, Order) (Pids, error)
	// Restore makes the copy out of what Freeze has sent.
	Restore(context.Context, Order) (Pids, error)
	// Resume lets the copy run. An error of kind fault.NotFound says that the
	// copy is gone and for certain never ran; one of kind fault.Refused that the
	// node knows nothing of it, having been restarted perhaps, and that it may have run.
	Resume(context.Context, Order) error
	// Thaw lets a frozen source run on after a move was called off.
	Thaw(context.Context, Order) error
	// Discard kills the copy; there need be none.
	Discard(context.Context, Order) error
}

// Judge is a home as its nodes see it: Home for its own node, Client for others.
type Judge interface {
	// Unlocked tells, by an error of kind fault.Refused, that the copy holds locks on
	// home files: while it does, the job cannot move home.
	Unlocked(ctx context.Context, home api.NodeID, job JobID, c Placement) error
	// Ended tells the end of the copy that owns the job.
	Ended(ctx context.Context, home api.NodeID, job JobID, c Placement, end End) error
	// Ask asks what is to become of a copy. A home that answers has not lost
	// touch with it, so it renews the lease of a copy that runs.
	Ask(ctx context.Context, home api.NodeID, job JobID, c Placement) (Verdict, uint64, error)
}
