package home

import (
	"fmt"
	"os"
	"slices"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// heldOwner is the placement that had a capsule before the last Commit. It is
// served nothing, but nothing of it is closed.
type heldOwner struct {
	placement
	session *session // nil if the job was at home, or never asked for a file
}

// find gives a capsule, with its turn, which the caller gives back.
func (s *Server) find(op, id string) (*capsule, error) {
	s.mu.Lock()
	c := s.capsules[id]
	s.mu.Unlock()
	if c == nil {
		return nil, fault.New(fault.NotFound, op, id, "no such capsule", "")
	}
	c.turn.Lock()
	return c, nil
}

// Prepare admits a session of epoch from node beside the current one, for the
// restore of the capsule there. The epoch must be after the current one; what
// was prepared before is dropped, unless it is the same.
func (s *Server) Prepare(id string, epoch uint64, node api.NodeID) error {
	const op = "prepare home files of capsule"
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.capsules[id]
	if c == nil {
		return fault.New(fault.NotFound, op, id, "no such capsule", "")
	}
	if epoch <= c.Epoch {
		return fault.New(fault.Refused, op, id, "epoch is not after the current one", "")
	}
	if c.next != nil && *c.next == (placement{epoch, node}) {
		return nil
	}
	s.dropNext(c)
	c.next = &placement{epoch, node}
	return nil
}

// Abort drops what Prepare admitted. It is no fault if there is none.
func (s *Server) Abort(id string, epoch uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.capsules[id]; c != nil && c.next != nil && c.next.epoch == epoch {
		s.dropNext(c)
	}
}

func (s *Server) dropNext(c *capsule) {
	if c.next == nil {
		return
	}
	if old := c.sessions[c.next.epoch]; old != nil {
		delete(c.sessions, c.next.epoch)
		go old.end()
	}
	c.next = nil
}

// Commit makes a prepared epoch the only one that is served, and holds up the
// one before; its locks are the new one's too. pids maps processes of the job
// from their numbers at the old node to those at the new one, each as the
// forwarder there sees them; locks of a process that is not in it are
// dropped with the old session. Committing the current epoch again is no
// fault: the caller may be going through its journal.
func (s *Server) Commit(id string, epoch uint64, pids map[uint32]uint32) error {
	const op = "commit home files of capsule"
	c, err := s.find(op, id)
	if err != nil {
		return err
	}
	defer c.turn.Unlock()
	s.mu.Lock()
	switch {
	case epoch == c.Epoch:
		s.mu.Unlock()
		return nil
	case c.next == nil || c.next.epoch != epoch:
		s.mu.Unlock()
		return fault.New(fault.Refused, op, id, "this epoch was not prepared", "")
	}
	before := c.held // the caller has not settled an earlier move: it is past
	old, now := c.sessions[c.Epoch], c.sessions[epoch]
	delete(c.sessions, c.Epoch)
	c.held = &heldOwner{placement{c.Epoch, c.Node}, old}
	c.Epoch, c.Node, c.next = epoch, c.next.node, nil
	s.mu.Unlock()
	before.end()
	if old != nil {
		// No request of the old session may be under way when its locks
		// are copied.
		old.hold()
		if now != nil {
			now.setUnsettled(true)
			s.copyLocks(old, now, pids)
		}
	}
	return nil
}

// Reclaim gives a capsule back to the placement that Commit held up, in a new
// epoch, and ends the session that took its place and never ran. Its forwarder goes on
// as before, with the epoch that it always said, and with its locks, which nobody
// could have had meanwhile. Doing it again is no fault.
func (s *Server) Reclaim(id string, epoch uint64) error {
	const op = "take back home files of capsule"
	c, err := s.find(op, id)
	if err != nil {
		return err
	}
	defer c.turn.Unlock()
	s.mu.Lock()
	switch {
	case epoch == c.Epoch:
		s.mu.Unlock()
		return nil
	case epoch < c.Epoch:
		s.mu.Unlock()
		return fault.New(fault.Refused, op, id, "epoch is before the current one", "")
	case c.held == nil:
		s.mu.Unlock()
		return fault.New(fault.Refused, op, id, "nobody had it before, or it was settled", "")
	}
	h, dead := c.held, c.sessions[c.Epoch]
	s.dropNext(c)
	delete(c.sessions, c.Epoch)
	c.held, c.Epoch, c.Node = nil, epoch, h.node
	if h.session != nil {
		c.sessions[epoch] = h.session
		// What the forwarder says may itself have been taken back before.
		said := h.epoch
		for from, to := range c.reclaimed {
			if to == h.epoch {
				said = from
			}
		}
		c.reclaimed[said] = epoch
	}
	s.mu.Unlock()
	if dead != nil {
		dead.end()
	}
	if h.session != nil {
		h.session.release()
	}
	return nil
}

// Settle ends what Commit held up. It is no fault if there is none.
func (s *Server) Settle(id string) {
	c, err := s.find("settle home files of capsule", id)
	if err != nil {
		return
	}
	defer c.turn.Unlock()
	s.mu.Lock()
	h, now := c.held, c.sessions[c.Epoch]
	c.held = nil
	s.mu.Unlock()
	if now != nil {
		now.setUnsettled(false)
	}
	h.end()
}

// end ends the session of a placement that is past; nil is none.
func (h *heldOwner) end() {
	if h != nil && h.session != nil {
		h.session.end()
	}
}

func (ss *session) setUnsettled(is bool) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.unsettled = is
}

// Locks are the files that a capsule holds locks on, in words and in order.
// Processes have the numbers that they have at its node.
func (s *Server) Locks(id string) []string {
	s.mu.Lock()
	var ss *session
	if c := s.capsules[id]; c != nil {
		ss = c.sessions[c.Epoch]
	}
	s.mu.Unlock()
	if ss == nil {
		return nil
	}
	var all []string
	t := &s.locks
	t.mu.Lock()
	tell := func(h *held) {
		for _, r := range h.ranges {
			all = append(all, fmt.Sprintf("process %d has a %s lock (fcntl) on %s of %s", h.pid, kindOf(r.typ), r, nameOf(h.fd)))
		}
	}
	for own, h := range t.owners {
		if own.ss == ss {
			tell(h)
		}
	}
	for _, m := range t.moved {
		if m.ss == ss {
			tell(m.h)
		}
	}
	t.mu.Unlock()
	for _, f := range ss.openFiles() {
		f.mu.Lock()
		if f.flockPID != 0 && f.flockType != unlock {
			all = append(all, fmt.Sprintf("process %d has a %s lock (flock) on %s", f.flockPID, kindOf(f.flockType), nameOf(f.fd)))
		}
		f.mu.Unlock()
		f.unref()
	}
	slices.Sort(all)
	return all
}

func kindOf(typ uint32) string {
	if typ == readLock {
		return "read"
	}
	return "write"
}

// nameOf is the name of an open file for people, if it can be found.
func nameOf(fd int) string {
	name, err := os.Readlink(procFD(fd))
	if err != nil {
		return "a file"
	}
	return name
}
