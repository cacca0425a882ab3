package slowlink

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// A relay that loses, reorders or hurries bytes would make both peers' figures wrong.
func TestTCP(t *testing.T) {
	const roundTrip = 40 * time.Millisecond
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // answers each connection with what it got
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	addr, err := TCP(ctx, l.Addr().String(), roundTrip)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	sent := make([]byte, 40<<20) // more than is under way at once
	for i := range sent {
		sent[i] = byte(i * i >> 8)
	}
	began := time.Now()
	go func() {
		c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
	}()
	first := make([]byte, 1)
	if _, err := io.ReadFull(c, first); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < roundTrip {
		t.Errorf("the first byte came back after %v; want %v or more", took, roundTrip)
	}
	rest, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(append(first, rest...), sent) {
		t.Errorf("%d bytes came back, equal: %v, %v; want all %d", 1+len(rest), bytes.Equal(append(first, rest...), sent), err, len(sent))
	}
	cancel()
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return // it has ended with its context
		}
		c.Close()
		if time.Now().After(until) {
			t.Fatal("the relay outlives its context")
		}
	}
}

// Each packet takes the link's time, those of one direction stay in order, and
// the answer comes back from whichever port the server gives it.
func TestUDP(t *testing.T) {
	const roundTrip = 40 * time.Millisecond
	listen := func() *net.UDPConn {
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetReadDeadline(time.Now().Add(time.Minute))
		return c
	}
	door, room, client := listen(), listen(), listen()
	addr, err := UDP(t.Context(), door.LocalAddr().String(), roundTrip, 1e9, func(p []byte) bool { return p[0] == 'R' })
	if err != nil {
		t.Fatal(err)
	}
	relay := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr))
	buf := make([]byte, 100)
	read := func(c *net.UDPConn) (string, *net.UDPAddr) {
		t.Helper()
		n, from, err := c.ReadFromUDP(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:n]), from
	}
	for range 2 {
		began := time.Now()
		client.WriteTo([]byte("R"), relay)
		text, from := read(door)
		if text != "R" {
			t.Fatalf("the server's door got %q", text)
		}
		room.WriteTo([]byte("1"), from)
		room.WriteTo([]byte("2"), from)
		for _, want := range []string{"1", "2"} {
			if got, _ := read(client); got != want {
				t.Errorf("the client got %q; want %q", got, want)
			}
		}
		if d := time.Since(began); d < roundTrip {
			t.Errorf("there and back took %v; want %v or more", d, roundTrip)
		}
		client.WriteTo([]byte("ack"), relay)
		if got, _ := read(room); got != "ack" {
			t.Errorf("the port that answered got %q", got)
		}
	}
}
