package movebench

import (
	"testing"
	"time"
)

// The pause that counts is that of the move, not one that the scheduler made.
func TestFindPause(t *testing.T) {
	const text = "ready\n1000 90000\n200000 500000\n600000 700"
	for within, want := range map[int64]time.Duration{300000: 300 * time.Millisecond, 100: 0, 650000: 0} {
		if got, ok := findPause(text, within); got != want || ok != (want > 0) {
			t.Errorf("findPause(%d) = %v, %v; want %v", within, got, ok, want)
		}
	}
}
