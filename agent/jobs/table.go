package jobs

import (
	"cmp"
	"context"
	"sync"
	"time"

	"mosimg/agent/agentapi"
	"mosimg/agent/capsule/control"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
)

// measure asks a copy how it is, and with use what it takes. What it says is
// kept for when it does not.
func (j *job) measure(ctx context.Context, at migrate.Placement, limit time.Duration, use bool) (control.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	c, err := j.s.conf.Capsule(j.id, at)
	if err != nil {
		return control.Status{}, err
	}
	ask := c.Status
	if use {
		ask = c.Measure
	}
	st, err := ask(ctx)
	if err != nil {
		return st, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.stopped = st.Stopped
	if st.Use != nil {
		j.use = *st.Use
	}
	return st, nil
}

// status is the job, as measured within a second.
func (j *job) status(ctx context.Context) (api.JobStatus, error) {
	rec, err := j.s.conf.Home.Job(j.id)
	if err != nil { // it has ended and was forgotten just now
		return api.JobStatus{}, noJob(string(j.id))
	}
	answered := false
	if rec.End == nil && rec.Running {
		_, err = j.measure(ctx, rec.At, measureTime, true)
		answered = err == nil
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	// One question without an answer says little; what is known is shown until watch
	// has found the node silent for a while.
	silent := j.silent && !answered
	return api.JobStatus{
		ID: string(j.id), PID: j.info.PID, UID: int(j.info.UID), Argv: j.info.Argv,
		State: stateOf(rec, silent, j.stopped),
		Home:  j.s.conf.Self, Node: rec.At.Node, Since: rec.Since, Started: j.info.Started,
		Moves: rec.Moves, Epoch: rec.At.Epoch, Locked: j.info.Locked,
		Bytes: j.use.Bytes, Processes: j.use.Processes, CPUSeconds: float64(j.use.CPUMicros) / 1e6,
		Reason: rec.Reason, Pinned: cmp.Or(j.use.Pinned, j.use.Locked), Downtime: rec.Downtime,
	}, nil
}

// stateOf puts a job's state into one word.
func stateOf(rec migrate.Record, silent, stopped bool) api.JobState {
	switch {
	case rec.End != nil:
		return api.JobEnded
	case silent:
		return api.JobWaits
	case rec.Next != nil || !rec.Running:
		return api.JobMoves
	case stopped:
		return api.JobStopped
	}
	return api.JobRuns
}

// table lists the jobs that a caller may see. They are asked at the same time:
// a node that does not answer holds up nobody for more than a second.
func (s *Service) table(ctx context.Context, who agentapi.Caller) api.JobTable {
	t := api.JobTable{Self: s.conf.Self, Jobs: []api.JobStatus{}}
	seen := s.seenBy(who)
	all := make([]*api.JobStatus, len(seen))
	var asking sync.WaitGroup
	for i, j := range seen {
		asking.Go(func() {
			if st, err := j.status(ctx); err == nil { // else it has just been forgotten
				all[i] = &st
			}
		})
	}
	if who.UID == 0 && s.conf.Guests != nil {
		asking.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, measureTime)
			defer cancel()
			t.Guests = s.conf.Guests(ctx)
		})
	}
	asking.Wait()
	s.stays(ctx, all)
	for _, st := range all {
		if st != nil {
			t.Jobs = append(t.Jobs, *st)
		}
	}
	return t
}
