package dhcpd

import "sync"

// maxServed bounds the memory of machines that were answered as a proxy.
const maxServed = 4096

// served remembers who was told what to boot where no lease says so.
type served struct {
	// mu guards the following.
	mu   sync.Mutex
	macs map[string]bool
}

func (s *served) add(mac string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.macs == nil || len(s.macs) >= maxServed {
		s.macs = map[string]bool{} // forgetting costs a machine a wait of seconds
	}
	s.macs[mac] = true
}

// Served tells whether a machine was told what to boot in proxy mode.
func (h *Handler) Served(mac string) bool {
	h.served.mu.Lock()
	defer h.served.mu.Unlock()
	return h.served.macs[mac]
}
