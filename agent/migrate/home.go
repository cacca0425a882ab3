package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// HomeConfig is what a Home needs.
type HomeConfig struct {
	Self    api.NodeID
	Journal *Journal[Record]
	// Peer gives a node to talk to: itself for Self.
	Peer func(api.NodeID) Peer
	// Version goes into every order to prepare.
	Version string
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
}

// homeJob is a job and who is working on it.
type homeJob struct {
	turn sync.Mutex // held by who carries out a move or a task

	mu  sync.Mutex // guards the following
	rec Record
}

// NewHome reads the journal. Drive then finishes what an earlier agent had begun.
func NewHome(conf HomeConfig) (*Home, error) {
	h := &Home{conf: conf, log: conf.Log, jobs: make(map[JobID]*homeJob)}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
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

// Add makes a job that was started on a node known.
func (h *Home) Add(job JobID, node api.NodeID) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.jobs[job] != nil {
		return fault.New(fault.Refused, "add", "job "+string(job), "there is one of this name", "")
	}
	j := &homeJob{rec: NewRecord(job, node)}
	if err := h.conf.Journal.Put(string(job), j.rec); err != nil {
		return fault.New(fault.Environment, "journal", "job "+string(job), err, "")
	}
	h.jobs[job] = j
	return nil
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
	defer j.mu.Unlock()
	next, err := f(j.rec)
	if err != nil {
		return j.rec, err
	}
	if err := h.conf.Journal.Put(string(next.Job), next); err != nil {
		return j.rec, fault.New(fault.Environment, "journal", "job "+string(next.Job), err, "")
	}
	j.rec = next
	return next, nil
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
	if err := h.conf.Peer(rec.At.Node).Discard(ctx, Order{Job: job, Home: h.conf.Self, Epoch: rec.At.Epoch}); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.conf.Journal.Delete(string(job)); err != nil {
		return err
	}
	delete(h.jobs, job)
	return nil
}

func (h *Home) step(job JobID, s Step) {
	h.log.Debug("move", "job", job, "step", s)
	if h.conf.Trace != nil {
		h.conf.Trace(job, s)
	}
}

// Move moves a job. After an error the job runs where it was, unless the error
// is ErrUnfinished: then it is on its new node, or about to be.
func (h *Home) Move(ctx context.Context, job JobID, to api.NodeID) error {
	j, err := h.job(job)
	if err != nil {
		return err
	}
	if !j.turn.TryLock() {
		return fault.New(fault.Refused, "move", "job "+string(job), "it is being moved", "try again when it is there")
	}
	defer j.turn.Unlock()
	rec, err := h.change(j, func(r Record) (Record, error) { return r.Reserve(to) })
	if err != nil {
		return err
	}
	if err := h.carry(ctx, rec); err != nil {
		h.callOff(ctx, j, rec.Next, err.Error())
		return fault.New(fault.Refused, "move", "job "+string(job), err, fmt.Sprintf("it runs on, on node %d", rec.At.Node))
	}
	h.step(job, StepCommit)
	if _, err := h.change(j, Record.Commit); err != nil {
		h.callOff(ctx, j, rec.Next, err.Error())
		return err
	}
	err = h.drive(ctx, j)
	h.step(job, StepDone)
	return err
}

// carry takes a move to the point where both copies are frozen and complete.
func (h *Home) carry(ctx context.Context, rec Record) error {
	src, dst := h.conf.Peer(rec.At.Node), h.conf.Peer(rec.Next.Node)
	atDst := Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.Next.Epoch, Source: rec.At.Node, Version: h.conf.Version}
	atSrc := Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.At.Epoch, To: *rec.Next}
	for _, s := range []struct {
		step  Step
		order func(context.Context, Order) error
		arg   Order
	}{
		{StepPrepare, dst.Prepare, atDst},
		{StepFreeze, src.Freeze, atSrc},
		{StepRestore, dst.Restore, atDst},
	} {
		h.step(rec.Job, s.step)
		if err := s.order(ctx, s.arg); err != nil {
			return fmt.Errorf("%s: %w", s.step, err)
		}
	}
	return nil
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
		err := h.conf.Peer(rec.At.Node).Resume(ctx, Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.At.Epoch, From: rec.Thaws})
		if err == nil {
			_, err = h.change(j, func(r Record) (Record, error) { return r.Confirm(), nil })
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
		err := h.conf.Peer(rec.Prev.Node).Discard(ctx, Order{Job: rec.Job, Home: h.conf.Self, Epoch: rec.Prev.Epoch})
		if err != nil {
			return err
		}
		_, err = h.change(j, func(r Record) (Record, error) { return r.Settle(), nil })
		return err
	}
	return fmt.Errorf("task %q", task)
}
