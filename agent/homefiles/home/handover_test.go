package home

import (
	"bufio"
	"errors"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"mosimg/agent/homefiles/link"
	"mosimg/agent/homefiles/wire"
)

// capsuleWith makes a server with a capsule in epoch 1 at node 2, which has a session,
// and of which epoch 2 is prepared.
func capsuleWith(ss *session) *Server {
	s := &Server{log: slog.New(slog.DiscardHandler), capsules: make(map[string]*capsule)}
	s.locks.init()
	c := &capsule{
		Capsule: Capsule{ID: "j", Node: 2, Epoch: 1}, next: &placement{2, 3},
		sessions: map[uint64]*session{1: ss}, reclaimed: make(map[uint64]uint64),
	}
	s.capsules["j"] = c
	ss.srv, ss.cap, ss.idle.L = s, c, &ss.mu
	ss.link = link.New(0, func(h wire.Header, b *link.Buf) { ss.take(nil, h, b) })
	return s
}

// A Commit whose answer was waited for too long is asked again while the first is still
// at it: the home's disk is slow. Its answer must mean what that of the first means, that
// nothing the old node asks happens any more.
func TestCommitAgainWaitsForTheFirst(t *testing.T) {
	ss := &session{busy: 1}
	s := capsuleWith(ss)
	answers := make(chan error, 2)
	for range 2 {
		go func() { answers <- s.Commit("j", 2, nil) }()
	}
	select {
	case err := <-answers:
		t.Fatalf("Commit is answered (%v) while a request of the old epoch is under way", err)
	case <-time.After(100 * time.Millisecond):
	}
	ss.finish()
	for range 2 {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
}

func getattr() (wire.Header, *link.Buf) {
	const size = 64
	h := wire.InHeader{Len: size, Opcode: wire.OpGetattr, Unique: 7, NodeID: wire.RootID}
	buf := link.NewBuf(size)
	clear(buf.B)
	copy(buf.B, wire.Bytes(&h))
	return wire.Header{Kind: wire.KindRequest, Length: size}, buf
}

// A request that is being taken at the very moment of a Commit is done after Reclaim: it
// was acknowledged, so the node will not send it again, and its program would wait for ever.
func TestHoldLosesNoRequest(t *testing.T) {
	ss := &session{}
	capsuleWith(ss)
	ss.hold()
	h, buf := getattr()
	ss.begun(nil, h, buf) // take has looked before hold
	if len(ss.parked) != 1 {
		t.Fatalf("%d requests are kept; want 1", len(ss.parked))
	}
}

// What a node sends while it is held up must not fill the home's memory.
func TestHoldKeepsOnlySoMuch(t *testing.T) {
	ss := &session{}
	capsuleWith(ss)
	ss.hold()
	near, far := net.Pipe()
	defer far.Close()
	go ss.link.Attach(near, bufio.NewReader(near), func(uint64) []byte { return []byte("welcome") }, 0) //nolint:errcheck // it always fails
	if _, err := far.Read(make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	kept := func() int {
		ss.mu.Lock()
		defer ss.mu.Unlock()
		return ss.parkedBytes
	}
	for kept() <= maxParked {
		ss.take(nil, wire.Header{Kind: wire.KindRequest}, link.NewBuf(1<<20))
	}
	far.SetReadDeadline(time.Now().Add(5 * time.Second))
	for {
		if _, err := far.Read(make([]byte, 1<<10)); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Error("the connection is not cut")
			}
			return
		}
	}
}
