package forward

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
	"mosimg/internal/fault"
)

// Pages of mapped files that a job has changed are in the node's cache until the
// kernel writes them. Nothing makes it do so, and tells when it is done, for a
// whole FUSE mount: syncfs(2) returns before the writes have (Linux 6.12), or
// before they are even begun (6.18). fsync(2) keeps its promise, and only files
// that are open for writing can have such pages: a mapping keeps its file open.
// So the agent syncs each of these, which a Control names to it. What that asks of
// us is about the node's cache alone, and is answered here.

// Control is what may be asked of a forwarder that runs.
type Control struct{ f *forwarder }

// Writers gives the inodes that are open for writing, and lets one thread of
// this machine sync them: until done is called, what it opens is not opened at home.
func (c Control) Writers(tid uint32) (inodes []uint64, done func()) {
	f := c.f
	f.mu.Lock()
	defer f.mu.Unlock()
	f.syncers[tid]++
	nodes := make(map[uint64]bool)
	for _, node := range f.writers {
		nodes[node] = true
	}
	return slices.Sorted(maps.Keys(nodes)), func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.syncers[tid]--; f.syncers[tid] == 0 {
			delete(f.syncers, tid)
		}
	}
}

// drainStep is how often Drain looks.
const drainStep = 5 * time.Millisecond

// Drain waits until no write is left that was answered before the home did it. Its
// error says that one was lost.
func (c Control) Drain(ctx context.Context) error {
	f := c.f
	for {
		f.mu.Lock()
		left, lost, over := len(f.early)+len(f.held), len(f.lost), f.over
		f.mu.Unlock()
		switch {
		case lost > 0:
			return fault.New(fault.Environment, "write back", "home files", "the home could not write pages that were changed during a cut", "")
		case over:
			return fault.New(fault.Unavailable, "write back", "home files", "the mount is over", "")
		case left == 0:
			return nil
		}
		select {
		case <-ctx.Done():
			return fault.New(fault.Unavailable, "write back", "home files", fmt.Errorf("%d writes are not at home: %w", left, ctx.Err()), "")
		case <-time.After(drainStep):
		}
	}
}

// syncHandle is the handle of all files that are open for syncing only. The home's
// count from 1.
const syncHandle = 1 << 63

// syncing answers what comes of Writers. It reports whether it has.
func (f *forwarder) syncing(h wire.InHeader, body []byte) bool {
	var out []byte
	switch h.Opcode {
	case wire.OpOpen:
		f.mu.Lock()
		ours := f.syncers[h.PID] > 0
		f.mu.Unlock()
		if !ours {
			return false
		}
		out = wire.Bytes(&wire.OpenOut{FH: syncHandle, OpenFlags: wire.FopenKeepCache})
	case wire.OpFsync, wire.OpFlush, wire.OpRelease: // each begins with the handle
		if in, _, ok := wire.As[wire.FsyncIn](body); !ok || in.FH != syncHandle {
			return false
		}
	default:
		return false
	}
	f.writeKernel(wire.Reply(h.Unique, 0, out))
	return true
}

// forWriting tells whether a request opens a file for writing.
func forWriting(op wire.Opcode, body []byte) bool {
	var flags uint32
	switch op {
	case wire.OpOpen:
		if in, _, ok := wire.As[wire.OpenIn](body); ok {
			flags = in.Flags
		}
	case wire.OpCreate, wire.OpTmpfile:
		if in, _, ok := wire.As[wire.CreateIn](body); ok {
			flags = in.Flags
		}
	}
	return flags&unix.O_ACCMODE != unix.O_RDONLY
}

// noteWriter takes the reply to a request of forWriting. mu is held.
func (f *forwarder) noteWriter(h wire.InHeader, body []byte) {
	node := h.NodeID
	if h.Opcode != wire.OpOpen {
		e, rest, ok := wire.As[wire.EntryOut](body)
		if !ok {
			return
		}
		node, body = e.NodeID, rest
	}
	if o, _, ok := wire.As[wire.OpenOut](body); ok && o.OpenFlags&wire.FopenDirectIO == 0 {
		f.writers[o.FH] = node
	}
}

// noteRelease takes a RELEASE.
func (f *forwarder) noteRelease(body []byte) {
	if in, _, ok := wire.As[wire.ReleaseIn](body); ok {
		f.mu.Lock()
		delete(f.writers, in.FH)
		f.mu.Unlock()
	}
}
