package fault

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"strings"
	"syscall"
	"testing"
)

func TestErrorIsOneLineWithEverythingAUserNeeds(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{
		{New(Environment, "bind", "UDP port 67", "dnsmasq (pid 12) has it", "stop it"), "bind UDP port 67: dnsmasq (pid 12) has it (stop it)"},
		{New(Internal, "sync", "", fs.ErrClosed, ""), "sync: file already closed"},
	} {
		if got := tc.err.Error(); got != tc.want {
			t.Errorf("Error() = %q; want %q", got, tc.want)
		}
	}
}

func TestExitStatusFollowsTheKindThroughWrapping(t *testing.T) {
	wrapped := fmt.Errorf("build: %w", New(Untrusted, "verify", "InRelease", "bad signature", ""))
	for _, tc := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("plain"), 1},
		{wrapped, 7},
		{errors.Join(errors.New("first"), New(Usage, "read", "flags", "unknown", "")), 2},
	} {
		if got := ExitStatus(tc.err); got != tc.want {
			t.Errorf("ExitStatus(%v) = %d; want %d", tc.err, got, tc.want)
		}
	}
	if !errors.Is(New(Internal, "open", "x", fs.ErrNotExist, ""), fs.ErrNotExist) {
		t.Error("a fault hides its cause from errors.Is")
	}
}

func TestListTellsAllFaultsAtOnce(t *testing.T) {
	var l List
	if err := l.Err(Usage, "read", "cluster.yaml", ""); err != nil {
		t.Fatalf("empty list: Err = %v; want nil", err)
	}
	l.Add(nil)
	l.Addf("line 3: no such interface %q", "eth7")
	if got, want := l.Err(Usage, "read", "cluster.yaml", "").Error(), `read cluster.yaml: line 3: no such interface "eth7"`; got != want {
		t.Errorf("one fault: %q; want %q", got, want)
	}
	l.Add(fs.ErrPermission)
	err := l.Err(Usage, "read", "cluster.yaml", "")
	for _, want := range []string{"2 faults", "eth7", "permission"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("Err() = %q; want it to say %q", err, want)
		}
	}
	if !errors.Is(err, fs.ErrPermission) {
		t.Error("a list hides its members from errors.Is")
	}
}

// Nobody can do anything with "EOF".
func TestHungUp(t *testing.T) {
	for err, want := range map[error]string{
		io.EOF: "node 2 hung up before it had answered (EOF)",
		&net.OpError{Op: "read", Err: syscall.ECONNRESET}: "node 2 hung up before it had answered (read: connection reset by peer)",
		errors.New("no route to host"):                    "no route to host",
	} {
		if got := HungUp("node 2", err); got.Error() != want || !errors.Is(got, err) {
			t.Errorf("HungUp(%v) = %q; want %q, which wraps it", err, got, want)
		}
	}
}
