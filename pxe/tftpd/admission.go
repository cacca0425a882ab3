package tftpd

import (
	"container/list"
	"net/netip"
	"time"
)

const (
	// maxTransfers run at a time. Few that end soon are better for all than
	// many that take each other's packets in the switch.
	maxTransfers = 256
	// maxWaiting requests beyond that are remembered, and answered in their
	// order when a place is free. More than that are not answered; firmware
	// asks again.
	maxWaiting = 2048
	// maxPatience is how long a request that was not repeated is remembered:
	// firmware gives up after 4 to 36 s, and an answer to one that has is a
	// place wasted. EDK2 and BIOS ROMs repeat after 4 s at the latest.
	maxPatience = 6 * time.Second
	// minChance is how long a client that has answered nothing keeps a
	// place for which another one waits.
	minChance = time.Second
)

// admission decides which requests are served now, which later and which not
// at all. It is a value without locks, clock or I/O.
//
// A transfer is started when its client has acknowledged something. A started
// transfer keeps its place to its end whatever else comes: clients that were
// pushed out half-way would come again, and nobody would ever finish. One
// that is not started gives way after minChance when others wait, so a flood
// of requests with invented senders holds up the real ones for moments.
type admission struct {
	places  int
	running map[netip.AddrPort]*session // at most places
	fresh   list.List                   // those of running that are in stateFresh, oldest first
	waiting map[netip.AddrPort]*session // at most maxWaiting
	queue   list.List                   // those of waiting, oldest first
}

// session is one client's request, identified by the client's address and port.
type session struct {
	client netip.AddrPort
	// wanted is the packet to be answered next, "" for none: at first the
	// request, later a repetition or another one from the same port.
	wanted string
	asked  time.Time // last
	since  time.Time // it runs since then
	state  sessionState
	at     *list.Element // in fresh or queue; nil in other states
	wake   func()        // makes the running transfer look at wanted and state
}

type sessionState int

const (
	stateWaiting sessionState = iota
	stateFresh                // runs, and nothing was acknowledged yet
	stateStarted              // runs
	stateEvicted              // runs, and is to give up its place
	stateEnded
)

func newAdmission(places int) *admission {
	return &admission{places: places, running: map[netip.AddrPort]*session{}, waiting: map[netip.AddrPort]*session{}}
}

// ask takes a request. It returns a session that is to be run now, or nil.
func (a *admission) ask(now time.Time, client netip.AddrPort, packet []byte) *session {
	if s := a.running[client]; s != nil {
		s.wanted, s.asked = string(packet), now
		s.wake()
		return nil
	}
	if s := a.waiting[client]; s != nil {
		s.wanted, s.asked = string(packet), now
		a.makeRoom(now)
		return nil
	}
	s := &session{client: client, wanted: string(packet), asked: now, wake: func() {}}
	if len(a.running) < a.places && len(a.waiting) == 0 {
		a.run(now, s)
		return s
	}
	a.forget(now)
	if len(a.waiting) < maxWaiting {
		a.waiting[client] = s
		s.at = a.queue.PushBack(s)
	}
	a.makeRoom(now)
	return nil
}

func (a *admission) run(now time.Time, s *session) {
	s.since, s.state = now, stateFresh
	a.running[s.client] = s
	s.at = a.fresh.PushBack(s)
}

// start notes that a session's client has acknowledged something.
func (a *admission) start(s *session) { a.notFresh(s, stateStarted) }

func (a *admission) notFresh(s *session, next sessionState) {
	if s.state == stateFresh {
		a.fresh.Remove(s.at)
		s.at, s.state = nil, next
	}
}

// end gives a session's place back. It returns the session to run in it, or nil.
func (a *admission) end(now time.Time, s *session) *session {
	a.notFresh(s, stateEnded)
	s.state = stateEnded
	delete(a.running, s.client)
	a.forget(now)
	if a.queue.Len() == 0 || len(a.running) >= a.places {
		return nil
	}
	next := a.unqueue()
	a.run(now, next)
	return next
}

// makeRoom tells the oldest session that has not started to give way.
func (a *admission) makeRoom(now time.Time) {
	if e := a.fresh.Front(); e != nil && now.Sub(e.Value.(*session).since) >= minChance {
		s := e.Value.(*session)
		a.notFresh(s, stateEvicted)
		s.wake()
	}
}

// forget drops the longest waiting requests, if their clients have given up.
func (a *admission) forget(now time.Time) {
	for a.queue.Len() > 0 && now.Sub(a.queue.Front().Value.(*session).asked) > maxPatience {
		a.unqueue()
	}
}

// unqueue takes the longest waiting session out of the queue.
func (a *admission) unqueue() *session {
	s := a.queue.Remove(a.queue.Front()).(*session)
	s.at = nil
	delete(a.waiting, s.client)
	return s
}
