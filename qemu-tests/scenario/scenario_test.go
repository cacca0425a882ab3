package scenario

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"mosimg/internal/fault"
	"mosimg/qemu-tests/lab"
)

// closeTime is kept back from the test's deadline for switching off and for
// telling what happened.
const closeTime = 30 * time.Second

// TestScenarios plays every scenario in one lab: boots are slow without KVM.
func TestScenarios(t *testing.T) {
	images := os.Getenv("MOSIMG_IMAGES")
	if os.Getenv("MOSIMG_VM") != "1" || images == "" {
		t.Skip("boots virtual machines: set MOSIMG_VM=1 and MOSIMG_IMAGES=DIR (an image set from mosimg build)")
	}
	ctx := t.Context()
	if end, ok := t.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, end.Add(-closeTime))
		defer cancel()
	}
	lb, err := lab.New(lab.Config{Images: images, Nodes: Machines()}, testLog{t}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var first error
	defer func() {
		if kept := lb.Close(first); kept != "" {
			t.Logf("consoles, capture and command lines are in %s", kept)
		}
	}()
	for _, s := range All() {
		t.Run(s.Name, func(t *testing.T) {
			r := &Run{Lab: lb, Out: testLog{t}}
			err := r.Play(ctx, s)
			var table strings.Builder
			r.Table(&table)
			t.Log("\n" + table.String())
			if err != nil {
				if first == nil {
					first = err
				}
				t.Error(err)
			}
		})
	}
}

// testLog writes into a test's log.
type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

func TestFindNamesAllScenarios(t *testing.T) {
	_, err := Find("bios")
	if fault.KindOf(err) != fault.Usage {
		t.Fatalf("Find = %v; want a usage fault", err)
	}
	for _, s := range All() {
		if !strings.Contains(err.Error(), s.Name) {
			t.Errorf("Find does not mention %s: %v", s.Name, err)
		}
		if found, err := Find(s.Name); err != nil || found.Name != s.Name {
			t.Errorf("Find(%q) = %v, %v", s.Name, found.Name, err)
		}
	}
}
