package link

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"mosimg/agent/homefiles/wire"
)

// connected gives two links that have a connection until the test ends.
func connected(t *testing.T, a, b *Link) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { join(a, b, func(net.Conn) {}) })
	t.Cleanup(func() {
		a.Close()
		b.Close()
		wg.Wait()
	})
}

// A handle that waits, for a disk or for ever, holds up no frame behind it.
func TestSlowHandleHoldsUpNothing(t *testing.T) {
	const n = 20
	release := make(chan struct{})
	others := make(chan struct{})
	b := NewWith(0, func(read func(Handle)) {
		read(func(_ wire.Header, body *Buf, _ bool) {
			i := binary.LittleEndian.Uint32(body.B)
			body.Free()
			switch {
			case i == n-1:
				close(others)
			case i%3 == 0:
				<-release
			}
		})
	})
	a := New(0, func(_ wire.Header, body *Buf) { body.Free() })
	connected(t, a, b)
	for i := range uint32(n) {
		m := message(i, 10)
		if err := a.Send(wire.KindRequest, 0, m.B, m); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-others:
	case <-time.After(30 * time.Second):
		t.Error("a handle that waits holds up the others")
	}
	close(release)
}

// Whichever goroutine reads, handles begin in order and each frame has one, on
// connections that fail meanwhile, too.
func TestReadersTakeTurns(t *testing.T) {
	const n = 400
	var mu sync.Mutex
	next, done := uint32(0), make(chan struct{})
	b := NewWith(0, func(read func(Handle)) {
		read(func(_ wire.Header, body *Buf, _ bool) {
			mu.Lock()
			i := binary.LittleEndian.Uint32(body.B)
			body.Free()
			if i != next {
				t.Errorf("message %d begins; want %d", i, next)
			}
			if next++; next == n {
				close(done)
			}
			mu.Unlock()
			if i%10 == 0 {
				time.Sleep(3 * Patience)
			}
		})
	})
	a := New(0, func(_ wire.Header, body *Buf) { body.Free() })
	defer a.Close()
	defer b.Close()
	go func() {
		for i := range uint32(n) {
			m := message(i, 100)
			if err := a.Send(wire.KindRequest, 0, m.B, m); err != nil {
				return
			}
		}
	}()
	rnd := rand.New(rand.NewPCG(1, 2))
	for {
		select {
		case <-done:
			return
		default:
		}
		join(a, b, func(c net.Conn) {
			go func() {
				select {
				case <-done:
				case <-time.After(time.Duration(10+rnd.IntN(100)) * time.Millisecond):
				}
				c.Close()
			}()
		})
	}
}
