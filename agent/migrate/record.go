// Package migrate moves jobs between nodes so that none is lost or doubled,
// whatever dies on the way.
//
// The home of a job decides, alone, and what it has decided is a Record in its
// journal: who owns the job, in which epoch. The epoch is raised at each
// committed move and never used twice. A move is seven steps:
//
//	1 PREPARE  home -> dst   an empty capsule for epoch e+1
//	2 PRECOPY                rounds of dirty pages; not yet
//	3 FREEZE   home -> src   dump; frozen at post-dump; pages and images go to dst
//	4 RESTORE  home -> dst   restored, frozen, has run no instruction
//	5 COMMIT   home          Record.Commit in the journal: the one decision point
//	6 RESUME   home -> dst   runs
//	7 KILL     home -> src   the frozen copy
//
// What fails before 5 aborts: dst kills its copy, src runs on, the reason is
// kept. What fails after 5 is repeated until it is done. A node that does not know
// whether its frozen copy is to run asks the home (Record.Verdict), and leaves it frozen until it is
// answered. So at most one copy that is not frozen has the current epoch, and
// a source is killed only after the destination has said that it runs.
//
// Home is the coordinator, Node what a node does when told; both are Peers to
// each other through Client and Serve over any connection, whose security is the
// caller's.
package migrate

import (
	"fmt"
	"time"

	"mosimg/agent/capsule/control"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// JobID names a job in the cluster.
type JobID string

// check refuses what cannot be the name of a folder and of a control group.
func (j JobID) check() error {
	ok := len(j) > 0 && len(j) <= 64
	for _, c := range j {
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-')
	}
	if !ok {
		return fault.New(fault.Usage, "name", fmt.Sprintf("job %q", string(j)), "not 1 to 64 small letters, digits and dashes", "")
	}
	return nil
}

// Placement is a copy of a job: where, and of which epoch.
type Placement struct {
	Node  api.NodeID
	Epoch uint64
}

// Record is all that the home knows for certain about a job's whereabouts. Its
// methods are the only ways to change it; each returns the new Record, to be
// journalled before anybody acts on it.
type Record struct {
	Job JobID
	// Owner is whom it runs as.
	Owner control.Owner
	// At owns the job.
	At Placement
	// Running: At has said that it runs in this epoch.
	Running bool
	// Since is when the job came to At, Started when it began; set by Home.
	Since   time.Time
	Started time.Time
	// Pids maps the processes from their numbers at Prev to those at At, for their
	// locks; set for a move and kept until it is settled.
	Pids map[uint32]uint32 `json:",omitempty"`
	// Downtime is how long the job stood still in its last move.
	Downtime time.Duration `json:",omitempty"`
	// Next is a move that is under way and not decided.
	Next *Placement `json:",omitempty"`
	// Prev is a copy that is to be killed once At runs: the frozen source of the
	// move, which takes the job back if At turns out never to have run; or then what is left of
	// that one.
	Prev *Placement `json:",omitempty"`
	// Thaws is the epoch of the frozen copy at At.Node that became At when the
	// job was taken back; 0 otherwise.
	Thaws uint64 `json:",omitempty"`
	// Last is the highest epoch ever given out.
	Last uint64
	// Moves counts the committed moves.
	Moves int
	// Reason is why the last move was called off; "" after a good one.
	Reason string `json:",omitempty"`
	// End is how the job ended; nil while it has not.
	End *End `json:",omitempty"`
}

// End is how a job ended.
type End struct {
	Exit   int    // of the program, if it ended by itself
	Signal int    // that killed it
	Lost   string // or why the job is lost: its node or shim died
}

// NewRecord is a job that is about to be started on a node. Epoch 1 is always
// the home's own: a job that starts elsewhere starts in epoch 2, as if it had moved.
func NewRecord(job JobID, home, node api.NodeID) Record {
	r := Record{Job: job, At: Placement{node, 1}, Last: 1}
	if node != home {
		r.At.Epoch, r.Last = 2, 2
	}
	return r
}

func (r Record) refuse(op, cause, hint string) error {
	return fault.New(fault.Refused, op, "job "+string(r.Job), cause, hint)
}

// over refuses what cannot be done with a job that has ended.
func (r Record) over(op string) error {
	return fault.New(fault.NotFound, op, "job "+string(r.Job), "it has ended", "")
}

// Reserve begins a move: an epoch is set aside.
func (r Record) Reserve(to api.NodeID) (Record, error) {
	switch {
	case r.End != nil:
		return r, r.over("move")
	case r.Next != nil:
		return r, r.refuse("move", fmt.Sprintf("it is being moved to node %d", r.Next.Node), "try again when it is there")
	case r.Prev != nil || !r.Running:
		return r, r.refuse("move", fmt.Sprintf("its last move, to node %d, is not finished", r.At.Node), "try again in a moment")
	case r.At.Node == to:
		return r, r.refuse("move", fmt.Sprintf("it is on node %d already", to), "")
	}
	r.Last++
	r.Next = &Placement{to, r.Last}
	return r, nil
}

// Commit decides for the move.
func (r Record) Commit() (Record, error) {
	if r.End != nil {
		return r, r.over("commit the move of")
	}
	if r.Next == nil {
		return r, r.refuse("commit the move of", "there is none", "")
	}
	prev := r.At
	r.At, r.Prev, r.Next = *r.Next, &prev, nil
	r.Running, r.Thaws, r.Reason = false, 0, ""
	r.Moves++
	return r, nil
}

// Abort decides against the move.
func (r Record) Abort(reason string) Record {
	r.Next, r.Reason = nil, reason
	return r
}

// Confirm notes that At runs.
func (r Record) Confirm() Record {
	r.Running, r.Thaws = true, 0
	return r
}

// Reclaim takes the job back to where it came from, in a new epoch: At has
// said that it has no copy, and as it never said that it runs, nothing the job
// does can have been seen.
func (r Record) Reclaim(reason string) (Record, error) {
	if r.Running || r.Prev == nil || r.Thaws != 0 {
		return r, r.refuse("take back", "no frozen copy of it is left", "")
	}
	r.Last++
	dead := r.At
	r.At, r.Thaws, r.Prev = Placement{r.Prev.Node, r.Last}, r.Prev.Epoch, &dead
	r.Moves--
	r.Reason = reason
	return r, nil
}

// Settle notes that the frozen copy is gone.
func (r Record) Settle() Record {
	r.Prev, r.Pids = nil, nil
	return r
}

// Finish notes the end of the job.
func (r Record) Finish(end End) Record {
	r.Next, r.End = nil, &end
	return r
}

// Verdict is what is to become of a frozen copy.
type Verdict string

const (
	Run     Verdict = "run"
	Discard Verdict = "discard"
	Wait    Verdict = "wait" // not decided yet
)

// Verdict judges a frozen copy. The epoch is the one in which the copy runs
// on, if it does.
func (r Record) Verdict(c Placement) (Verdict, uint64) {
	switch {
	case r.End != nil:
		return Discard, 0
	case c == r.At && r.Next != nil:
		return Wait, 0
	case c == r.At:
		return Run, c.Epoch
	case r.Next != nil && c == *r.Next:
		return Wait, 0
	case r.Prev != nil && c == *r.Prev && !r.Running && r.Thaws == 0:
		return Wait, 0 // it may be needed again
	case c.Node == r.At.Node && r.Thaws != 0 && c.Epoch == r.Thaws:
		return Run, r.At.Epoch
	}
	return Discard, 0
}

// Task is what the home has to do next about a job.
type Task string

const (
	Nothing  Task = ""
	CallOff  Task = "call off" // a move of which the coordinator has died
	ResumeAt Task = "resume"   // At
	KillPrev Task = "kill"     // Prev
)

// Todo is what a record asks to be done, beside a move that somebody is
// carrying out. It is what makes a restarted home finish what it had begun.
func (r Record) Todo() Task {
	switch {
	case r.End != nil && r.Prev != nil:
		return KillPrev
	case r.End != nil:
		return Nothing
	case r.Next != nil:
		return CallOff
	case !r.Running:
		return ResumeAt
	case r.Prev != nil:
		return KillPrev
	}
	return Nothing
}
