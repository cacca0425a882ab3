package zstdframe

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// packed is a frame of n bytes that do not compress.
func packed(n int) []byte {
	r := rand.NewChaCha8([32]byte{})
	data := make([]byte, n)
	r.Read(data)
	e, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	defer e.Close()
	return e.EncodeAll(data, nil)
}

func FuzzLength(f *testing.F) {
	f.Add(packed(5))
	f.Add(slices.Concat(packed(200000), []byte("rest")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n := Length(b); n < 0 || n > len(b) {
			t.Errorf("Length = %d of %d", n, len(b))
		}
	})
}

func TestEndsWhereTheFrameDoes(t *testing.T) {
	for _, n := range []int{1, 1000, 300_000} {
		frame := packed(n)
		if got := Length(append(slices.Clone(frame), "tail"...)); got != len(frame) {
			t.Errorf("Length of a frame of %d bytes = %d; want %d", n, got, len(frame))
		}
	}
	if got := Length([]byte("no frame")); got != 0 {
		t.Errorf("Length of something else = %d; want 0", got)
	}
}
