package jobs

import (
	"context"
	"fmt"
	"time"

	"mosimg/agent/jobs/wire"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// Times of the watch over a job's node. Its own side of it is the lease of
// package migrate: a guest is held when its home is silent for as long as
// noteAfter, and killed after the lease; lostMargin is what that may take.
const (
	watchEvery  = 2 * time.Second
	watchLimit  = 4 * time.Second // of one look
	noteAfter   = 10 * time.Second
	lostMargin  = 30 * time.Second
	measureTime = time.Second // of a look for a list
)

// patience is how long a silent node is waited for: it has killed its guests by then.
func (s *Service) patience() time.Duration { return s.conf.Lease + lostMargin }

// silence is what follows from a node that has not answered for a while.
type silence string

const (
	silenceNone silence = "none"
	silenceNote silence = "note" // its user is told
	silenceLost silence = "lost" // the job is given up
)

func silenceAfter(d, patience time.Duration) silence {
	switch {
	case d >= patience:
		return silenceLost
	case d >= noteAfter:
		return silenceNote
	}
	return silenceNone
}

// watch sees whether the job's node is there and has the job.
func (j *job) watch(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	heard := time.Now()
	var at migrate.Placement
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		rec, err := j.s.conf.Home.Job(j.id)
		if err != nil || rec.End != nil && rec.End.Lost != "" {
			continue
		}
		if rec.At != at {
			at, heard = rec.At, time.Now()
			j.change(func() { j.silent = false })
		}
		_, err = j.measure(ctx, rec.At, watchLimit, false)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			heard = time.Now()
			j.answered(ctx, at.Node)
			continue
		}
		j.s.log.Debug("a job's node does not answer", "job", j.id, "node", at.Node, "err", err)
		if fault.KindOf(err) == fault.NotFound {
			j.missing(rec)
			continue
		}
		if at.Node == j.s.conf.Self {
			continue // its shim is this agent's own to bring in order
		}
		switch silenceAfter(time.Since(heard), j.s.patience()) {
		case silenceNote:
			j.unanswered(at.Node)
		case silenceLost:
			j.lose(fmt.Sprintf("node %d has not answered for %s", at.Node, j.s.patience()))
		}
	}
}

// missing loses a job that its node does not have, if that is where the job has
// to be: the node was started anew, or has given the job up.
func (j *job) missing(asked migrate.Record) {
	now, err := j.s.conf.Home.Job(j.id)
	if err != nil || !asked.Running || now.At != asked.At || !now.Running || now.Next != nil {
		return // it was just moving
	}
	j.lose(fmt.Sprintf("node %d does not have it any more; was it restarted?", asked.At.Node))
}

func (j *job) lose(reason string) {
	j.s.log.Warn("job lost", "job", j.id, "why", reason)
	if err := j.s.conf.Home.Lost(j.id, reason); err != nil {
		j.s.log.Warn("a lost job", "job", j.id, "err", err)
	}
}

func (j *job) unanswered(node api.NodeID) {
	var s *session
	j.change(func() {
		if !j.silent {
			s = j.session
		}
		j.silent = true
	})
	if s != nil {
		s.tell(wire.KindNote, fmt.Appendf(nil, "node %d does not answer; the job waits", node))
	}
}

// answered is called when a node answers. After a silence the old connections may never
// carry anything again, nor break.
func (j *job) answered(ctx context.Context, node api.NodeID) {
	var s *session
	silent := false
	j.mu.Lock()
	silent, j.silent = j.silent, false
	s = j.session
	j.mu.Unlock()
	if !silent {
		return
	}
	j.reconnect(ctx)
	if s != nil {
		s.tell(wire.KindNote, fmt.Appendf(nil, "node %d answers again", node))
	}
}
