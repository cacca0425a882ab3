package limit

import (
	"strconv"
	"testing"
	"time"
)

func TestLimiter(t *testing.T) {
	now := time.Unix(1000, 0)
	l := New(2, 3, 10)
	for i := range 3 {
		if !l.Allow("a", now) {
			t.Fatalf("request %d of the burst was refused", i)
		}
	}
	if l.Allow("a", now) {
		t.Error("a request beyond the burst passed")
	}
	if !l.Allow("b", now) {
		t.Error("another sender paid for it")
	}
	if !l.Allow("a", now.Add(600*time.Millisecond)) {
		t.Error("no token after 0.6 s at 2 a second")
	}
	if l.Allow("a", now.Add(-time.Hour)) {
		t.Error("a clock that went back gave tokens")
	}
}

// A sender that invents addresses must not fill the head's memory.
func TestLimiterForgets(t *testing.T) {
	l := New(1, 1, 10)
	for i := range 1000 {
		l.Allow(strconv.Itoa(i), time.Unix(0, 0))
	}
	if n := len(l.buckets); n > 10 {
		t.Errorf("remembers %d keys; want at most 10", n)
	}
}
