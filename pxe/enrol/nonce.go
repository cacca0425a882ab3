package enrol

import (
	"crypto/rand"
	"encoding/base64"
)

// newNonce makes a boot nonce: 128 random bits in letters that need no quoting
// on a kernel command line. crypto/rand does not fail on Linux.
func newNonce() string {
	b := make([]byte, 16)
	rand.Read(b)
	return base64.RawURLEncoding.EncodeToString(b)
}
