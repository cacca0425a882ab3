// Package forward is the node's side of home files: it mounts FUSE and passes
// the kernel's requests, as they are, to the home's handler (package home)
// over one connection after another.
//
// It knows almost nothing of FUSE. By itself it answers only what would cost
// a round trip for nothing (a FLUSH of a process without locks) and what must
// not wait for a link that is gone: a process that is killed meanwhile is let
// go at once, instead of staying in D state until the link is back. All others
// wait, so that a cut is to them a slow disk. When the home says that the
// capsule has moved on (fenced), or the link is gone for longer than the
// lease, the mount is given up: every request then fails with ENOTCONN.
//
// Run is meant for a small process of its own, one for each capsule, that
// outlives the agent's restart. It does not survive its own end: the kernel
// aborts the mount when the last descriptor of /dev/fuse is closed.
package forward

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/link"
	"mosimg/agent/homefiles/wire"
	"mosimg/internal/fault"
)

// Config says what to forward where.
type Config struct {
	// Capsule and Epoch are what the home knows this placement by.
	Capsule string
	Epoch   uint64
	// Mountpoint is a directory on which home files are mounted. It is
	// unmounted when Run ends. Not used with Device.
	Mountpoint string
	// Device is /dev/fuse of a mount that somebody else has made, with
	// nothing read from it yet; nil: Run opens and mounts it. Run closes it.
	Device *os.File
	// Dial makes a connection to the home's handler that is authenticated
	// and encrypted. It is called again each time the connection fails.
	Dial func(context.Context) (net.Conn, error)
	// Lease is how long the link may be gone before the mount is given up.
	// 0 is DefaultLease.
	Lease time.Duration
	// Ready, if not nil, is called once when the mount answers.
	Ready func()
	// Failed, if not nil, is called once when the mount must be given up,
	// before the first request fails because of that.
	Failed func(error)
	// Control, if not nil, is called once, before anything is mounted.
	Control func(Control)
	// Log gets what happens to the link; nil is silent.
	Log *slog.Logger
}

// DefaultLease is DESIGN's home_lease: a guest whose home is gone for longer
// is ended.
const DefaultLease = 5 * time.Minute

// Times of dialling: the first tries follow quickly, for most cuts are short.
const (
	dialTime = 10 * time.Second
	retryMin = 20 * time.Millisecond
	retryMax = 500 * time.Millisecond
)

// maxUnacked bounds what is kept for a link that is gone. Beyond it requests
// stay in the kernel.
const maxUnacked = 64 << 20

// forwarder is a mount that is being forwarded.
type forwarder struct {
	cfg Config
	log *slog.Logger
	dev *os.File
	// out is a second descriptor of dev, to write to: os.File lets one
	// writer in at a time, and a notification that waits in the kernel for
	// a page would keep out the very reply that brings it.
	out     int
	session wire.SessionID
	link    *link.Link
	ready   sync.Once

	// notes is what must reach the kernel in order and may wait for locks
	// there: notifications, and the replies that follow from them. A reply
	// to a read may be what such a lock waits for, so the connection's
	// reader must not write these itself.
	notes *queue

	mu sync.Mutex
	// The following is guarded by mu.
	waiting map[uint64]*waiting    // requests that the kernel has no answer to, by unique
	lockers map[locker]bool        // who may hold locks
	flush   bool                   // forward each FLUSH: locks moved here
	movedIn map[uint32]bool        // processes whose locks moved here
	early   map[uint64]uint64      // page writes that were answered before the home did: unique to node id
	held    []heldBack             // requests that wait until early is empty
	passing bool                   // held is being sent
	lost    map[uint64]int32       // errors of early writes, by node id, for the next FSYNC
	writers map[uint64]uint64      // files open for writing: handle to node id
	syncers map[uint32]int         // threads that sync them
	made    map[uint64]time.Time   // files that were made here, by node id: when
	strays  map[uint64]wire.Opcode // abandoned requests whose reply is still to come
	own     uint64                 // counts the requests that are our own
	over    bool                   // nothing is forwarded any more
	failed  error
}

type locker struct{ node, owner uint64 }

type waiting struct {
	wire.InHeader
	pages  bool // a write of dirty pages
	writer bool // an open for writing
	makes  bool // a creation of what must not be there before
}

type heldBack struct {
	msg []byte
	buf *link.Buf
}

// Run mounts home files and forwards until ctx is done (nil), the mount is
// unmounted (nil), or it must be given up: fenced (a fault of kind Refused) or
// lease over (kind Unavailable). It leaves no mount behind.
func Run(ctx context.Context, cfg Config) error {
	const op = "forward home files of capsule"
	if cfg.Lease == 0 {
		cfg.Lease = DefaultLease
	}
	if cfg.Capsule == "" || len(cfg.Capsule) > wire.MaxCapsule {
		return fault.New(fault.Usage, op, cfg.Capsule, "bad name", "")
	}
	f := &forwarder{
		cfg: cfg, log: cfg.Log, dev: cfg.Device, notes: newQueue(),
		waiting: make(map[uint64]*waiting), lockers: make(map[locker]bool), movedIn: make(map[uint32]bool),
		early: make(map[uint64]uint64), lost: make(map[uint64]int32),
		writers: make(map[uint64]uint64), syncers: make(map[uint32]int), made: make(map[uint64]time.Time), strays: make(map[uint64]wire.Opcode),
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	f.log = f.log.With("capsule", cfg.Capsule, "epoch", cfg.Epoch)
	if _, err := rand.Read(f.session[:]); err != nil {
		return err
	}
	if cfg.Control != nil {
		cfg.Control(Control{f})
	}
	if f.dev == nil {
		dev, err := Mount(cfg.Mountpoint)
		if err != nil {
			return err
		}
		f.dev = dev
		defer Unmount(cfg.Mountpoint)
	}
	out, err := dupOf(f.dev)
	if err != nil {
		f.dev.Close()
		return fault.New(fault.Environment, op, cfg.Capsule, fmt.Errorf("dup /dev/fuse: %w", err), "")
	}
	f.out = out
	defer unix.Close(out)
	f.link = link.New(maxUnacked, f.fromHome)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	var wg sync.WaitGroup
	noted := make(chan struct{})
	run := func(part func(context.Context) error, end func()) {
		wg.Go(func() {
			if err := part(ctx); err != nil {
				f.fail(err)
			}
			end()
			cancel()
		})
	}
	none := func() {}
	run(f.readKernel, none)
	run(f.writeNotes, func() { close(noted) })
	run(f.connect, none)
	run(f.guard, none)
	run(func(ctx context.Context) error { <-ctx.Done(); return nil }, func() { f.end(noted) })
	wg.Wait()
	if f.failed != nil {
		return fmt.Errorf("%s %s: %w", op, cfg.Capsule, f.failed)
	}
	return nil
}

// end ends the mount: whoever waits gets an answer first. The kernel would
// abort the mount when the device is closed, but a notification that waits
// there for a page keeps it open until that page's reader has its answer.
func (f *forwarder) end(noted <-chan struct{}) {
	f.link.Close()
	f.notes.close()
	f.mu.Lock()
	f.over = true
	asks := f.waiting
	f.waiting = nil
	f.mu.Unlock()
	for unique := range asks {
		f.writeKernel(wire.Reply(unique, int32(unix.ENOTCONN)))
	}
	<-noted
	f.dev.Close()
}

// dupOf gives a second descriptor of an open file.
func dupOf(file *os.File) (int, error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return -1, err
	}
	fd := -1
	if e := raw.Control(func(of uintptr) { fd, err = unix.FcntlInt(of, unix.F_DUPFD_CLOEXEC, 0) }); e != nil {
		return -1, e
	}
	return fd, err
}

func (f *forwarder) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failed != nil {
		return
	}
	f.failed = err
	if f.cfg.Failed != nil {
		f.cfg.Failed(err)
	}
}

// connect keeps the link up.
func (f *forwarder) connect(ctx context.Context) error {
	pause := retryMin
	for ctx.Err() == nil {
		up, err := f.connectOnce(ctx)
		if ctx.Err() != nil {
			return nil
		}
		var no *refusedError
		switch {
		case errors.Is(err, link.ErrFenced):
			return fault.New(fault.Refused, "resume", "session", err, "")
		case errors.As(err, &no) && no.Reason.Final():
			return fault.New(fault.Refused, "resume", "session", err, "")
		}
		if up {
			pause = retryMin
		}
		f.log.Debug("home files: no link", "cause", err, "retry", pause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(pause*2, retryMax)
	}
	return nil
}

type refusedError struct{ wire.Refused }

func (e *refusedError) Error() string {
	if e.Text == "" {
		return e.Reason.String()
	}
	return e.Reason.String() + ": " + e.Text
}

// connectOnce makes a connection and uses it until it fails. up tells whether
// the home has accepted it.
func (f *forwarder) connectOnce(ctx context.Context) (up bool, err error) {
	dctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	conn, err := f.cfg.Dial(dctx)
	if err != nil {
		return false, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	conn.SetDeadline(time.Now().Add(dialTime))
	hello := wire.Hello{Capsule: f.cfg.Capsule, Session: f.session, Epoch: f.cfg.Epoch}
	if _, err := conn.Write(wire.AppendFrame(nil, wire.KindHello, f.link.Rx(), hello.Append(nil))); err != nil {
		conn.Close()
		return false, err
	}
	r := bufio.NewReaderSize(conn, 64<<10)
	h, body, err := wire.ReadFrame(r, wire.MaxGreeting)
	if err == nil && h.Kind == wire.KindRefused {
		var no wire.Refused
		if no, err = wire.ParseRefused(body); err == nil {
			err = &refusedError{no}
		}
	} else if err == nil && h.Kind != wire.KindWelcome {
		err = fmt.Errorf("home answers the greeting with a frame of kind %d", h.Kind)
	}
	if err != nil {
		conn.Close()
		return false, err
	}
	conn.SetDeadline(time.Time{})
	f.log.Debug("home files: link up", "home_has", h.Ack)
	return true, f.link.Attach(conn, r, nil, h.Ack)
}

// readKernel passes requests on until the mount is gone.
func (f *forwarder) readKernel(ctx context.Context) error {
	for {
		buf := link.NewBuf(readSize)
		n, err := f.dev.Read(buf.B)
		if err != nil {
			buf.Free()
			switch again, gone := readError(err); {
			case again:
				continue
			case gone || ctx.Err() != nil:
				return nil
			}
			return fmt.Errorf("read /dev/fuse: %w", err)
		}
		msg := buf.B[:n]
		if n <= smallRequest {
			// Kept until acknowledged: a megabyte each would be much.
			small := link.NewBuf(n)
			copy(small.B, msg)
			buf.Free()
			buf, msg = small, small.B
		}
		f.fromKernel(msg, buf)
	}
}

// smallRequest is what is copied out of the large buffer it was read into.
const smallRequest = 64 << 10

// writeKernel gives the kernel one reply or notification.
func (f *forwarder) writeKernel(msg []byte) {
	if _, err := unix.Write(f.out, msg); err != nil && !replyTooLate(err) {
		f.log.Warn("home files: the kernel refuses an answer", "cause", err, "bytes", len(msg))
	}
}

func (f *forwarder) writeNotes(context.Context) error {
	for {
		buf, err := f.notes.next()
		if err != nil { // closed
			return nil
		}
		f.writeKernel(buf.B)
		buf.Free()
	}
}
