// Package limit bounds how often one sender is served, so that a machine that
// asks in a loop cannot take the head away from the others.
package limit

import (
	"sync"
	"time"
)

// Limiter is a token bucket for each key. The zero value lets nothing pass;
// use New. It may be used concurrently.
type Limiter struct {
	rate  float64 // tokens a second
	burst float64
	keys  int

	// mu guards the following.
	mu      sync.Mutex
	buckets map[string]bucket
}

type bucket struct {
	tokens float64
	at     time.Time
}

// New makes a limiter: each key may do burst things at once and rate a second
// in the long run. It remembers at most keys keys; when more are active it
// forgets all of them, which errs on the side of service.
func New(rate float64, burst, keys int) *Limiter {
	return &Limiter{rate: rate, burst: float64(burst), keys: keys, buckets: map[string]bucket{}}
}

// Allow takes a token of key, if there is one.
func (l *Limiter) Allow(key string, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.buckets[key]
	if !ok {
		if len(l.buckets) >= l.keys {
			l.forget(now)
		}
		b = bucket{tokens: l.burst, at: now}
	}
	if d := now.Sub(b.at).Seconds(); d > 0 {
		b.tokens = min(l.burst, b.tokens+d*l.rate)
	}
	b.at = now
	pass := b.tokens >= 1
	if pass {
		b.tokens--
	}
	l.buckets[key] = b
	return pass
}

// forget drops the keys whose buckets have filled up again, or all.
func (l *Limiter) forget(now time.Time) {
	for k, b := range l.buckets {
		if b.tokens+now.Sub(b.at).Seconds()*l.rate >= l.burst {
			delete(l.buckets, k)
		}
	}
	if len(l.buckets) >= l.keys {
		clear(l.buckets)
	}
}
