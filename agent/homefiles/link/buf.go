package link

import "sync"

// Buf is a piece of memory for one message, taken from and given back to a
// pool: a gigabyte read through the mount is a thousand messages of one MiB,
// which the collector would otherwise have to clear and find again.
type Buf struct {
	B     []byte
	class int
}

// Size classes: most requests and replies, directory listings and odd reads,
// and whole reads and writes with their headers.
var classes = [...]int{4 << 10, 136 << 10, 1<<20 + 64<<10}

var pools [len(classes)]sync.Pool

// NewBuf gives a Buf whose B has n bytes of any content. More than the
// largest class is allocated and not pooled.
func NewBuf(n int) *Buf {
	for i, size := range classes {
		if n <= size {
			if b, ok := pools[i].Get().(*Buf); ok {
				b.B = b.B[:n]
				return b
			}
			return &Buf{B: make([]byte, n, size), class: i}
		}
	}
	return &Buf{B: make([]byte, n), class: -1}
}

// Free gives the Buf back; nobody may use it or its B any more. nil is fine.
func (b *Buf) Free() {
	if b == nil || b.class < 0 {
		return
	}
	pools[b.class].Put(b)
}
