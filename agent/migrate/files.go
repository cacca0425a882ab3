package migrate

import (
	"context"

	"mosimg/agent/capsule/control"
	"mosimg/internal/api"
)

// Roots gives the trees that copies see on this node: at their home its own,
// elsewhere the home files. A tree outlives the agent that opened it; the
// next one names it by the same words.
type Roots interface {
	// Open makes the tree for a copy of a job, or finds the one that is there.
	Open(ctx context.Context, home api.NodeID, job JobID, epoch uint64) (control.Root, error)
	// Sync returns when all that a frozen copy has written into its tree is with
	// the home.
	Sync(ctx context.Context, home api.NodeID, job JobID, epoch uint64) error
	// Close lets a tree go, after its copy is gone; there need be none.
	Close(ctx context.Context, home api.NodeID, job JobID, epoch uint64) error
}

// Files is the home's file server: who may read and write a job's files. Every
// call may be made again, with the same outcome. About a job that the server
// does not know, because it was started anew after the Prepare, Sync and Commit
// fail with fault.NotFound: what its guests had open is gone. The others are then
// no errors: there is nothing to change.
type Files interface {
	// Prepare admits next beside owner, for a restore.
	Prepare(ctx context.Context, job JobID, owner, next Placement) error
	// Sync returns when all requests of the owner that have reached the home are done.
	Sync(ctx context.Context, job JobID) error
	// Locks are the files, in words, that the job holds locks on through the server.
	Locks(ctx context.Context, job JobID) ([]string, error)
	// Commit makes next, which was prepared, the owner and holds up the old one,
	// which keeps its open files until Settle or Reclaim. Locks go over to
	// the new owner; pids maps processes from their numbers at the old node to those at the new one.
	Commit(ctx context.Context, job JobID, next Placement, pids map[uint32]uint32) error
	// Reclaim makes the old owner that Commit held up the owner again, in the epoch
	// of now, and ends the one that never ran.
	Reclaim(ctx context.Context, job JobID, now Placement) error
	// Settle ends the old owner: its open files are closed.
	Settle(ctx context.Context, job JobID) error
	// Abort drops what Prepare admitted.
	Abort(ctx context.Context, job JobID, next Placement) error
	// Remove ends all service to a job.
	Remove(ctx context.Context, job JobID) error
}

// noFiles serves nobody: all trees are the same.
type noFiles struct{}

func (noFiles) Prepare(context.Context, JobID, Placement, Placement) error { return nil }
func (noFiles) Sync(context.Context, JobID) error                          { return nil }
func (noFiles) Locks(context.Context, JobID) ([]string, error)             { return nil, nil }
func (noFiles) Commit(context.Context, JobID, Placement, map[uint32]uint32) error {
	return nil
}
func (noFiles) Reclaim(context.Context, JobID, Placement) error { return nil }
func (noFiles) Settle(context.Context, JobID) error             { return nil }
func (noFiles) Abort(context.Context, JobID, Placement) error   { return nil }
func (noFiles) Remove(context.Context, JobID) error             { return nil }
