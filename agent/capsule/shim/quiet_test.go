package shim

import "testing"

// A thread that is taken for held, and is not, would go on without what CRIU
// has to know of it.
func TestTraced(t *testing.T) {
	for name, tt := range map[string]struct {
		status string
		want   bool
	}{
		"free":   {"Name:\tState: t\nState:\tS (sleeping)\nTracerPid:\t0\n", false},
		"held":   {"Name:\tx\nState:\tt (tracing stop)\nTracerPid:\t12\n", true},
		"zombie": {"Name:\tx\nState:\tZ (zombie)\nTracerPid:\t0\n", true},
		"empty":  {"", false},
	} {
		if got := traced(tt.status); got != tt.want {
			t.Errorf("%s: traced = %v; want %v", name, got, tt.want)
		}
	}
}
