package forward

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/link"
	"mosimg/agent/homefiles/wire"
)

// fromKernel takes one request from the kernel, and buf, in which it lies.
func (f *forwarder) fromKernel(msg []byte, buf *link.Buf) {
	h, body, err := wire.ParseRequest(msg)
	if err != nil {
		f.log.Error("home files: the kernel sends something else than FUSE", "cause", err)
		buf.Free()
		return
	}
	if f.syncing(h, body) {
		buf.Free()
		return
	}
	if f.hasNoCaps(h, body) {
		f.writeKernel(wire.Reply(h.Unique, int32(unix.ENODATA)))
		buf.Free()
		return
	}
	switch h.Opcode {
	case wire.OpDestroy:
		f.writeKernel(wire.Reply(h.Unique, 0))
		buf.Free()
		return
	case wire.OpPoll:
		// A regular file is always ready; the kernel asks once and never
		// again. It must not wait for the home: a Go program that is killed
		// in it, while it holds this very device, could not be ended.
		f.writeKernel(wire.Reply(h.Unique, int32(unix.ENOSYS)))
		buf.Free()
		return
	case wire.OpIoctl:
		// What a file system says that has none. Python asks of each file that it
		// opens whether it is a terminal: a round trip for each module.
		f.writeKernel(wire.Reply(h.Unique, int32(unix.ENOTTY)))
		buf.Free()
		return
	case wire.OpInit:
		maskInit(body)
	case wire.OpFlush:
		if f.flushIsLocal(h, body) {
			f.writeKernel(wire.Reply(h.Unique, 0))
			buf.Free()
			return
		}
	case wire.OpSetlk, wire.OpSetlkw:
		f.noteLock(h, body)
	case wire.OpRelease:
		f.noteRelease(body)
	}
	f.mu.Lock()
	if f.over {
		f.mu.Unlock()
		if hasReply(h.Opcode) {
			f.writeKernel(wire.Reply(h.Unique, int32(unix.ENOTCONN)))
		}
		buf.Free()
		return
	}
	if hasReply(h.Opcode) {
		w := &waiting{InHeader: h, writer: forWriting(h.Opcode, body), makes: makes(h.Opcode, body)}
		if in, _, ok := wire.As[wire.WriteIn](body); ok && h.Opcode == wire.OpWrite {
			w.pages = in.WriteFlags&wire.WriteCache != 0
		}
		f.waiting[h.Unique] = w
	}
	if len(f.early) > 0 || f.passing {
		f.held = append(f.held, heldBack{msg, buf})
		f.mu.Unlock()
		return
	}
	f.mu.Unlock()
	_ = f.link.Send(wire.KindRequest, 0, msg, buf) // a closed link ends Run
}

func hasReply(op wire.Opcode) bool {
	return op != wire.OpForget && op != wire.OpBatchForget && op != wire.OpInterrupt
}

// maskInit hides from the home what this process cannot carry: descriptors
// for passthrough would have to be of files on this node, and requests of an
// io_uring do not come through read.
func maskInit(body []byte) {
	in, rest, ok := wire.As[wire.InitIn](body)
	if !ok || in.Flags&uint32(wire.InitExt) == 0 {
		return
	}
	if ext, _, ok := wire.As[wire.InitExtIn](rest); ok {
		const not = wire.InitPassthrough | wire.InitOverIOUring
		ext.Flags2 &^= uint32(not >> 32)
	}
}

// flushIsLocal tells whether a FLUSH, which each close brings, is of no use to
// the home: it holds no lock of this owner. A FLUSH that is forwarded for locks
// that moved here is told who closes.
func (f *forwarder) flushIsLocal(h wire.InHeader, body []byte) bool {
	in, _, ok := wire.As[wire.FlushIn](body)
	if !ok {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	who := locker{h.NodeID, in.LockOwner}
	if f.lockers[who] {
		delete(f.lockers, who)
		return false
	}
	if !f.flush {
		return true
	}
	// Who is being killed lets go of nothing: it may be a copy that never ran
	// and whose locks go back. What has ended is told to the home by itself.
	if !dying(h.PID) {
		in.TGID = processOf(h.PID)
	}
	return false
}

func (f *forwarder) noteLock(h wire.InHeader, body []byte) {
	in, _, ok := wire.As[wire.LkIn](body)
	if !ok || in.Lk.Type == unix.F_UNLCK || in.Flags&wire.LkFlock != 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lockers[locker{h.NodeID, in.Owner}] = true
}

// fromHome takes one frame from the home, on the connection's reader.
func (f *forwarder) fromHome(h wire.Header, buf *link.Buf) {
	switch h.Kind {
	case wire.KindNotify:
		f.notes.put(buf)
		return
	case wire.KindReply:
		f.reply(h, buf)
		return
	case wire.KindPolicy:
		f.policy(buf.B)
	}
	buf.Free()
}

func (f *forwarder) policy(b []byte) {
	if len(b) < 4 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.flush = binary.LittleEndian.Uint32(b)&wire.PolicyForwardFlush != 0
	for b = b[4:]; len(b) >= 4; b = b[4:] {
		f.movedIn[binary.LittleEndian.Uint32(b)] = true
	}
}

func (f *forwarder) reply(fh wire.Header, buf *link.Buf) {
	h, body, err := wire.ParseReply(buf.B)
	if err != nil {
		f.log.Error("home files: the home sends something else than FUSE", "cause", err)
		buf.Free()
		return
	}
	f.mu.Lock()
	w := f.waiting[h.Unique]
	delete(f.waiting, h.Unique)
	if w == nil {
		f.late(h, body)
		buf.Free()
		return
	}
	if w.Opcode == wire.OpFsync && h.Error == 0 {
		if e, ok := f.lost[w.NodeID]; ok {
			delete(f.lost, w.NodeID)
			f.mu.Unlock()
			f.writeKernel(wire.Reply(h.Unique, -e))
			buf.Free()
			return
		}
	}
	if w.makes && h.Error == 0 {
		f.noteMade(body)
	}
	if w.writer && h.Error == 0 {
		f.noteWriter(w.InHeader, body)
	}
	f.mu.Unlock()
	if fh.Flags&wire.FlagAfterNotify != 0 {
		f.notes.put(buf)
		return
	}
	f.writeKernel(buf.B)
	buf.Free()
	if w.Opcode == wire.OpInit {
		f.ready.Do(f.mounted)
	}
}

func (f *forwarder) mounted() {
	if f.cfg.Mountpoint != "" {
		if err := raiseReadAhead(f.cfg.Mountpoint); err != nil {
			f.log.Info("home files: read-ahead stays at the kernel's default", "cause", err)
		}
	}
	if f.cfg.Ready != nil {
		f.cfg.Ready()
	}
}
