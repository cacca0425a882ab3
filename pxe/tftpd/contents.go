package tftpd

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"sync"

	"mosimg/pxe/images"
)

// keptContents is how many files are kept in memory: the loaders of an image
// set, twice.
const keptContents = 16

// contents are the bytes of boot loaders. All transfers of a file share them,
// so a thousand machines that boot at once cost the memory of one, and what
// is being sent stays as it was whatever happens to the file.
type contents struct {
	// mu guards the following.
	mu   sync.Mutex
	kept map[contentKey][]byte
}

type contentKey struct {
	sha256 string
	mode   string
}

var errChanged = errors.New("its bytes are not those of its hash any more")

// of is the content of a file as it is sent in a mode, netascii or octet.
func (c *contents) of(f *images.File, mode string) ([]byte, error) {
	key := contentKey{f.SHA256, mode}
	c.mu.Lock()
	defer c.mu.Unlock()
	if b, ok := c.kept[key]; ok {
		return b, nil
	}
	b, err := f.Bytes()
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != f.SHA256 {
		return nil, errChanged
	}
	if mode == netascii {
		b = toNetascii(b)
	}
	if c.kept == nil || len(c.kept) >= keptContents {
		c.kept = map[contentKey][]byte{}
	}
	c.kept[key] = b
	return b, nil
}

// Modes of RFC 1350. Netascii is what tftp-hpa uses unless told otherwise; a
// client that asks for it changes the bytes back.
const (
	octet    = "octet"
	netascii = "netascii"
)

// toNetascii writes LF as CR LF and CR as CR NUL (RFC 764, as RFC 1350 has it).
func toNetascii(b []byte) []byte {
	b = bytes.ReplaceAll(b, []byte{'\r'}, []byte{'\r', 0})
	return bytes.ReplaceAll(b, []byte{'\n'}, []byte{'\r', '\n'})
}
