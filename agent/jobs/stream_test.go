package jobs_test

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"strconv"
	"testing"
	"time"

	"mosimg/internal/fault"
)

var seeds = flag.Int("seeds", 6, "how many random histories")

// text is what a user types: lines, each another one.
func text(rng *rand.Rand, size int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < size; i++ {
		fmt.Fprintf(&b, "%d %x\n", i, rng.Uint64())
	}
	return b.Bytes()
}

func differ(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	at := 0
	for at < min(len(got), len(want)) && got[at] == want[at] {
		at++
	}
	t.Errorf("%s: %d bytes, want %d; they differ from byte %d on: %.60q, want %.60q", what, len(got), len(want), at, got[at:], want[at:])
}

// Whatever breaks and wherever the job is, its user sees each byte once, in
// order, and so does the job.
func TestNothingIsLostOrDoubled(t *testing.T) {
	for seed := range uint64(*seeds) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed, 0))
			f := newFleet(t)
			f.cut = cuts(seed, 200_000)
			h := newHome(t, f)
			id := h.run(request())
			m := h.attach(id, proxy(t, h.socket, cuts(seed+100, 800_000)))
			input := text(rng, 400_000)
			steps := 6 + rng.IntN(6)
			go func() {
				for rest := input; len(rest) > 0; {
					n := min(len(rest), 1+rng.IntN(len(input)/20))
					if _, err := m.stdin.Write(rest[:n]); err != nil {
						t.Error(err)
						return
					}
					rest = rest[n:]
					time.Sleep(time.Duration(n) * 2 * time.Microsecond)
				}
				m.stdin.Close()
			}()
			moves := rand.New(rand.NewPCG(seed, 2))
			for range steps {
				time.Sleep(time.Duration(moves.IntN(60)) * time.Millisecond)
				if moves.IntN(4) == 0 {
					h.stop()
					time.Sleep(time.Duration(moves.IntN(50)) * time.Millisecond)
					h.start()
					continue
				}
				_, err := h.agent().Move(t.Context(), id, strconv.Itoa(1+moves.IntN(3)))
				if err != nil && fault.KindOf(err) != fault.Refused && fault.KindOf(err) != fault.NotFound {
					t.Error(err)
				}
			}
			res, stdout, stderr := m.wait()
			if res.Exit != 3 || res.Lost != "" || res.Stdout != nil || res.Stderr != nil {
				t.Errorf("the job ended as %+v", res)
			}
			differ(t, "stdout", stdout, input)
			differ(t, "stderr", stderr, bytes.Repeat([]byte("."), bytes.Count(input, []byte("\n"))))
			until(t, "the job is forgotten", func() bool {
				list, err := h.agent().List(t.Context())
				return err == nil && len(list.Jobs) == 0
			})
			f.mu.Lock()
			defer f.mu.Unlock()
			if len(f.copies) != 0 {
				t.Errorf("%d copies are left", len(f.copies))
			}
		})
	}
}
