package tftpd

import (
	"strconv"
	"time"
)

const (
	// defaultBlock is the size of blocks of which nothing was said (RFC 1350).
	defaultBlock = 512
	// minBlock is the smallest that may be asked for (RFC 2348).
	minBlock = 8
	// maxWindow is the largest window that is granted: 64 blocks are 94 KB,
	// with which a link of 1 Gbit/s and 1 ms is nearly full, and as much as
	// the receive buffer of a Linux client holds.
	maxWindow = 64
	// defaultTimeout is the first wait for an ACK. One lost packet costs a
	// second and not five.
	defaultTimeout = time.Second
	// maxTimeout is the longest that a client may ask for (RFC 2349 allows
	// 255 s): a client that is gone keeps its place for a multiple of it.
	maxTimeout = 5
)

// terms are what a transfer has been agreed on.
type terms struct {
	block   int           // bytes in a DATA packet
	window  int           // DATA packets for each ACK
	timeout time.Duration // first wait for an ACK
	answer  []option      // of the OACK, in the order asked; none: no OACK
}

// negotiate answers a client's options (RFC 2347): blksize (2348) up to
// maxBlock, tsize and timeout (2349), windowsize (7440) up to maxWindow. What
// is unknown, twice there or not a number in range is left out of the answer,
// as those RFCs have it.
func negotiate(asked []option, size int64, maxBlock int) terms {
	t := terms{block: defaultBlock, window: 1, timeout: defaultTimeout}
	seen := map[string]bool{}
	for _, o := range asked {
		v, err := strconv.ParseInt(o.value, 10, 64)
		if err != nil || v < 0 || seen[o.name] {
			continue
		}
		switch {
		case o.name == "blksize" && v >= minBlock && v <= 65464:
			t.block = int(min(v, int64(maxBlock)))
			v = int64(t.block)
		case o.name == "tsize":
			v = size
		case o.name == "timeout" && v >= 1 && v <= maxTimeout:
			t.timeout = time.Duration(v) * time.Second
		case o.name == "windowsize" && v >= 1 && v <= 65535:
			t.window = int(min(v, maxWindow))
			v = int64(t.window)
		default:
			continue
		}
		seen[o.name] = true
		t.answer = append(t.answer, option{o.name, strconv.FormatInt(v, 10)})
	}
	return t
}
