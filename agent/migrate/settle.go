package migrate

import "mosimg/agent/capsule/control"

// phase is what a node has journalled about a copy, before it acted on it.
type phase string

const (
	prepared phase = "prepared" // an empty capsule, or one that is being restored into
	restored phase = "restored" // frozen, waits for Resume
	running  phase = "running"  // told to run
	frozen   phase = "frozen"   // dumped, waits for Thaw or Discard
	ended    phase = "ended"    // its end is known and is to be told to the home
	gone     phase = "gone"     // it never ran, and its shim has died
)

// remedy is what a node has to do about a copy that nobody is working on.
type remedy string

const (
	leave     remedy = "leave"     // all is as it should be, or the home is to say
	busy      remedy = "busy"      // the shim is at it, and comes out of it by itself
	tell      remedy = "tell"      // the home how it ended
	ask       remedy = "ask"       // the home
	resume    remedy = "resume"    // a restored copy
	thaw      remedy = "thaw"      // a frozen source
	noteRun   remedy = "note"      // that it runs
	noteEnd   remedy = "end"       // that it has ended
	noteLost  remedy = "lost"      // that it died with its shim
	noteGone  remedy = "gone"      // that it died before it ran
	throwAway remedy = "throwAway" // the copy
)

// noShim is the state of a capsule whose shim does not answer any more.
const noShim control.State = ""

// diagnose compares what was journalled with what the shim says. They
// differ when the agent died between the two.
func diagnose(p phase, st control.State) remedy {
	switch st {
	case noShim:
		switch p {
		case running, frozen:
			return noteLost
		case prepared, restored:
			return noteGone
		case gone:
			return ask
		}
		return tell
	case control.Ended:
		if p == ended {
			return tell
		}
		return noteEnd
	case control.Running:
		if p == frozen {
			return noteRun
		}
		return leave
	case control.Dumping, control.Restoring:
		return busy // its agent hung up
	case control.Dumped:
		return ask
	case control.Restored:
		if p == running {
			return resume
		}
		return ask
	case control.Moved:
		return throwAway
	default: // Empty, Failed
		return ask
	}
}

// treat is what follows from the home's verdict about a copy.
func treat(st control.State, v Verdict) remedy {
	switch {
	case v == Discard:
		return throwAway
	case v == Run && st == control.Dumped:
		return thaw
	case v == Run && st == control.Restored:
		return resume
	case v == Run && st == control.Failed:
		return noteGone
	}
	return leave
}
