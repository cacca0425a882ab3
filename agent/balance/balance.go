// Package balance decides which job leaves a node, and for where. It is pure:
// what is measured, heard and remembered comes in, one decision goes out, and
// for each job that stays the reason why.
//
// The rules are MOSIX's (Kerrighed's port of its balancer, "values taken from
// MOSIX"; Barak 2001): a node decides alone, about the jobs that run on it,
// from its own load and what it has heard of others; the candidate is the job with
// the second-highest load; it goes if the other node, with 130 % of the job's
// load added, would still be less loaded than this one is now. Loads count
// against CPUs and their speed. A job stays a while where it has come to, old
// news counts as none, and what was just sent somewhere counts there before that node
// has told of it. Before that come a node that is leaving, which sends its
// guests away, and a node that runs out of memory, from which the smallest job that is enough leaves.
//
// With exact loads no pair of decisions moves a job to and fro: if L and R are the
// loads of source and destination and p the job's, it moved because
// cost(R+1.3p) < cost(L), and to come back it would need cost(L-p+1.3p) <
// cost(R+p); but cost(L+0.3p) >= cost(L) > cost(R+1.3p) >= cost(R+p).
// Loads are not exact; the time that a job stays bounds what is left, and grows with its moves.
package balance

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"mosimg/internal/api"
)

// The constants of the policy.
const (
	// StandardSpeed is the speed of the CPU in which costs are told; see load.Speed.
	StandardSpeed = 10000
	// Stability is what of a job's load is added to a node's to which it may
	// go: MOSIX's stab_factor, 130 %.
	Stability = 1.3
	// MinGain is how much better a node must be that has a CPU to spare, where
	// Stability says nothing. Two measurements of a speed differ by less.
	MinGain = 1.1
	// Fresh is how old news may be to be acted upon. Of 60 nodes the mean age is 3.8 s (docs/measurements.md).
	Fresh = 6 * time.Second
	// MinLoad is the load below which a job gains nothing from another CPU.
	MinLoad = 0.25
	// MinCPU is what a job must have used before it is moved: most programs never
	// do, and are over before they have arrived. MOSIX's users saw "a few seconds" too.
	MinCPU = time.Second
	// MinStay is how long a job stays where it has come to after its first
	// move; with each further move it is as much longer, up to MaxStay.
	MinStay = 5 * time.Second
	MaxStay = time.Minute
	// MoveRate is how many bytes a second a move is reckoned to take: those of Fast Ethernet.
	MoveRate = 10 << 20
	// RiseLeft is what of a step up a node's load does not show yet a second
	// after it: load.Decay follows a rise at 5:3.
	RiseLeft = 5.0 / 8
)

// Node is a node as it has told of itself.
type Node struct {
	ID api.NodeID
	// Load is the number of processes that run or want to. Of the node that
	// decides it is that which falls at once and rises slowly, of the others what they tell.
	Load  float64
	CPUs  int
	Speed int // of one CPU; StandardSpeed is the reference, 0 is unknown

	MemTotal, MemFree int64 // bytes
	// MemFull is the share of time, 0 to 1, in which every process here waited
	// for memory (the line "full", avg10, of /proc/pressure/memory); only of the node that decides.
	MemFull float64

	Blocked bool // takes no guests
	Leaving bool // sends its guests away and takes none

	Age time.Duration // of all this
	// Away is why nothing can be sent there, whatever it has told: it is dead, or cannot restore.
	Away string
}

// Job is a job that runs on the node that decides.
type Job struct {
	ID   string
	Home api.NodeID
	// Load is how many processes of it run or want to.
	Load  float64
	CPU   time.Duration // that it has used, everywhere
	Bytes int64         // resident
	Moves int
	Here  time.Duration // since it came to this node or was started

	Locked bool   // its user does not want it moved by itself
	Pinned string // why it cannot be moved as it is now
	// Wait is how long it is left alone because of WaitWhy: its last moves failed.
	Wait    time.Duration
	WaitWhy string
	// Refused are nodes that it cannot go to, with the reason: they or its home have said so.
	Refused map[api.NodeID]string
}

// Sent is a job on its way to a node, or just arrived there.
type Sent struct {
	To    api.NodeID
	Load  float64
	Bytes int64
	Ago   time.Duration // since it was sent
}

// Cluster is all that a decision is made from.
type Cluster struct {
	Self   Node
	Others []Node
	Jobs   []Job
	Sent   []Sent
	// Stay is why no job leaves by itself, LocalStay why none does whose home this is.
	Stay, LocalStay string
	// Seed orders nodes that are equally good, so that not all nodes choose the same.
	Seed uint64
}

// Move is a job that is to go.
type Move struct {
	Job string
	To  api.NodeID
	// Gain is how many times as fast it is expected to run; 0 if that is not why it goes.
	Gain float64
	// Load is the job's.
	Load float64
	// Limit is the cost at the destination above which the move does not pay:
	// see Admit. 0 is none.
	Limit  float64
	Reason string
}

// Decision is what is to be done now.
type Decision struct {
	Move *Move // nil: nothing
	// Why tells of each job that does not go why.
	Why map[string]string
}

// Decide makes one decision: at most one job goes.
func Decide(c Cluster) Decision {
	d := Decision{Why: make(map[string]string, len(c.Jobs))}
	for _, rule := range []func(Cluster, map[string]string) *Move{leave, relieve, level} {
		if d.Move = rule(c, d.Why); d.Move != nil {
			break
		}
	}
	if d.Move != nil {
		for _, j := range c.Jobs {
			if d.Why[j.ID] == "" {
				d.Why[j.ID] = "another job goes first"
			}
		}
		delete(d.Why, d.Move.Job)
	}
	return d
}

// leave sends the guests of a node that is leaving to the best node left, locked
// ones too.
func leave(c Cluster, why map[string]string) *Move {
	if !c.Self.Leaving {
		return nil
	}
	for _, j := range byLoad(c.Jobs) {
		switch reason := stuck(j); {
		case j.Home == c.Self.ID:
			why[j.ID] = "this is its home"
		case reason != "":
			why[j.ID] = reason
		default:
			to, reasons := c.best(j)
			if to == nil {
				why[j.ID] = "this node is leaving, and no other takes it: " + reasons
				continue
			}
			return &Move{Job: j.ID, To: to.ID, Load: j.Load, Reason: "this node is leaving"}
		}
	}
	return nil
}

// level sends the job with the second-highest load, or the first after it that
// can go, to where it runs faster.
func level(c Cluster, why map[string]string) *Move {
	var movable []Job
	for _, j := range byLoad(c.Jobs) {
		if why[j.ID] != "" {
			continue
		}
		if reason := c.settled(j); reason != "" {
			why[j.ID] = reason
			continue
		}
		movable = append(movable, j)
	}
	if len(movable) > 1 {
		movable[0], movable[1] = movable[1], movable[0]
	}
	if c.Self.Speed <= 0 || c.Self.CPUs <= 0 {
		for _, j := range movable {
			why[j.ID] = "the speed of this node is not known yet"
		}
		return nil
	}
	here := cost(c.Self, c.Self.Load)
	for _, j := range movable {
		to, reasons := c.best(j)
		if to == nil {
			why[j.ID] = reasons
			continue
		}
		with := c.expected(*to) + Stability*j.Load
		there := cost(*to, with)
		limit := here
		if with < float64(to.CPUs) { // it would have a CPU of its own: only the speeds differ
			limit = here / MinGain
		}
		if there >= limit {
			why[j.ID] = fmt.Sprintf("no node is better: node %d would be at %.2f, this one is at %.2f", to.ID, there, here)
			continue
		}
		return &Move{
			Job: j.ID, To: to.ID, Gain: here / there, Load: j.Load, Limit: limit,
			Reason: fmt.Sprintf("this node is at %.2f, node %d would be at %.2f", here, to.ID, there),
		}
	}
	return nil
}

// byLoad are jobs with the highest load first.
func byLoad(jobs []Job) []Job {
	jobs = slices.Clone(jobs)
	slices.SortFunc(jobs, func(a, b Job) int {
		return cmp.Or(cmp.Compare(b.Load, a.Load), cmp.Compare(a.ID, b.ID))
	})
	return jobs
}

// stuck is why a job cannot be moved at all now.
func stuck(j Job) string {
	switch {
	case j.Pinned != "":
		return j.Pinned
	case j.Wait > 0:
		return fmt.Sprintf("it is tried again in %s: %s", j.Wait.Round(time.Second), j.WaitWhy)
	}
	return ""
}

// settled is why a job is not moved for its speed; "" if it may be.
func (c Cluster) settled(j Job) string {
	if reason := stuck(j); reason != "" {
		return reason
	}
	stay := stayOf(j)
	switch {
	case j.Locked:
		return "locked"
	case c.kept(j) != "":
		return c.kept(j)
	case j.Load < MinLoad:
		return "it hardly uses a CPU"
	case j.CPU < MinCPU:
		return fmt.Sprintf("it is new: it has used a CPU for %.1fs", j.CPU.Seconds())
	case j.Moves > 0 && j.Here < stay:
		return fmt.Sprintf("it came %s ago and stays for %s", j.Here.Round(time.Second), stay.Round(time.Second))
	}
	return ""
}

// kept is why a job is to stay here; "" if it need not.
func (c Cluster) kept(j Job) string {
	if c.Stay == "" && j.Home == c.Self.ID {
		return c.LocalStay
	}
	return c.Stay
}

// stayOf is how long a job that has come by a move stays: the longer, the more it has
// moved, and for large jobs as long as it takes to be worth the copying.
func stayOf(j Job) time.Duration {
	stay := MaxStay
	if j.Moves < int(MaxStay/MinStay) {
		stay = time.Duration(j.Moves) * MinStay
	}
	return stay + 2*moveTime(j.Bytes)
}

func moveTime(bytes int64) time.Duration {
	return time.Duration(float64(bytes) / MoveRate * float64(time.Second))
}
