package upgrade_test

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"mosimg/internal/upgrade"
)

// A connection that another process was given ends with HangUp; with Close it would go on.
func TestHangUp(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	far, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	ours, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	file, err := ours.(*net.TCPConn).File() // as the other process has it
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	theirs, err := net.FileConn(file)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	for range 2 { // the second time there is nothing left to end
		if err := upgrade.HangUp(ours); err != nil {
			t.Errorf("HangUp: %v", err)
		}
	}
	for who, c := range map[string]net.Conn{"the peer": far, "the other process": theirs} {
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("%s reads %v; want io.EOF", who, err)
		}
	}
	a, b := net.Pipe()
	if err := upgrade.HangUp(a); err != nil {
		t.Errorf("a connection inside this process: %v", err)
	}
	if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("its peer reads %v; want io.EOF", err)
	}
	if _, err := upgrade.BareOf(b); err == nil {
		t.Error("a pipe inside this process can be handed to another")
	}
}
