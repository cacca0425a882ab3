// Package slowlink makes links of a given delay on one machine, for
// measurements: relays of TCP streams and of UDP packets in this process,
// because not every kernel has netem. They lose nothing by themselves.
package slowlink

import (
	"context"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// TCP passes on the connections that it gets, and each byte of them half a
// round trip later than it came. It ends with ctx.
func TCP(ctx context.Context, to string, roundTrip time.Duration) (addr string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	context.AfterFunc(ctx, func() { l.Close() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer near.Close()
				far, err := net.Dial("tcp", to)
				if err != nil {
					return
				}
				defer far.Close()
				defer context.AfterFunc(ctx, func() { near.Close(); far.Close() })()
				back := make(chan struct{})
				go func() {
					defer close(back)
					delay(near.(*net.TCPConn), far.(*net.TCPConn), roundTrip/2)
				}()
				delay(far.(*net.TCPConn), near.(*net.TCPConn), roundTrip/2)
				<-back
			}()
		}
	}()
	return l.Addr().String(), nil
}

// A relay has at most inFlight pieces under way, each of up to pieceSize: more
// than the sockets of both sides hold, so it is the delay that is felt.
const (
	inFlight  = 256
	pieceSize = 64 << 10
)

type piece struct {
	due  time.Time
	data []byte
}

// delay copies one direction until it ends, and passes the end on.
func delay(dst, src *net.TCPConn, by time.Duration) {
	line := make(chan piece, inFlight)
	spare := make(chan []byte, inFlight) // buffers that can be used again
	go func() {
		defer close(line)
		for {
			var buf []byte
			select {
			case buf = <-spare:
			default:
				buf = make([]byte, pieceSize)
			}
			n, err := src.Read(buf)
			if n > 0 {
				line <- piece{time.Now().Add(by), buf[:n]}
			}
			if err != nil {
				return
			}
		}
	}()
	broken := false
	for p := range line {
		sleepUntil(p.due)
		if !broken {
			if _, err := dst.Write(p.data); err != nil {
				broken = true
				src.Close() // the reader ends, too
			}
		}
		select {
		case spare <- p.data[:pieceSize]:
		default:
		}
	}
	_ = dst.CloseWrite() // it may be gone
}

// sleepUntil sleeps in the kernel: Go's own timers are rounded to a millisecond
// when nothing else is to be done.
func sleepUntil(t time.Time) {
	if d := time.Until(t); d > 0 {
		ts := unix.NsecToTimespec(d.Nanoseconds())
		for unix.Nanosleep(&ts, &ts) == unix.EINTR { //nolint:revive // ts is what is left
		}
	}
}
