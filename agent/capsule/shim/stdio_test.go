package shim

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
)

// `mosrun yes | head -1` must end: a job whose reader is gone gets EPIPE, also
// if it has filled all that the shim keeps, and gets it after a move too.
func TestOutputNobodyReads(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	o := newOutStream(r, outState{})
	w.SetWriteDeadline(time.Now().Add(time.Second / 5))
	written, err := w.Write(make([]byte, 4*outBuffer)) // fills shim and pipe
	if err == nil || written < outBuffer {
		t.Fatalf("wrote %d bytes, %v; want a job that waits after %d", written, err, outBuffer)
	}
	agent, shim := net.Pipe()
	defer agent.Close()
	go o.serve(shim, 0)
	got := make(chan int, 1)
	go func() {
		n := 0
		for {
			data, err := readFrame(agent)
			if err != nil || len(data) == 0 {
				got <- n
				return
			}
			n += len(data)
		}
	}()
	if _, err := agent.Write(binary.BigEndian.AppendUint64(nil, control.Closed)); err != nil {
		t.Fatal(err)
	}
	select {
	case n := <-got:
		if n < outBuffer || n > written {
			t.Errorf("%d bytes before the end of the stream; want %d to %d", n, outBuffer, written)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the stream does not end")
	}
	w.SetWriteDeadline(time.Now().Add(5 * time.Second))
	if _, err := w.Write([]byte("x")); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the job's next write: %v; want EPIPE", err)
	}
	st, err := o.drain()
	if err != nil || !st.EOF {
		t.Fatalf("what travels: EOF %t, %v; want the end of the stream", st.EOF, err)
	}
	p, err := newPipes(streamState{Stdout: st})
	if err != nil {
		t.Fatal(err)
	}
	defer p.closeJobEnds()
	defer p.closeOurEnds()
	newOutStream(p.stdout, st)
	if _, err := unix.Write(p.job[1], []byte("x")); err != unix.EPIPE {
		t.Errorf("the job's next write after a move: %v; want EPIPE", err)
	}
}
