package forward

import (
	"bytes"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
)

// Before the first write to a file the kernel asks whether it has capabilities
// that the write must take away (security_inode_need_killpriv): for each small
// file a round trip, one in six of what tar needs. A file that was just made
// here, and was not there before, has none, so we answer that ourselves. It says
// nothing about what comes later: the answer holds until this node sets an
// attribute, the file is closed, or madeTime is over, which is as long as a
// node may keep what it knows of a file (home's attrTTL). And whatever is
// answered, a write takes capabilities away: the home's kernel sees to it.

const madeTime = time.Second

var capsName = []byte("security.capability\x00")

// makes tells whether a request, if it succeeds, has made a file.
func makes(op wire.Opcode, body []byte) bool {
	in, _, ok := wire.As[wire.CreateIn](body)
	return ok && op == wire.OpCreate && in.Flags&unix.O_EXCL != 0
}

// noteMade takes the reply to a request that makes. mu is held.
func (f *forwarder) noteMade(body []byte) {
	if e, _, ok := wire.As[wire.EntryOut](body); ok {
		f.made[e.NodeID] = time.Now()
	}
}

// hasNoCaps tells whether a request asks for the capabilities of a file that
// has none because it was just made. It sees all requests, and forgets files
// of which that may not be so any more.
func (f *forwarder) hasNoCaps(h wire.InHeader, body []byte) bool {
	switch h.Opcode {
	case wire.OpGetxattr:
		in, name, ok := wire.As[wire.GetxattrIn](body)
		// The kernel asks for the size only.
		if !ok || in.Size != 0 || !bytes.Equal(name, capsName) {
			return false
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		since, ok := f.made[h.NodeID]
		return ok && time.Since(since) < madeTime
	case wire.OpSetxattr, wire.OpRelease:
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.made, h.NodeID)
	}
	return false
}
