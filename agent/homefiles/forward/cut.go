package forward

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/link"
	"mosimg/agent/homefiles/wire"
	"mosimg/internal/fault"
)

// A link that is gone for less than patience is treated as a slow one.
const patience = time.Second

// guardEvery is how often a cut is looked at.
const guardEvery = 250 * time.Millisecond

// guard does in a cut what must not wait for the link, and gives up when the
// lease is over.
func (f *forwarder) guard(ctx context.Context) error {
	t := time.NewTicker(guardEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		f.watchMoved()
		since, down := f.link.DownSince()
		if !down {
			continue
		}
		switch gone := time.Since(since); {
		case gone > f.cfg.Lease:
			return fault.New(fault.Unavailable, "reach", "home", fmt.Sprintf("no link for %v", gone.Round(time.Second)),
				"the job is lost; check the network and the home's agent")
		case gone > patience:
			f.releaseDying()
			f.answerPages()
		}
	}
}

// releaseDying answers the requests of processes that are being killed. A
// process in a request waits in D state once a fatal signal is there, and all
// it can do with an answer is die. Nobody else is answered: a handled signal
// must not turn a write into EINTR when the home has, or will have, done it.
func (f *forwarder) releaseDying() {
	f.mu.Lock()
	var asks []*waiting
	for _, w := range f.waiting {
		if w.PID != 0 {
			asks = append(asks, w)
		}
	}
	f.mu.Unlock()
	for _, w := range asks {
		if !dying(w.PID) {
			continue
		}
		f.mu.Lock()
		_, still := f.waiting[w.Unique]
		if still {
			delete(f.waiting, w.Unique)
			// It is sent all the same, in its place; see late.
			f.strays[w.Unique] = w.Opcode
		}
		f.mu.Unlock()
		if still {
			f.writeKernel(wire.Reply(w.Unique, int32(unix.EINTR)))
		}
	}
}

// answerPages answers writes of dirty pages, which are safe in our queue: a
// process that ends or unmaps waits for them where no signal reaches it.
// Requests that come later are held back until the home has done these, so
// that none of them can overtake one.
func (f *forwarder) answerPages() {
	f.mu.Lock()
	type done struct {
		unique uint64
		size   uint32
	}
	var pages []done
	for u, w := range f.waiting {
		if w.pages {
			pages = append(pages, done{u, w.Len - uint32(wire.InHeaderSize+writeInSize)})
			delete(f.waiting, u)
			f.early[u] = w.NodeID
			f.strays[u] = wire.OpWrite
		}
	}
	f.mu.Unlock()
	for _, p := range pages {
		f.writeKernel(wire.Reply(p.unique, 0, wire.Bytes(&wire.WriteOut{Size: p.size})))
	}
}

const writeInSize = 40

// late takes the home's reply to a request that the kernel has an answer to
// already. What the home has opened or counted for it is given back. mu is
// held at entry and not at return.
func (f *forwarder) late(h wire.OutHeader, body []byte) {
	op, known := f.strays[h.Unique]
	delete(f.strays, h.Unique)
	var undo []heldBack
	if known && h.Error == 0 {
		undo = f.undo(op, body)
	}
	if node, was := f.early[h.Unique]; was {
		delete(f.early, h.Unique)
		if h.Error != 0 {
			f.lost[node] = h.Error
			f.log.Error("home files: a page that was written during a cut is lost", "cause", unix.Errno(-h.Error))
		}
	}
	f.held = append(f.held, undo...)
	pass := len(f.held) > 0 && len(f.early) == 0 && !f.passing
	f.passing = f.passing || pass
	f.mu.Unlock()
	if pass {
		// Not on the connection's reader: Send may wait for its
		// acknowledgements.
		go f.passHeld()
	}
}

// passHeld sends what was held back, and what is held back meanwhile so that
// it stays behind.
func (f *forwarder) passHeld() {
	for {
		f.mu.Lock()
		if len(f.held) == 0 || len(f.early) > 0 {
			f.passing = false
			f.mu.Unlock()
			return
		}
		m := f.held[0]
		f.held = f.held[1:]
		f.mu.Unlock()
		_ = f.link.Send(wire.KindRequest, 0, m.msg, m.buf) // a closed link ends Run
	}
}

// ownRequest marks the uniques of our own requests; the kernel counts its
// own from 2. Their replies have nobody waiting and are dropped.
const ownRequest = 1 << 62

// undo makes the requests that take back what a stray reply brings. mu is held.
func (f *forwarder) undo(op wire.Opcode, body []byte) []heldBack {
	var out []heldBack
	ask := func(op wire.Opcode, node uint64, body []byte) {
		f.own += 2
		h := wire.InHeader{Len: uint32(wire.InHeaderSize + len(body)), Opcode: op, Unique: ownRequest | f.own, NodeID: node}
		out = append(out, heldBack{msg: append(bytes.Clone(wire.Bytes(&h)), body...)})
	}
	release := func(op wire.Opcode, b []byte) {
		if o, _, ok := wire.As[wire.OpenOut](b); ok {
			ask(op, wire.RootID, wire.Bytes(&wire.ReleaseIn{FH: o.FH}))
		}
	}
	switch op {
	case wire.OpOpen:
		release(wire.OpRelease, body)
	case wire.OpOpendir:
		release(wire.OpReleasedir, body)
	case wire.OpLookup, wire.OpMknod, wire.OpMkdir, wire.OpSymlink, wire.OpLink, wire.OpCreate, wire.OpTmpfile:
		e, rest, ok := wire.As[wire.EntryOut](body)
		if !ok || e.NodeID == 0 {
			break
		}
		release(wire.OpRelease, rest)
		ask(wire.OpForget, e.NodeID, wire.Bytes(&wire.ForgetIn{Nlookup: 1}))
	case wire.OpReaddirplus:
		for len(body) > 0 {
			e, rest, ok := wire.As[wire.EntryOut](body)
			if !ok {
				break
			}
			d, rest, ok := wire.As[wire.Dirent](rest)
			n := 0
			if ok {
				n = int(d.Namelen+7) &^ 7
			}
			if !ok || n > len(rest) {
				break
			}
			if e.NodeID != 0 {
				ask(wire.OpForget, e.NodeID, wire.Bytes(&wire.ForgetIn{Nlookup: 1}))
			}
			body = rest[n:]
		}
	}
	return out
}

// watchMoved tells the home of processes that have ended before they used the
// locks that moved here with them. The kernel closes a dead process's files in
// a worker thread, so a FLUSH does not say whose it is.
func (f *forwarder) watchMoved() {
	f.mu.Lock()
	var gone []uint32
	for pid := range f.movedIn {
		if unix.Kill(int(pid), 0) == unix.ESRCH {
			gone = append(gone, pid)
			delete(f.movedIn, pid)
		}
	}
	f.mu.Unlock()
	for _, pid := range gone {
		b := link.NewBuf(4)
		binary.LittleEndian.PutUint32(b.B, pid)
		_ = f.link.Send(wire.KindGone, 0, b.B, b) // a closed link ends Run
	}
}

// pfExiting is PF_EXITING of include/linux/sched.h.
const pfExiting = 0x4

// dying tells whether a thread has a fatal signal pending or is ending
// already. Signals that would end it are SIGKILL by then: the kernel makes
// them so when they are sent.
func dying(tid uint32) bool {
	dir := "/proc/" + strconv.FormatUint(uint64(tid), 10)
	status, err := os.ReadFile(dir + "/status")
	if err != nil {
		return os.IsNotExist(err)
	}
	if killed(string(status)) {
		return true
	}
	stat, err := os.ReadFile(dir + "/stat")
	return err == nil && exiting(string(stat))
}

// killed finds SIGKILL among the pending signals in /proc/PID/status.
func killed(status string) bool {
	for line := range strings.Lines(status) {
		name, value, _ := strings.Cut(line, ":")
		if name != "SigPnd" && name != "ShdPnd" {
			continue
		}
		if set, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64); err == nil && set>>(unix.SIGKILL-1)&1 == 1 {
			return true
		}
	}
	return false
}

// exiting finds PF_EXITING in the flags, the ninth field of /proc/PID/stat.
func exiting(stat string) bool {
	// The name, in brackets, may hold anything.
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 7 {
		return false
	}
	flags, err := strconv.ParseUint(fields[6], 10, 64)
	return err == nil && flags&pfExiting != 0
}

// processOf is the process that a thread belongs to, or 0.
func processOf(tid uint32) uint32 {
	status, err := os.ReadFile("/proc/" + strconv.FormatUint(uint64(tid), 10) + "/status")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "Tgid:"); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(v), 10, 32) // 0 on failure
			return uint32(n)
		}
	}
	return 0
}
