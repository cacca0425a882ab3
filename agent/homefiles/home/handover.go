package home

import (
	"fmt"
	"os"
	"strings"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// heldOwner is the placement that had a capsule before the last Commit. It is
// served nothing, but nothing of it is closed.
type heldOwner struct {
	placement
	session *session          // nil if the job was at home, or never asked for a file
	pids    map[uint32]uint32 // as given to Commit
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
// one before; its locks go to the new one. pids maps processes of the job
// from their numbers at the old node to those at the new one, each as the
// forwarder there sees them; locks of a process that is not in it are
// dropped with the old session. Committing the current epoch again is no
// fault: the caller may be going through its journal.
func (s *Server) Commit(id string, epoch uint64, pids map[uint32]uint32) error {
	const op = "commit home files of capsule"
	s.mu.Lock()
	c := s.capsules[id]
	switch {
	case c == nil:
		s.mu.Unlock()
		return fault.New(fault.NotFound, op, id, "no such capsule", "")
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
	c.held = &heldOwner{placement{c.Epoch, c.Node}, old, pids}
	c.Epoch, c.Node, c.next = epoch, c.next.node, nil
	s.mu.Unlock()
	before.end()
	if old != nil {
		// No request of the old session may be under way when its locks
		// change hands.
		old.hold()
		if now != nil {
			s.moveLocks(old, now, pids)
		}
	}
	return nil
}

// Reclaim gives a capsule back to the placement that Commit held up, in a new
// epoch, and ends the session that took its place and never ran. Its forwarder goes on
// as before, with the epoch that it always said. Doing it again is no fault.
func (s *Server) Reclaim(id string, epoch uint64) error {
	const op = "take back home files of capsule"
	s.mu.Lock()
	c := s.capsules[id]
	switch {
	case c == nil:
		s.mu.Unlock()
		return fault.New(fault.NotFound, op, id, "no such capsule", "")
	case epoch == c.Epoch:
		s.mu.Unlock()
		return nil
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
		dead.fence()
		if h.session != nil {
			back := make(map[uint32]uint32, len(h.pids))
			for from, to := range h.pids {
				back[to] = from
			}
			s.moveLocks(dead, h.session, back)
		}
		dead.end()
	}
	if h.session != nil {
		h.session.release()
	}
	return nil
}

// Settle ends what Commit held up. It is no fault if there is none.
func (s *Server) Settle(id string) {
	s.mu.Lock()
	var h *heldOwner
	if c := s.capsules[id]; c != nil {
		h, c.held = c.held, nil
	}
	s.mu.Unlock()
	h.end()
}

// end ends the session of a placement that is past; nil is none.
func (h *heldOwner) end() {
	if h != nil && h.session != nil {
		h.session.end()
	}
}

// Locks are the files that a capsule holds locks on, in words.
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
	tell := func(kind string, fd int, pid uint32) {
		name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		if err != nil {
			name = "a file"
		}
		all = append(all, fmt.Sprintf("process %d has a lock (%s) on %s", pid, kind, strings.TrimSuffix(name, " (deleted)")))
	}
	t := &s.locks
	t.mu.Lock()
	for own, h := range t.owners {
		if own.ss == ss && len(h.ranges) > 0 {
			tell("fcntl", h.fd, h.pid)
		}
	}
	for _, m := range t.moved {
		if m.ss == ss && len(m.h.ranges) > 0 {
			tell("fcntl", m.h.fd, m.h.pid)
		}
	}
	t.mu.Unlock()
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for _, f := range ss.files {
		f.mu.Lock()
		if f.flockPID != 0 && f.flockType != unlock {
			tell("flock", f.fd, f.flockPID)
		}
		f.mu.Unlock()
	}
	return all
}
