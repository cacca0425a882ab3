package forward

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
	"mosimg/internal/fault"
)

func TestDyingProcessesAreFound(t *testing.T) {
	for _, tc := range []struct {
		status string
		want   bool
	}{
		{"Name:\tx\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\n", false},
		{"SigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n", true},
		{"SigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n", true},
		{"SigPnd:\t0000000000004000\nSigBlk:\t0000000000000100\n", false}, // SIGTERM pending, KILL only in another line
		{"", false},
	} {
		if got := killed(tc.status); got != tc.want {
			t.Errorf("killed(%q) = %v; want %v", tc.status, got, tc.want)
		}
	}
	for _, tc := range []struct {
		stat string
		want bool
	}{
		{"12 (sh) D 1 12 12 0 -1 4194560 1 2", false},
		{"12 (sh) D 1 12 12 0 -1 4194564 1 2", true},
		{"12 (a) 4 (b) D 1 12 12 0 -1 4194560 1 2", false},
		{"12 (sh) D", false},
		{"", false},
	} {
		if got := exiting(tc.stat); got != tc.want {
			t.Errorf("exiting(%q) = %v; want %v", tc.stat, got, tc.want)
		}
	}
	if dying(uint32(os.Getpid())) {
		t.Error("this test is said to be dying")
	}
	if got := processOf(uint32(os.Getpid())); got != uint32(os.Getpid()) {
		t.Errorf("processOf(self) = %d; want %d", got, os.Getpid())
	}
}

func TestDeviceOfTheLastMount(t *testing.T) {
	const info = `22 1 0:20 / / rw - ext4 /dev/a rw
30 22 0:31 / /mnt/home\040files rw - fuse.mosimg home rw
31 30 0:45 / /mnt/home\040files rw - fuse.mosimg home rw
short
`
	if got, ok := deviceOf(info, "/mnt/home files"); got != "0:45" || !ok {
		t.Errorf("deviceOf = %q, %v; want 0:45", got, ok)
	}
	if _, ok := deviceOf(info, "/mnt"); ok {
		t.Error("found what is not mounted")
	}
}

func TestRunRefusesBadConfig(t *testing.T) {
	for _, cfg := range []Config{
		{},
		{Capsule: fmt.Sprintf("%0200d", 1)},
	} {
		if err := Run(context.Background(), cfg); fault.KindOf(err) != fault.Usage {
			t.Errorf("Run(%+v) = %v; want a fault of kind Usage", cfg, err)
		}
	}
}

// The answer that a file has no capabilities may be given only of a file that was made
// here, just now, and that nobody can have given any since.
func TestCapabilitiesOfAFileJustMade(t *testing.T) {
	const node = 7
	request := func(in []byte, name string) []byte { return append(bytes.Clone(in), name...) }
	ask := request(wire.Bytes(&wire.GetxattrIn{}), "security.capability\x00")
	made := func() *forwarder {
		f := &forwarder{made: make(map[uint64]time.Time)}
		f.noteMade(wire.Bytes(&wire.EntryOut{NodeID: node}))
		return f
	}
	is := func(what string, f *forwarder, node uint64, body []byte, want bool) {
		t.Helper()
		if got := f.hasNoCaps(wire.InHeader{Opcode: wire.OpGetxattr, NodeID: node}, body); got != want {
			t.Errorf("%s: answered here: %v; want %v", what, got, want)
		}
	}
	is("just made", made(), node, ask, true)
	is("another file", made(), node+1, ask, false)
	is("another attribute", made(), node, request(wire.Bytes(&wire.GetxattrIn{}), "security.selinux\x00"), false)
	is("a program that reads it", made(), node, request(wire.Bytes(&wire.GetxattrIn{Size: 20}), "security.capability\x00"), false)
	is("cut short", made(), node, ask[:4], false)
	for name, op := range map[string]wire.Opcode{"an attribute was set": wire.OpSetxattr, "it was closed": wire.OpRelease} {
		f := made()
		f.hasNoCaps(wire.InHeader{Opcode: op, NodeID: node}, nil)
		is(name, f, node, ask, false)
	}
	old := made()
	old.made[node] = time.Now().Add(-madeTime)
	is("made a while ago", old, node, ask, false)

	create := func(flags uint32) []byte { return wire.Bytes(&wire.CreateIn{Flags: flags}) }
	if !makes(wire.OpCreate, create(unix.O_EXCL|unix.O_WRONLY)) || makes(wire.OpCreate, create(unix.O_WRONLY)) || makes(wire.OpOpen, create(unix.O_EXCL)) {
		t.Error("makes: want only a creation that fails if the file is there")
	}
}
