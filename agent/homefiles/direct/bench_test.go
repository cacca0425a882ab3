package direct_test

import (
	"io"
	"testing"
)

// BenchmarkStream is what mount and keeper can say to each other in a second.
func BenchmarkStream(b *testing.B) {
	x, y := pair(b)
	mount, keeper := newIdentity(b), newIdentity(b)
	c, s := shake(b.Context(), x, y, mount, keeper, keeper.Key, mount.Key)
	if c.err != nil || s.err != nil {
		b.Fatal(c.err, s.err)
	}
	buf := make([]byte, 1<<20)
	go func() {
		for {
			if _, err := s.Write(buf); err != nil {
				return
			}
		}
	}()
	got := make([]byte, 1<<20)
	b.SetBytes(1 << 20)
	for b.Loop() {
		if _, err := io.ReadFull(c, got); err != nil {
			b.Fatal(err)
		}
	}
	c.Close()
}
