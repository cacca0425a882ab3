package home

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/link"
	"mosimg/agent/homefiles/wire"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// greetTime bounds the wait for a greeting.
const greetTime = 10 * time.Second

// session is one FUSE mount of a capsule. It lives from its first greeting to
// the end of its epoch or of its capsule, over any number of connections.
type session struct {
	srv   *Server
	cap   *capsule
	id    wire.SessionID
	epoch uint64
	link  *link.Link

	mu   sync.Mutex
	idle sync.Cond // signalled when busy shrinks
	// The following is guarded by mu.
	inodes map[uint64]*inode
	byKey  map[inodeKey]*inode
	nextID uint64
	files  map[uint64]*file
	nextFH uint64
	waits  map[uint64]*waiter // by unique: lock requests that wait
	busy   int                // requests under way, waiting ones left out
	fenced bool               // no request is begun any more
	// unsettled says that the placement before this one may be taken back: what is
	// closed here may be closed by the death of a copy that never ran, and must not
	// unlock what both hold.
	unsettled bool
	// parked are frames that came while the session was held up.
	parking     bool
	parked      []parkedFrame
	parkedBytes int
	ended       bool
}

// maxParked bounds what is kept of a node whose session is held up. Its job is
// frozen, so it has little to ask.
const maxParked = 16 << 20

type parkedFrame struct {
	h   wire.Header
	buf *link.Buf
}

// request is one FUSE request under way.
type request struct {
	wire.InHeader
	body []byte
	buf  *link.Buf
}

// Serve serves one connection of a node's forwarder until it fails, its
// session ends or ctx does. peer is the node that the connection was
// authenticated as. It closes conn. nil means that the connection simply
// ended; the session goes on with the next one.
func (s *Server) Serve(ctx context.Context, conn net.Conn, peer api.NodeID) error {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	conn.SetDeadline(time.Now().Add(greetTime))
	r := bufio.NewReaderSize(conn, 64<<10)
	h, body, err := wire.ReadFrame(r, wire.MaxGreeting)
	if err != nil {
		return fmt.Errorf("greeting of node %d: %w", peer, err)
	}
	if h.Kind != wire.KindHello {
		return fmt.Errorf("greeting of node %d: frame of kind %d", peer, h.Kind)
	}
	hello, err := wire.ParseHello(body)
	if err != nil {
		if errors.Is(err, wire.ErrVersion) {
			refuse(conn, wire.RefuseVersion, err.Error())
		}
		return fmt.Errorf("greeting of node %d: %w", peer, err)
	}
	ss, reason := s.session(hello, peer, h.Ack)
	if ss == nil {
		refuse(conn, reason, "")
		return fault.New(fault.Refused, "serve home files of capsule", hello.Capsule,
			fmt.Sprintf("node %d, epoch %d: %v", peer, hello.Epoch, reason), "")
	}
	conn.SetDeadline(time.Time{})
	s.log.Debug("home files: connected", "capsule", hello.Capsule, "node", peer, "epoch", hello.Epoch)
	err = ss.link.Attach(conn, r, func(rx uint64) []byte {
		return wire.AppendFrame(nil, wire.KindWelcome, rx, nil)
	}, h.Ack)
	s.log.Debug("home files: disconnected", "capsule", hello.Capsule, "node", peer, "cause", err)
	return nil
}

func refuse(conn net.Conn, reason wire.Refusal, text string) {
	_, _ = conn.Write(wire.AppendFrame(nil, wire.KindRefused, 0, wire.Refused{Reason: reason, Text: text}.Append(nil))) // it closes anyway
}

// session finds or makes the session of a greeting, or says why not.
func (s *Server) session(h wire.Hello, peer api.NodeID, rx uint64) (*session, wire.Refusal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, wire.RefuseBusy
	}
	c := s.capsules[h.Capsule]
	if c == nil {
		return nil, wire.RefuseUnknown
	}
	if c.held != nil && c.held.session != nil && h.Session == c.held.session.id && peer == c.held.node {
		return nil, wire.RefuseBusy
	}
	if now, ok := c.reclaimed[h.Epoch]; ok {
		// Only the session itself goes on: a new one of that epoch is of the past.
		if ss := c.sessions[now]; ss == nil || ss.id != h.Session {
			return nil, wire.RefuseFenced
		}
		h.Epoch = now
	}
	node := c.Node
	switch {
	case h.Epoch == c.Epoch:
	case c.next != nil && h.Epoch == c.next.epoch:
		node = c.next.node
	case h.Epoch < c.Epoch:
		return nil, wire.RefuseFenced
	default:
		return nil, wire.RefuseUnknown
	}
	if node != peer {
		return nil, wire.RefuseUnknown
	}
	old := c.sessions[h.Epoch]
	if old != nil && old.id == h.Session {
		return old, 0
	}
	if rx != 0 {
		return nil, wire.RefuseLost
	}
	if old != nil {
		// A forwarder that was started again: its first mount is gone.
		go old.end()
	}
	ss := &session{
		srv: s, cap: c, id: h.Session, epoch: h.Epoch,
		inodes: make(map[uint64]*inode), byKey: make(map[inodeKey]*inode), nextID: wire.RootID + 1,
		files: make(map[uint64]*file), nextFH: 1, waits: make(map[uint64]*waiter),
	}
	ss.idle.L = &ss.mu
	root := &inode{id: wire.RootID, key: c.root, m: c.rootM, path: -1, nlookup: 1, files: make(map[uint64]*file)}
	c.rootM.refs++
	ss.inodes[root.id], ss.byKey[root.key] = root, root
	// Replies are never held back: there are no more of them than the
	// node's kernel has requests.
	ss.link = link.NewWith(0, ss.readers)
	c.sessions[h.Epoch] = ss
	return ss, 0
}

// readers reads a connection on a thread that can do requests itself: to have
// each done by another thread costs more than most of them.
func (ss *session) readers(read func(link.Handle)) {
	on := func(w *worker) {
		read(func(h wire.Header, buf *link.Buf, more bool) {
			if more { // it need not wait for this one
				ss.take(nil, h, buf)
			} else {
				ss.take(w, h, buf)
			}
		})
	}
	if !ss.srv.pool.lend(on) {
		on(nil) // the pool's others do the requests
	}
}

// take begins a request, and does it if w is not nil and it is short.
func (ss *session) take(w *worker, h wire.Header, buf *link.Buf) {
	if !ss.park(h, buf) {
		ss.begun(w, h, buf)
	}
}

// begun is take for what is not parked.
func (ss *session) begun(w *worker, h wire.Header, buf *link.Buf) {
	if h.Kind == wire.KindGone {
		if len(buf.B) >= 4 {
			ss.srv.locks.dropMoved(ss, binary.LittleEndian.Uint32(buf.B))
		}
		buf.Free()
		return
	}
	hdr, body, err := wire.ParseRequest(buf.B)
	if h.Kind != wire.KindRequest || err != nil {
		// Not our forwarder, or not FUSE: nothing can be answered.
		ss.srv.log.Warn("home files: frame dropped", "capsule", ss.cap.ID, "kind", h.Kind, "cause", err)
		buf.Free()
		return
	}
	r := &request{InHeader: hdr, body: body, buf: buf}
	switch r.Opcode {
	case wire.OpForget:
		if in, _, ok := wire.As[wire.ForgetIn](body); ok {
			ss.forget(r.NodeID, in.Nlookup)
		}
		buf.Free()
		return
	case wire.OpBatchForget:
		if in, rest, ok := wire.As[wire.BatchForgetIn](body); ok {
			for range in.Count {
				var one *wire.ForgetOne
				if one, rest, ok = wire.As[wire.ForgetOne](rest); !ok {
					break
				}
				ss.forget(one.NodeID, one.Nlookup)
			}
		}
		buf.Free()
		return
	case wire.OpInterrupt:
		if in, _, ok := wire.As[wire.InterruptIn](body); ok {
			ss.interrupt(in.Unique)
		}
		buf.Free()
		return
	case wire.OpSetlkw:
		// It may be interrupted from now on, also before a thread has it.
		ss.mu.Lock()
		ss.waits[r.Unique] = newWaiter()
		ss.mu.Unlock()
	}
	if !ss.begin() {
		// Held up since take looked: the node would wait for ever.
		if !ss.park(h, buf) {
			buf.Free()
		}
		return
	}
	// What a close unlocks is unlocked in the order of requests: whoever has
	// closed a file and asks for its lock at once must get it. The kernel
	// does not wait for a RELEASE.
	switch r.Opcode {
	case wire.OpRelease:
		if in, _, ok := wire.As[wire.ReleaseIn](body); ok {
			ss.unlockFile(in.FH)
		}
	case wire.OpFlush:
		a, err := withReq(r, ss.opFlush)
		buf.Free()
		ss.reply(r.Unique, a, err)
		ss.finish()
		return
	}
	if w != nil && short(r) {
		ss.serve(w, r)
		return
	}
	ss.srv.pool.do(func(w *worker) { ss.serve(w, r) })
}

// shortData is how much a short request reads or writes, in bytes.
const shortData = 32 << 10

// short tells whether a request is usually done sooner than another thread would
// have begun it.
func short(r *request) bool {
	switch r.Opcode {
	case wire.OpRead:
		in, _, ok := wire.As[wire.ReadIn](r.body)
		return ok && in.Size <= shortData
	case wire.OpWrite:
		return len(r.body) <= shortData
	case wire.OpLookup, wire.OpGetattr, wire.OpSetattr, wire.OpCreate, wire.OpOpen, wire.OpRelease, wire.OpReadlink,
		wire.OpMknod, wire.OpMkdir, wire.OpUnlink, wire.OpRmdir, wire.OpSymlink, wire.OpLink, wire.OpRename, wire.OpRename2,
		wire.OpOpendir, wire.OpReleasedir, wire.OpAccess, wire.OpGetxattr, wire.OpListxattr, wire.OpGetlk, wire.OpSetlk:
		return true
	}
	return false
}

// begin counts a request in, unless the session is fenced.
func (ss *session) begin() bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if ss.fenced {
		return false
	}
	ss.busy++
	return true
}

func (ss *session) finish() {
	ss.mu.Lock()
	ss.busy--
	ss.idle.Broadcast()
	ss.mu.Unlock()
}

// answer is what a request is answered with: body, or what buf has behind
// room for a header.
type answer struct {
	body  []byte
	buf   *link.Buf
	flags uint8
	none  bool // answered later, by somebody else
}

func (ss *session) serve(w *worker, r *request) {
	a, err := ss.op(w, r)
	r.buf.Free()
	if !a.none {
		ss.reply(r.Unique, a, err)
	}
	ss.finish()
}

func (ss *session) reply(unique uint64, a answer, err error) {
	if a.buf == nil {
		a.buf = link.NewBuf(wire.OutHeaderSize + len(a.body))
		copy(a.buf.B[wire.OutHeaderSize:], a.body)
	}
	h := wire.OutHeader{Len: uint32(len(a.buf.B)), Unique: unique}
	if err != nil {
		a.buf.B = a.buf.B[:wire.OutHeaderSize]
		h.Len, h.Error = uint32(wire.OutHeaderSize), -int32(errnoOf(err))
	}
	copy(a.buf.B, wire.Bytes(&h))
	_ = ss.link.Send(wire.KindReply, a.flags, a.buf.B, a.buf) // a closed link has nobody to tell
}

func errnoOf(err error) unix.Errno {
	var e unix.Errno
	if !errors.As(err, &e) || e == 0 || e >= 512 {
		return unix.EIO
	}
	return e
}

func (ss *session) notify(msg []byte) {
	_ = ss.link.Send(wire.KindNotify, 0, msg, nil) // as above
}

// fence lets no request begin any more and waits for those under way, so that
// nothing of this session happens afterwards. Waiting lock requests give up.
func (ss *session) fence() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.fenced = true
	for _, w := range ss.waits {
		w.cancel()
	}
	for ss.busy > 0 {
		ss.idle.Wait()
	}
}

// hold is fence for a session that may be released again: what comes meanwhile is kept.
func (ss *session) hold() {
	ss.mu.Lock()
	ss.parking = true
	ss.mu.Unlock()
	ss.fence()
}

// release undoes hold: what has come since is begun.
func (ss *session) release() {
	ss.mu.Lock()
	if ss.ended {
		ss.mu.Unlock()
		return
	}
	ss.fenced = false
	for len(ss.parked) > 0 {
		parked := ss.parked
		ss.parked, ss.parkedBytes = nil, 0
		ss.mu.Unlock()
		for _, p := range parked {
			ss.begun(nil, p.h, p.buf)
		}
		ss.mu.Lock()
	}
	ss.parking = false
	ss.mu.Unlock()
}

// park keeps a frame for later if the session is held up. When it has too many,
// the connection is cut: the node keeps the rest, and its greetings are refused
// until the session is released.
func (ss *session) park(h wire.Header, buf *link.Buf) bool {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if !ss.parking || ss.ended {
		return false
	}
	ss.parked = append(ss.parked, parkedFrame{h, buf})
	if ss.parkedBytes += len(buf.B); ss.parkedBytes > maxParked {
		go ss.link.Cut()
	}
	return true
}

// drain waits until all requests that were begun are done.
func (ss *session) drain(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		ss.mu.Lock()
		ss.idle.Broadcast()
		ss.mu.Unlock()
	})
	defer stop()
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for ss.busy > 0 && ctx.Err() == nil {
		ss.idle.Wait()
	}
	return ctx.Err()
}

// end ends the session: the node is told, files are closed and locks dropped.
func (ss *session) end() {
	ss.fence()
	ss.link.Fence()
	ss.mu.Lock()
	if ss.ended {
		ss.mu.Unlock()
		return
	}
	ss.ended = true
	for _, p := range ss.parked {
		p.buf.Free()
	}
	ss.parked = nil
	files := ss.files
	ss.files = make(map[uint64]*file)
	ss.mu.Unlock()
	ss.srv.locks.dropSession(ss)
	for _, f := range files {
		f.unref()
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for _, in := range ss.inodes {
		ss.drop(in)
	}
}

// Sync waits until every request of the capsule's current session that has
// reached the home is done, so that what the job wrote is in the home's files.
// Call it at FREEZE, after the node's syncfs of the mount has returned. It
// does not wait for a disk.
func (s *Server) Sync(ctx context.Context, id string) error {
	s.mu.Lock()
	c := s.capsules[id]
	var ss *session
	if c != nil {
		ss = c.sessions[c.Epoch]
	}
	s.mu.Unlock()
	if c == nil {
		return fault.New(fault.NotFound, "sync home files of capsule", id, "no such capsule", "")
	}
	if ss == nil {
		return nil
	}
	if err := ss.drain(ctx); err != nil {
		return fault.New(fault.Unavailable, "sync home files of capsule", id, err, "the home's disk is slow or hangs; see its kernel log")
	}
	return nil
}
