package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"mosimg/agent/capsule/control"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// HomeConfig is what a Home needs.
type HomeConfig struct {
	Self    api.NodeID
	Journal *Journal[Record]
	// Peer gives a node to talk to: itself for Self.
	Peer func(api.NodeID) Peer
	// Files serves the files of jobs to their guests; nil if there are no guests elsewhere.
	Files Files
	// Locked, if set, tells whether a job's user does not want it moved by itself.
	Locked func(JobID) bool
	// Changed, if set, is told each new record of a job. It must not call back.
	Changed func(Record)
	// Trace, if set, is told each step when it is about to be taken.
	Trace func(JobID, Step)
	Log   *slog.Logger // nil is silent
}

// Step is one of the steps of a move.
type Step string

const (
	StepPrepare Step = "prepare"
	StepFreeze  Step = "freeze"
	StepRestore Step = "restore"
	StepCommit  Step = "commit"
	StepResume  Step = "resume"
	StepKill    Step = "kill"
	StepDone    Step = "done"
)

// stepTime bounds an order that moves no memory.
const stepTime = 30 * time.Second

// retryFirst and retryMost bound the pause before an order is repeated.
const (
	retryFirst = 20 * time.Millisecond
	retryMost  = 5 * time.Second
)

// Home decides about the jobs that were started on this node.
type Home struct {
	conf HomeConfig
	log  *slog.Logger

	mu   sync.Mutex // guards the following
	jobs map[JobID]*homeJob
	// stopped is since when a job stands still whose move is committed.
	stopped map[JobID]time.Time
}

// homeJob is a job and who is working on it.
type homeJob struct {
	turn sync.Mutex // held by who carries out a move or a task

	mu  sync.Mutex // guards the following
	rec Record
}

// NewHome reads the journal. Drive then finishes what an earlier agent had begun.
func NewHome(conf HomeConfig) (*Home, error) {
	h := &Home{conf: conf, log: conf.Log, jobs: make(map[JobID]*homeJob), stopped: make(map[JobID]time.Time)}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	if conf.Files == nil {
		h.conf.Files = noFiles{}
	}
	all, err := conf.Journal.All()
	if err != nil {
		return nil, fault.New(fault.Environment, "read", "the journal of jobs", err, "")
	}
	for _, rec := range all {
		h.jobs[rec.Job] = &homeJob{rec: rec}
	}
	return h, nil
}

// Start starts a job on a node. After an error there is no such job; that
// error wraps the errno when the program cannot be run.
func (h *Home) Start(ctx context.Context, job JobID, node api.NodeID, spec control.Spec) error {
	j := &homeJob{rec: NewRecord(job, h.conf.Self, node)}
	j.rec.Started = time.Now()
	j.rec.Since = j.rec.Started
	j.rec.Owner = spec.Owner()
	// Nobody else may work on the job before it is known whether there is one.
	j.turn.Lock()
	defer j.turn.Unlock()
	h.mu.Lock()
	if h.jobs[job] != nil {
		h.mu.Unlock()
		return fault.New(fault.Refused, "start", "job "+string(job), "there is one of this name", "")
	}
	h.jobs[job] = j
	h.mu.Unlock()
	// Journalled first: a restarted agent asks the node whether it runs.
	err := h.conf.Journal.Put(string(job), j.rec)
	order := Order{Job: job, Home: h.conf.Self, Epoch: j.rec.At.Epoch, Locked: h.locked(job)}
	if err == nil && node != h.conf.Self {
		err = h.conf.Files.Prepare(ctx, job, Placement{h.conf.Self, j.rec.At.Epoch - 1}, j.rec.At)
		if err == nil {
			err = h.conf.Files.Commit(ctx, job, j.rec.At, nil)
		}
	}
	if err == nil {
		err = h.conf.Peer(node).Start(ctx, order, spec)
	}
	if err == nil {
		// If this cannot be journalled, a restarted agent confirms it.
		if _, err := h.change(j, func(r Record) (Record, error) { return r.Confirm(), nil }); err != nil {
			h.log.Warn("a job runs, but that is not in the journal yet", "job", job, "err", err)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTime)
	defer cancel()
	if derr := h.conf.Peer(node).Discard(ctx, order); derr != nil {
		// It asks us about its copy, and is told that there is no such job.
		h.log.Warn("cannot tell a node that a job was not started", "job", job, "err", derr)
	}
	_ = h.conf.Files.Remove(ctx, job) // what it serves nobody has
	h.drop(job)
	return err
}

// drop forgets a job.
func (h *Home) drop(job JobID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.conf.Journal.Delete(string(job)); err != nil {
		h.log.Error("a job that is over stays in the journal", "job", job, "err", err)
	}
	delete(h.jobs, job)
}

// Jobs are the records of all jobs.
func (h *Home) Jobs() []Record {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []Record
	for _, j := range h.jobs {
		all = append(all, j.record())
	}
	return all
}

// Job is the record of one job.
func (h *Home) Job(job JobID) (Record, error) {
	j, err := h.job(job)
	if err != nil {
		return Record{}, err
	}
	return j.record(), nil
}

func (h *Home) job(job JobID) (*homeJob, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if j := h.jobs[job]; j != nil {
		return j, nil
	}
	return nil, fault.New(fault.NotFound, "find", "job "+string(job), "this node is not its home", "")
}

func (j *homeJob) record() Record {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.rec
}

// change journals the next record, and only then makes it the truth.
func (h *Home) change(j *homeJob, f func(Record) (Record, error)) (Record, error) {
	j.mu.Lock()
	next, err := f(j.rec)
	if err != nil {
		defer j.mu.Unlock()
		return j.rec, err
	}
	if next.At != j.rec.At {
		next.Since = time.Now()
	}
	if err := h.conf.Journal.Put(string(next.Job), next); err != nil {
		defer j.mu.Unlock()
		return j.rec, fault.New(fault.Environment, "journal", "job "+string(next.Job), err, "")
	}
	j.rec = next
	j.mu.Unlock()
	if h.conf.Changed != nil {
		h.conf.Changed(next)
	}
	return next, nil
}

// Lost ends a job whose node is gone for good; one that has ended there has
// lost what was not read of its output.
func (h *Home) Lost(job JobID, reason string) error {
	j, err := h.job(job)
	if err != nil {
		return err
	}
	_, err = h.change(j, func(r Record) (Record, error) {
		end := End{Lost: reason}
		if r.End != nil {
			end.Exit, end.Signal = r.End.Exit, r.End.Signal
		}
		if r.End != nil && r.End.Lost != "" {
			return r, nil
		}
		return r.Finish(end), nil
	})
	return err
}

// driveEvery is how often Run looks for jobs of which something is unfinished.
const driveEvery = 3 * time.Second

// Run goes on, until ctx ends, with what is unfinished: of an earlier agent, or
// since a node could not be reached.
func (h *Home) Run(ctx context.Context) {
	tick := time.NewTicker(driveEvery)
	defer tick.Stop()
	for {
		for _, rec := range h.Jobs() {
			if rec.Todo() == Nothing {
				continue
			}
			j, err := h.job(rec.Job)
			if err != nil || !j.turn.TryLock() {
				continue // somebody is at it
			}
			go func() {
				defer j.turn.Unlock()
				if err := h.drive(ctx, j); err != nil {
					h.log.Warn("unfinished", "job", rec.Job, "err", err)
				}
			}()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Ask answers a node that holds a frozen copy: see Judge.
func (h *Home) Ask(_ context.Context, _ api.NodeID, job JobID, c Placement) (Verdict, uint64, error) {
	j, err := h.job(job)
	if fault.KindOf(err) == fault.NotFound && err != nil {
		return Discard, 0, nil // it has ended and is forgotten
	}
	v, epoch := j.record().Verdict(c)
	return v, epoch, nil
}

// Ended notes the end of a job, as its owner tells it: see Judge. What another node
// says is not heard: its copy is not the job.
func (h *Home) Ended(_ context.Context, _ api.NodeID, job JobID, from Placement, end End) error {
	j, err := h.job(job)
	if err != nil {
		return err
	}
	_, err = h.change(j, func(r Record) (Record, error) {
		switch {
		case r.At == from && r.End != nil: // told before
			return r, nil
		case r.At != from:
			return r, fault.New(fault.Refused, "end", "job "+string(job), fmt.Sprintf("epoch %d of node %d is not the job", from.Epoch, from.Node), "")
		}
		return r.Finish(end), nil
	})
	return err
}

// Forget drops a job that has ended, and its capsule with what was not read of
// its output: when its end has been told to who asked.
func (h *Home) Forget(ctx context.Context, job JobID) error {
	j, err := h.job(job)
	if err != nil {
		return err
	}
	j.turn.Lock()
	defer j.turn.Unlock()
	rec := j.record()
	if rec.End == nil {
		return rec.refuse("forget", "it has not ended", "")
	}
	if err := h.drive(ctx, j); err != nil { // a copy elsewhere may be left
		return err
	}
	// First the copy: a record is what makes us try again.
	err = h.conf.Peer(rec.At.Node).Discard(ctx, Order{Job: job, Home: h.conf.Self, Epoch: rec.At.Epoch})
	if err != nil && rec.End.Lost == "" { // a lost job's node may never answer; if it does, it asks
		return err
	}
	if err := h.conf.Files.Remove(ctx, job); err != nil {
		return err
	}
	h.drop(job)
	return nil
}

func (h *Home) locked(job JobID) bool { return h.conf.Locked != nil && h.conf.Locked(job) }

func (h *Home) step(job JobID, s Step) {
	h.log.Debug("move", "job", job, "step", s)
	if h.conf.Trace != nil {
		h.conf.Trace(job, s)
	}
}

// Move moves a job that somebody wants elsewhere. After an error the job runs where it
// was, unless the error is ErrUnfinished: then it is on its new node, or about to be.
func (h *Home) Move(ctx context.Context, job JobID, to api.NodeID) error {
	return h.MoveFor(ctx, job, to, Bid{})
}

// MoveFor is Move for a node's balancer.
func (h *Home) MoveFor(ctx context.Context, job JobID, to api.NodeID, bid Bid) error {
	j, err := h.job(job)
	if err != nil {
		return err
	}
	if !j.turn.TryLock() {
		return fault.New(fault.Refused, "move", "job "+string(job), "it is being moved", "try again when it is there")
	}
	defer j.turn.Unlock()
	if _, err := j.record().Reserve(to); err != nil {
		return err
	}
	facts, err := h.inspect(ctx, j.record())
	if err != nil {
		return h.unlessEnded(ctx, j, err, 0)
	}
	rec, err := h.change(j, func(r Record) (Record, error) { return r.Reserve(to) })
	if err != nil {
		return err
	}
	pids, stopped, err := h.carry(ctx, rec, facts, bid)
	if err != nil {
		h.callOff(ctx, j, rec.Next, err.Error())
		return h.unlessEnded(ctx, j, fault.New(fault.Refused, "move", "job "+string(job), err, fmt.Sprintf("it runs on, on node %d", rec.At.Node)), endPatience)
	}
	h.step(job, StepCommit)
	if _, err := h.change(j, func(r Record) (Record, error) {
		r, err := r.Commit()
		r.Pids = pids
		return r, err
	}); err != nil {
		h.callOff(ctx, j, rec.Next, err.Error())
		return h.unlessEnded(ctx, j, err, 0)
	}
	h.mu.Lock()
	h.stopped[job] = stopped
	h.mu.Unlock()
	err = h.drive(ctx, j)
	h.step(job, StepDone)
	return err
}

// endPatience is how long a job may take to end whose end has made its move fail:
// the dump sees a dead program before the leader above it has noticed.
const endPatience = 300 * time.Millisecond

// unlessEnded is why a move failed, unless the job has ended meanwhile: then it
// is that, however far the move had come.
func (h *Home) unlessEnded(ctx context.Context, j *homeJob, err error, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	for until := time.Now().Add(patience); ; {
		rec := j.record()
		if rec.End != nil {
			return rec.over("move")
		}
		// Its node may know before we are told.
		_, ierr := h.conf.Peer(rec.At.Node).Inspect(ctx, Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.At.Epoch})
		if ierr != nil && fault.KindOf(ierr) == fault.NotFound {
			return rec.over("move")
		}
		if ierr != nil && fault.KindOf(ierr) == fault.Unavailable || !time.Now().Before(until) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(retryFirst):
		}
	}
}

// inspect refuses what cannot be moved before anything is touched.
func (h *Home) inspect(ctx context.Context, rec Record) (Facts, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	refuse := func(cause any) error {
		return fault.New(fault.Refused, "move", "job "+string(rec.Job), cause, fmt.Sprintf("it runs on, on node %d", rec.At.Node))
	}
	facts, err := h.conf.Peer(rec.At.Node).Inspect(ctx, Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.At.Epoch})
	if err != nil {
		return facts, refuse(err)
	}
	if facts.Use.Pinned != "" {
		return facts, refuse(facts.Use.Pinned)
	}
	return facts, nil
}

// Unlocked implements Judge.
func (h *Home) Unlocked(ctx context.Context, _ api.NodeID, job JobID, c Placement) error {
	j, err := h.job(job)
	if err != nil {
		return err
	}
	if rec := j.record(); rec.At != c {
		return fault.New(fault.NotFound, "find", "job "+string(job), fmt.Sprintf("epoch %d of node %d is not the job", c.Epoch, c.Node), "")
	}
	return h.unlocked(ctx, job)
}

// unlocked refuses a move home of a job that holds locks on home files: here
// the kernel would have to know its processes as their holders.
func (h *Home) unlocked(ctx context.Context, job JobID) error {
	locks, err := h.conf.Files.Locks(ctx, job)
	if err == nil && len(locks) > 0 {
		err = fault.New(fault.Refused, "move home", "job "+string(job), locks[0], "try again when it has let go")
	}
	return err
}

// carry takes a move to the point where both copies are frozen and complete.
// It tells which process of the old copy is which of the new one, and since
// when the job stands still at the most.
func (h *Home) carry(ctx context.Context, rec Record, facts Facts, bid Bid) (pids map[uint32]uint32, stopped time.Time, err error) {
	src, dst := h.conf.Peer(rec.At.Node), h.conf.Peer(rec.Next.Node)
	atDst := Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.Next.Epoch, Source: rec.At.Node, Owner: rec.Owner, Machine: facts.Machine, Bytes: facts.Use.Bytes,
		Locked: h.locked(rec.Job), Moves: rec.Moves + 1, Bid: bid}
	atSrc := Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.At.Epoch, To: *rec.Next}
	var before, after Pids
	for _, s := range []struct {
		step Step
		do   func() error
	}{
		{StepPrepare, func() error {
			if err := h.conf.Files.Prepare(ctx, rec.Job, rec.At, *rec.Next); err != nil {
				return err
			}
			return dst.Prepare(ctx, atDst)
		}},
		{StepFreeze, func() (err error) {
			stopped = time.Now()
			if before, err = src.Freeze(ctx, atSrc); err != nil {
				return err
			}
			if err := h.conf.Files.Sync(ctx, rec.Job); err != nil {
				return err
			}
			if rec.Next.Node != h.conf.Self {
				return nil
			}
			return h.unlocked(ctx, rec.Job) // the source has seen to that
		}},
		{StepRestore, func() (err error) {
			after, err = dst.Restore(ctx, atDst)
			return err
		}},
	} {
		h.step(rec.Job, s.step)
		if err := s.do(); err != nil {
			return nil, stopped, fmt.Errorf("%s: %w", s.step, err)
		}
	}
	pids = make(map[uint32]uint32)
	for inside, pid := range before {
		pids[pid] = after[inside]
	}
	return pids, stopped, nil
}

// callOff journals the abort and tells both nodes, once: a node that is not
// reached will ask.
func (h *Home) callOff(ctx context.Context, j *homeJob, next *Placement, reason string) {
	rec, err := h.change(j, func(r Record) (Record, error) { return r.Abort(reason), nil })
	if err != nil {
		// Not durable: nobody may be told. Both copies stay frozen and ask.
		h.log.Error("cannot journal that a move is called off", "job", rec.Job, "err", err)
		return
	}
	h.log.Warn("move called off", "job", rec.Job, "why", reason)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTime)
	defer cancel()
	order := Order{Job: rec.Job, Home: h.conf.Self, Reason: reason}
	if err := h.conf.Files.Abort(ctx, rec.Job, *next); err != nil {
		h.log.Warn("home files still wait for a copy that does not come", "job", rec.Job, "err", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		o := order
		o.Epoch = rec.At.Epoch
		if err := h.conf.Peer(rec.At.Node).Thaw(ctx, o); err != nil {
			h.log.Warn("cannot tell the source that the move is called off; it will ask", "job", rec.Job, "err", err)
		}
	})
	wg.Go(func() {
		o := order
		o.Epoch = next.Epoch
		if err := h.conf.Peer(next.Node).Discard(ctx, o); err != nil {
			h.log.Warn("cannot tell the destination that the move is called off; it will ask", "job", rec.Job, "err", err)
		}
	})
	wg.Wait()
}

// ErrUnfinished is a move that was committed, and of which a node could not be
// told yet. Drive goes on with it.
var ErrUnfinished = errors.New("the move is committed, but not finished")

// Drive finishes what is unfinished about a job: after a restart of the agent,
// and whenever a node comes back. It repeats until it is done or ctx ends.
func (h *Home) Drive(ctx context.Context, job JobID) error {
	j, err := h.job(job)
	if err != nil {
		return err
	}
	j.turn.Lock()
	defer j.turn.Unlock()
	return h.drive(ctx, j)
}

func (h *Home) drive(ctx context.Context, j *homeJob) error {
	pause := retryFirst
	for {
		rec := j.record()
		task := rec.Todo()
		if task == Nothing {
			return nil
		}
		err := h.do(ctx, j, rec, task)
		if err == nil {
			pause = retryFirst
			continue
		}
		h.log.Warn("will be tried again", "job", rec.Job, "task", task, "err", err)
		select {
		case <-ctx.Done():
			return fault.New(fault.Unavailable, string(task), "job "+string(rec.Job), fmt.Errorf("%w: %w", ErrUnfinished, err), "")
		case <-time.After(pause):
		}
		pause = min(2*pause, retryMost)
	}
}

// do carries out one task.
func (h *Home) do(ctx context.Context, j *homeJob, rec Record, task Task) error {
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	switch task {
	case CallOff:
		h.callOff(ctx, j, rec.Next, "the home's agent was restarted")
		return nil
	case ResumeAt:
		h.step(rec.Job, StepResume)
		// First the files: from here on only At is served.
		var err error
		if rec.Thaws != 0 {
			err = h.conf.Files.Reclaim(ctx, rec.Job, rec.At)
		} else if rec.Prev != nil {
			err = h.conf.Files.Commit(ctx, rec.Job, rec.At, rec.Pids)
		}
		order := Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.At.Epoch, From: rec.Thaws}
		if err != nil {
			err = fault.New(fault.KindOf(err), "hand over", "the files of job "+string(rec.Job), err, "")
			switch {
			case fault.KindOf(err) != fault.NotFound:
				return err
			case rec.At.Node != h.conf.Self: // at home a copy has its files open by itself
				// The node alone knows whether the copy has run; if not, it must not any more.
				order.Reason = err.Error()
			}
		}
		err = h.conf.Peer(rec.At.Node).Resume(ctx, order)
		if err == nil {
			_, err = h.change(j, func(r Record) (Record, error) {
				r = r.Confirm()
				r.Downtime = h.downtime(rec.Job)
				return r, nil
			})
			return err
		}
		reason := err.Error()
		switch fault.KindOf(err) {
		case fault.NotFound: // gone, and never ran: the source may have it back
			_, err = h.change(j, func(r Record) (Record, error) {
				if r.Prev == nil || r.Thaws != 0 {
					return r.Finish(End{Lost: reason}), nil
				}
				return r.Reclaim(reason)
			})
		case fault.Refused: // gone, and may have run: running it again might do things twice
			_, err = h.change(j, func(r Record) (Record, error) { return r.Finish(End{Lost: reason}), nil })
		}
		return err
	case KillPrev:
		h.step(rec.Job, StepKill)
		// First its files: a process that is killed closes them, and waits for the answer.
		if err := h.conf.Files.Settle(ctx, rec.Job); err != nil {
			return err
		}
		err := h.conf.Peer(rec.Prev.Node).Discard(ctx, Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.Prev.Epoch})
		if err != nil {
			return err
		}
		_, err = h.change(j, func(r Record) (Record, error) { return r.Settle(), nil })
		return err
	}
	return fmt.Errorf("task %q", task)
}

// downtime is how long a job stood still that runs again; 0 when an earlier
// agent has begun the move.
func (h *Home) downtime(job JobID) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	since, ok := h.stopped[job]
	delete(h.stopped, job)
	if !ok {
		return 0
	}
	return time.Since(since)
}
