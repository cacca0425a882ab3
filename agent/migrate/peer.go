package migrate

import (
	"context"

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
	// Version is what moves jobs at the source; a destination of another
	// version refuses in Prepare.
	Version string
	// Reason is why a move was called off.
	Reason string
}

// Peer is a node as a home sees it: itself (Node) or another (Client).
type Peer interface {
	// Prepare makes an empty capsule for the copy.
	Prepare(context.Context, Order) error
	// Freeze dumps the copy to Order.To. After an error the job runs on, or will
	// when the node has asked its home.
	Freeze(context.Context, Order) error
	// Restore makes the copy out of what Freeze has sent.
	Restore(context.Context, Order) error
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
	// Ended tells the end of the copy that owns the job.
	Ended(ctx context.Context, home api.NodeID, job JobID, c Placement, end End) error
	// Ask asks what is to become of a frozen copy.
	Ask(ctx context.Context, home api.NodeID, job JobID, c Placement) (Verdict, uint64, error)
}
