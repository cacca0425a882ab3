package image

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// unzstd unpacks one zstd frame at the beginning of data and says how long it
// is: by the block headers of RFC 8878, for decoders do not tell.
func unzstd(t *testing.T, data []byte) (plain []byte, n int) {
	t.Helper()
	var h zstd.Header
	if err := h.Decode(data); err != nil {
		t.Fatalf("what follows in the archive is no zstd frame: %v", err)
	}
	n = h.HeaderSize
	for last := false; !last; {
		b := binary.LittleEndian.Uint32(append(bytes.Clone(data[n:n+3]), 0))
		size := int(b >> 3)
		if b>>1&3 == 1 { // one byte, repeated
			size = 1
		}
		n += 3 + size
		last = b&1 == 1
	}
	if h.HasCheckSum {
		n += 4
	}
	d, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if plain, err = d.DecodeAll(data[:n], nil); err != nil {
		t.Fatal(err)
	}
	return plain, n
}
