package jobs

import (
	"context"
	"fmt"
	"strconv"

	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// Propose moves a job whose node wants to be rid of it, if nothing speaks
// against it that only its home knows. from is the copy that the node has.
func (s *Service) Propose(ctx context.Context, id migrate.JobID, from migrate.Placement, move migrate.Proposal) error {
	refuse := func(cause any) error {
		return fault.New(fault.Refused, "move", "job "+string(id), cause, "")
	}
	s.mu.Lock()
	j := s.jobs[id]
	s.mu.Unlock()
	if j == nil {
		return noJob(string(id))
	}
	rec, err := s.conf.Home.Job(id)
	if err != nil {
		return err
	}
	info := j.infoNow()
	keeps := ""
	if s.conf.Balance != nil {
		keeps = s.conf.Balance.Keeps()
	}
	switch {
	case rec.At != from:
		return refuse(fmt.Sprintf("node %d does not have it any more", from.Node))
	case info.Locked && !move.Must:
		return refuse("it was started to stay where it is (mosrun -L)")
	case keeps != "" && !move.Must && move.To != s.conf.Self:
		return refuse(keeps)
	case info.Killed:
		return refuse("it is being killed")
	}
	m, err := resolve(s.conf.Nodes(), s.conf.Self, strconv.Itoa(int(move.To)))
	if err == nil {
		err = takesMoves(m)
	}
	if err == nil {
		err = s.mayLeave(int(info.UID), m.Node)
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.base, cancel)()
	s.log.Info("a job is moved for its node", "job", id, "from", from.Node, "to", move.To, "why", move.Reason)
	return s.conf.Home.MoveFor(ctx, id, move.To, move.Bid)
}

// Away are the jobs of this home that are elsewhere.
func (s *Service) Away() []migrate.Record {
	var away []migrate.Record
	for _, rec := range s.conf.Home.Jobs() {
		if rec.End == nil && rec.At.Node != s.conf.Self {
			away = append(away, rec)
		}
	}
	return away
}

// BringHome moves a job home, locked or not.
func (s *Service) BringHome(ctx context.Context, id migrate.JobID) error {
	return s.conf.Home.Move(ctx, id, s.conf.Self)
}

// Locked tells whether a job's user does not want it moved by itself.
func (s *Service) Locked(id migrate.JobID) bool {
	s.mu.Lock()
	j := s.jobs[id]
	s.mu.Unlock()
	return j != nil && j.infoNow().Locked
}

// stays fills in why jobs stay where they are.
func (s *Service) stays(ctx context.Context, list []*api.JobStatus) {
	if s.conf.Balance == nil {
		return
	}
	var recs []migrate.Record
	for _, st := range list {
		if st == nil {
			continue
		}
		if rec, err := s.conf.Home.Job(migrate.JobID(st.ID)); err == nil && rec.End == nil {
			recs = append(recs, rec)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, measureTime)
	defer cancel()
	why := s.conf.Balance.Stays(ctx, recs)
	for _, st := range list {
		if st != nil {
			st.Stays = why[migrate.JobID(st.ID)]
		}
	}
}
