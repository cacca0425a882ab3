package tftpd

import (
	"net/netip"
	"testing"
	"time"
)

func peer(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), 2070)
}

// A machine that is half-way through its loader is never pushed out, however
// many others ask.
func TestStartedTransfersKeepTheirPlaces(t *testing.T) {
	now := time.Unix(0, 0)
	a := newAdmission(4)
	var started []*session
	for n := range 4 {
		s := a.ask(now, peer(n), []byte("rrq"))
		if s == nil {
			t.Fatalf("client %d does not get a free place", n)
		}
		a.start(s)
		started = append(started, s)
	}
	for n := range 10_000 {
		now = now.Add(time.Millisecond)
		if s := a.ask(now, peer(100+n), []byte("rrq")); s != nil {
			t.Fatalf("client %d gets a fifth place", n)
		}
	}
	for i, s := range started {
		if s.state != stateStarted {
			t.Errorf("session %d is in state %d; want started", i, s.state)
		}
	}
	if len(a.waiting) > maxWaiting || a.queue.Len() != len(a.waiting) {
		t.Errorf("%d wait, %d in the queue; want at most %d", len(a.waiting), a.queue.Len(), maxWaiting)
	}
	// The place that one gives back goes to the one that waits the longest
	// and has not given up.
	next := a.end(now, started[0])
	if next == nil || now.Sub(next.asked) > maxPatience {
		t.Fatalf("the place goes to %+v", next)
	}
	for s := range a.waiting {
		if a.waiting[s].asked.Before(next.asked) {
			t.Errorf("%v has waited longer than %v", s, next.client)
		}
	}
}

// Clients that never answer, as those of a flood, hold a place for a second
// when a real one waits.
func TestSilentClientsGiveWay(t *testing.T) {
	now := time.Unix(0, 0)
	a := newAdmission(4)
	var woken []netip.AddrPort
	for n := range 4 {
		s := a.ask(now, peer(n), []byte("rrq"))
		s.wake = func() { woken = append(woken, s.client) }
		if n == 0 {
			a.start(s)
		}
	}
	real := peer(500)
	if a.ask(now.Add(minChance/2), real, []byte("rrq")); len(woken) > 0 {
		t.Errorf("%v had to go after half a second", woken)
	}
	now = now.Add(minChance)
	a.ask(now, real, []byte("rrq")) // it repeats
	if len(woken) != 1 || woken[0] != peer(1) {
		t.Fatalf("woken: %v; want the oldest that has not started", woken)
	}
	next := a.end(now, a.running[peer(1)])
	if next == nil || next.client != real || len(a.running) != 4 {
		t.Errorf("the place goes to %+v, %d run; want the client that waits", next, len(a.running))
	}
	if a.fresh.Len() != 3 {
		t.Errorf("%d are fresh; want 3", a.fresh.Len())
	}
}

// A client that asks again joins what it has, and gets no second place.
func TestAskingAgain(t *testing.T) {
	now := time.Unix(0, 0)
	a := newAdmission(1)
	s := a.ask(now, peer(1), []byte("rrq"))
	woken := 0
	s.wake, s.wanted = func() { woken++ }, ""
	if a.ask(now, peer(1), []byte("rrq 2")) != nil || woken != 1 || s.wanted != "rrq 2" {
		t.Errorf("a running session's client asks again: woken %d, wanted %q", woken, s.wanted)
	}
	for range 3 {
		if a.ask(now, peer(2), []byte("rrq")) != nil {
			t.Fatal("there is no place")
		}
	}
	if len(a.waiting) != 1 || a.queue.Len() != 1 {
		t.Errorf("%d wait for one client", a.queue.Len())
	}
	if next := a.end(now.Add(maxPatience+1), s); next != nil {
		t.Errorf("a place is given to %v, who has given up", next.client)
	}
	if len(a.running)+len(a.waiting)+a.queue.Len()+a.fresh.Len() != 0 {
		t.Errorf("something is left: %+v", a)
	}
}

func TestParsePorts(t *testing.T) {
	for s, want := range map[string]Ports{"": {}, "single": {Single: true}, "40000-40255": {First: 40000, Last: 40255}, "5-5": {First: 5, Last: 5}} {
		if got, err := ParsePorts(s); err != nil || got != want {
			t.Errorf("ParsePorts(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{"x", "1", "0-5", "5-4", "1-65536", "-", "1-2-3", "-1-5", "any"} {
		if got, err := ParsePorts(s); err == nil {
			t.Errorf("ParsePorts(%q) = %+v; want an error", s, got)
		}
	}
	r := portRange{Ports: Ports{First: 65534, Last: 65535}}
	if c := r.candidates(); len(c) != 2 || c[0] == c[1] || c[0] < 65534 || c[1] < 65534 {
		t.Errorf("candidates at the end of all ports = %v", c)
	}
	if n := r.places(); n != 2 {
		t.Errorf("%d transfers at a time with two ports", n)
	}
}
