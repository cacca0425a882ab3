package link

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"mosimg/agent/homefiles/wire"
)

// receiver checks that frames come once each and in order.
type receiver struct {
	t    *testing.T
	mu   sync.Mutex
	next uint32
	done chan struct{}
	want uint32
}

func (r *receiver) handle(h wire.Header, b *Buf) {
	r.mu.Lock()
	defer r.mu.Unlock()
	got := binary.LittleEndian.Uint32(b.B)
	if got != r.next {
		r.t.Errorf("message %d arrived; want %d", got, r.next)
	}
	for _, c := range b.B[4:] {
		if c != byte(got) {
			r.t.Errorf("message %d has other bytes", got)
			break
		}
	}
	b.Free()
	if r.next++; r.next == r.want {
		close(r.done)
	}
}

func message(i uint32, size int) *Buf {
	b := NewBuf(4 + size)
	binary.LittleEndian.PutUint32(b.B, i)
	copy(b.B[4:], bytes.Repeat([]byte{byte(i)}, size))
	return b
}

// join connects two links until either side fails, as a greeting would.
func join(a, b *Link, cut func(net.Conn)) {
	ca, cb := net.Pipe()
	cut(ca)
	ra, rb := a.Rx(), b.Rx()
	var wg sync.WaitGroup
	wg.Go(func() { a.Attach(ca, bufio.NewReader(ca), nil, rb) })
	wg.Go(func() { b.Attach(cb, bufio.NewReader(cb), nil, ra) })
	wg.Wait()
}

// However often the connection fails, and wherever in a frame, each message
// arrives once.
func TestEachMessageArrivesOnceOverManyConnections(t *testing.T) {
	const n = 3000
	rnd := rand.New(rand.NewPCG(1, 2))
	left := &receiver{t: t, done: make(chan struct{}), want: n}
	right := &receiver{t: t, done: make(chan struct{}), want: n}
	a, b := New(64<<10, left.handle), New(0, right.handle)
	for _, l := range []*Link{a, b} {
		seed := rnd.Uint64()
		go func() {
			rnd := rand.New(rand.NewPCG(seed, 0))
			for i := range uint32(n) {
				size := rnd.IntN(100)
				if i%50 == 0 {
					size = rnd.IntN(100_000)
				}
				m := message(i, size)
				if err := l.Send(wire.KindRequest, 0, m.B, m); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	finished := make(chan struct{})
	go func() { <-left.done; <-right.done; close(finished) }()
	connections := 0
	for {
		connections++
		join(a, b, func(c net.Conn) {
			limit := time.Duration(rnd.IntN(4000)) * time.Microsecond
			if connections > 200 {
				limit = time.Minute // enough of cuts
			}
			go func() {
				select {
				case <-time.After(limit):
				case <-finished:
				}
				c.Close()
			}()
		})
		select {
		case <-finished:
			t.Logf("%d connections", connections)
			a.Close()
			b.Close()
			return
		default:
		}
	}
}

func TestSendWaitsForRoomAndForClose(t *testing.T) {
	l := New(100, nil)
	l.Send(wire.KindRequest, 0, make([]byte, 101), nil)
	ended := make(chan error)
	go func() { ended <- l.Send(wire.KindRequest, 0, []byte{1}, nil) }()
	select {
	case err := <-ended:
		t.Fatalf("Send beyond the limit = %v; want it to wait", err)
	case <-time.After(20 * time.Millisecond):
	}
	l.Close()
	if err := <-ended; !errors.Is(err, ErrClosed) {
		t.Errorf("Send after Close = %v", err)
	}
}

func TestAPeerThatCountsWrongIsRefused(t *testing.T) {
	l := New(0, nil)
	a, _ := net.Pipe()
	if err := l.Attach(a, bufio.NewReader(a), nil, 5); err == nil || errors.Is(err, ErrClosed) {
		t.Errorf("a peer that has received what was never sent: %v", err)
	}
	l = New(0, func(_ wire.Header, b *Buf) { b.Free() })
	a, b := net.Pipe()
	go func() {
		var h [wire.HeaderSize]byte
		wire.Header{Kind: wire.KindRequest, Seq: 2}.Put(h[:])
		b.Write(h[:])
	}()
	if err := l.Attach(a, bufio.NewReader(a), nil, 0); err == nil {
		t.Error("a frame was left out, and nobody minds")
	}
}

func TestFenceReachesThePeer(t *testing.T) {
	a, b := New(0, nil), New(0, nil)
	ca, cb := net.Pipe()
	go a.Attach(ca, bufio.NewReader(ca), nil, 0)
	ended := make(chan error)
	go func() { ended <- b.Attach(cb, bufio.NewReader(cb), nil, 0) }()
	for {
		if _, down := a.DownSince(); !down {
			break
		}
		time.Sleep(time.Millisecond)
	}
	a.Fence()
	if err := <-ended; !errors.Is(err, ErrFenced) {
		t.Errorf("Attach of a fenced peer = %v; want ErrFenced", err)
	}
}
