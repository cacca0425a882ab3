package enrol

import (
	"sync"
	"time"

	"mosimg/pxe/registry"
)

// seen remembers when machines asked last, in memory: writing it down with
// each poll would cost an fsync each. Now and then it goes into the records.
type seen struct {
	// mu guards the following.
	mu sync.Mutex
	at map[string]time.Time // MAC -> last request of the record's key
	// rivals are when another key asked for a MAC whose key was here.
	rivals map[string]time.Time
}

func (s *seen) touch(mac string, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at == nil {
		s.at = map[string]time.Time{}
	}
	s.at[mac] = now
}

func (s *seen) last(mac string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.at[mac]
}

// contend notes that another key asked for this MAC.
func (s *seen) contend(mac string, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rivals == nil {
		s.rivals = map[string]time.Time{}
	}
	s.rivals[mac] = now
}

// contested tells whether another key asked for this MAC lately.
func (s *seen) contested(mac string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.rivals[mac]
	return ok && now.Sub(at) < rivalWindow
}

// take returns what was seen and forgets what is old.
func (s *seen) take(now time.Time) map[string]time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]time.Time, len(s.at))
	for mac, t := range s.at {
		out[mac] = t
		if now.Sub(t) > rivalWindow {
			delete(s.at, mac)
		}
	}
	for mac, t := range s.rivals {
		if now.Sub(t) > rivalWindow {
			delete(s.rivals, mac)
		}
	}
	return out
}

// flushSeen writes the times of last sight into the records.
func (s *Service) flushSeen() error {
	times := s.seen.take(s.now())
	return s.Store.Update(func(tx *registry.Tx) error {
		for mac, t := range times {
			if n := tx.Node(mac); n != nil && t.After(n.LastSeen) {
				n.LastSeen = t
				tx.TouchNode(n)
			}
		}
		tx.Prune()
		return nil
	})
}
