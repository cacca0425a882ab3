package forward

import (
	"context"
	"fmt"
	"os"
	"testing"

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
