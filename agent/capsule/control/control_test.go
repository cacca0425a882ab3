package control

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

// Messages may be large, and descriptors belong to the message they came with.
func TestMessagesKeepTheirFiles(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	big := Request{Verb: Start, Spec: &Spec{Argv: []string{"x"}, Env: []string{strings.Repeat("e", 1<<20)}}}
	sent := make(chan error, 1)
	go func() {
		err := Send(a, big)
		err = errors.Join(err, Send(a, Request{Verb: Dump}, w))
		sent <- errors.Join(err, w.Close())
	}()
	var got Request
	files, err := Receive(b, &got)
	if diff := cmp.Diff(big, got); err != nil || len(files) != 0 || diff != "" {
		t.Fatalf("first message: %d files, %v, %.200s", len(files), err, diff)
	}
	got = Request{}
	files, err = Receive(b, &got)
	if err != nil || len(files) != 1 || got.Verb != Dump {
		t.Fatalf("second message: %+v, %d files, %v", got, len(files), err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	io.WriteString(files[0], "through")
	files[0].Close()
	if data, _ := io.ReadAll(r); string(data) != "through" {
		t.Errorf("the passed descriptor carried %q", data)
	}
}

// An agent must not be made to allocate what a broken shim names.
func TestOversizeMessage(t *testing.T) {
	a, b := pair(t)
	a.Write([]byte{0xff, 0xff, 0xff, 0xff})
	if _, err := Receive(b, new(Request)); err == nil || !strings.Contains(err.Error(), "the most") {
		t.Errorf("Receive = %v; want a refusal", err)
	}
}

func TestErrorsKeepKindAndErrno(t *testing.T) {
	// It may be passed on.
	err := FromError(FromError(fault.New(fault.NotFound, "run", "x", fmt.Errorf("exec: %w", unix.ENOENT), "")).Err()).Err()
	if fault.KindOf(err) != fault.NotFound || !errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPERM) || !strings.HasPrefix(err.Error(), "run x: ") {
		t.Errorf("%v: kind %d", err, fault.KindOf(err))
	}
	if FromError(nil).Err() != nil {
		t.Error("no error became one")
	}
}

func FuzzReceive(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, b := pair(t)
		go func() { a.Write(data); a.Close() }()
		for {
			if _, err := Receive(b, new(Request)); err != nil {
				return
			}
		}
	})
}
