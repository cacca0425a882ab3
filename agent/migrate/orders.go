package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule"
	"mosimg/agent/capsule/control"
	"mosimg/agent/pages"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// The orders of a home: Node is a Peer.

func (n *Node) refuse(op string, o Order, cause any, hint string) error {
	return fault.New(fault.Refused, op, fmt.Sprintf("epoch %d of job %s on node %d", o.Epoch, o.Job, n.conf.Self), cause, hint)
}

// Prepare implements Peer.
func (n *Node) Prepare(ctx context.Context, o Order) error {
	if o.Version != n.conf.Version {
		return n.refuse("prepare", o, fmt.Sprintf("it runs %s, the home %s", n.conf.Version, o.Version), "boot both from the same image")
	}
	if cp := n.find(o.Job, o.Epoch); cp != nil {
		if p := cp.record().Phase; p != prepared {
			return n.refuse("prepare", o, "it is "+string(p), "")
		}
		return nil
	}
	cp, err := n.create(ctx, o.Home, o.Job, o.Epoch)
	if err != nil {
		return err
	}
	cp.turn.Lock()
	defer cp.turn.Unlock()
	if err = os.MkdirAll(n.imagesDir(cp.rec.Capsule), 0o700); err == nil {
		err = n.note(cp, func(r *copyRecord) { r.Phase, r.Source = prepared, o.Source })
	}
	if err != nil {
		return errors.Join(err, n.remove(ctx, cp))
	}
	return nil
}

// copyIn finds a copy, takes its turn, and refuses one that is in another
// phase; the caller unlocks turn.
func (n *Node) copyIn(op string, o Order, want phase) (*jobCopy, error) {
	cp := n.find(o.Job, o.Epoch)
	if cp == nil {
		return nil, n.refuse(op, o, "this node knows nothing of it", "")
	}
	cp.turn.Lock()
	if p := cp.record().Phase; p != want {
		cp.turn.Unlock()
		return nil, n.refuse(op, o, "it is "+string(p), "")
	}
	return cp, nil
}

// begin makes a long piece of work one that Thaw and Discard can end.
func (cp *jobCopy) begin(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	cp.mu.Lock()
	cp.cancel = cancel
	cp.mu.Unlock()
	return ctx, func() {
		cp.mu.Lock()
		cp.cancel = nil
		cp.mu.Unlock()
		cancel()
	}
}

// interrupt ends what begin began and takes the turn.
func (cp *jobCopy) interrupt() {
	cp.mu.Lock()
	if cp.cancel != nil {
		cp.cancel()
	}
	cp.mu.Unlock()
	cp.turn.Lock()
}

// Freeze implements Peer.
func (n *Node) Freeze(ctx context.Context, o Order) error {
	cp, err := n.copyIn("freeze", o, running)
	if err != nil {
		return err
	}
	defer cp.turn.Unlock()
	ctx, end := cp.begin(ctx)
	defer end()
	err = n.send(ctx, cp, o)
	if err == nil {
		return nil
	}
	tctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTime)
	defer cancel()
	if st, serr := cp.c.Status(tctx); serr == nil && st.State == control.Dumped {
		// The home cannot commit without our word that all was sent.
		err = errors.Join(err, n.thaw(tctx, cp, o.Epoch))
	}
	return err
}

// send dumps a job to its destination: pages while CRIU reads them, the small
// images when the job is frozen.
func (n *Node) send(ctx context.Context, cp *jobCopy, o Order) error {
	name := cp.record().Capsule
	if err := os.RemoveAll(n.imagesDir(name)); err != nil {
		return err
	}
	if err := os.MkdirAll(n.imagesDir(name), 0o700); err != nil {
		return err
	}
	images, err := openDir(n.imagesDir(name))
	if err != nil {
		return err
	}
	defer images.Close()
	conn, err := n.conf.Dial(ctx, o.To.Node)
	if err != nil {
		return fault.New(fault.Unavailable, "connect to", fmt.Sprintf("node %d", o.To.Node), err, "")
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := writeMessage(conn, message{Op: opPages, Order: Order{Job: o.Job, Home: o.Home, Epoch: o.To.Epoch}}); err != nil {
		return err
	}
	w := pages.NewWriter(conn)
	if err := n.dump(ctx, cp, images, w); err != nil {
		return err
	}
	// From here on the job stands still, and after a crash the home is asked.
	if err := n.note(cp, func(r *copyRecord) { r.Phase = frozen }); err != nil {
		return err
	}
	if err := sendFiles(images, w); err != nil {
		return err
	}
	return w.End()
}

// dump runs the dump with a page socket between CRIU and us.
func (n *Node) dump(ctx context.Context, cp *jobCopy, images *os.File, w *pages.Writer) error {
	ours, theirs, err := pageSockets()
	if err != nil {
		return err
	}
	defer ours.Close()
	served := make(chan error, 1)
	go func() {
		err := pages.Serve(ours, n.conf.Pages, w)
		if err != nil {
			ours.Close() // CRIU sees that its pages are not wanted, and fails
		}
		served <- err
	}()
	err = cp.c.Dump(ctx, images, theirs)
	theirs.Close()
	if err != nil {
		// CRIU has ended, so Serve does: its own reason is the better one, unless
		// CRIU hung up first.
		if serr := <-served; serr != nil && !errors.Is(serr, pages.ErrHungUp) {
			return serr
		}
		return err
	}
	return <-served
}

func pageSockets() (ours net.Conn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "pages")
	f := os.NewFile(uintptr(fds[0]), "pages")
	ours, err = net.FileConn(f)
	f.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// sendFiles sends what the dump left in the images folder, logs excepted.
func sendFiles(images *os.File, w *pages.Writer) error {
	entries, err := images.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || strings.HasSuffix(e.Name(), ".log") {
			continue
		}
		if err := sendFile(filepath.Join(images.Name(), e.Name()), e.Name(), w); err != nil {
			return err
		}
	}
	return nil
}

func sendFile(path, name string, w *pages.Writer) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	return w.File(name, fi.Size(), f)
}

// take takes the pages and images of a copy that was prepared.
func (n *Node) take(ctx context.Context, conn io.ReadWriteCloser, o Order, from api.NodeID) error {
	cp, err := n.copyIn("take pages of", o, prepared)
	if err != nil {
		return err
	}
	defer cp.turn.Unlock()
	if cp.record().Source != from {
		return n.refuse("take pages of", o, fmt.Sprintf("node %d does not have the job", from), "")
	}
	ctx, end := cp.begin(ctx)
	defer end()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	root, err := os.OpenRoot(n.imagesDir(cp.record().Capsule))
	if err != nil {
		return err
	}
	defer root.Close()
	memory := n.conf.Memory
	if memory == nil {
		memory = available
	}
	limit, err := memory()
	if err != nil {
		return err
	}
	return pages.Receive(conn, pages.NewStore(root, limit))
}

// Restore implements Peer.
func (n *Node) Restore(ctx context.Context, o Order) error {
	if cp := n.find(o.Job, o.Epoch); cp != nil && cp.record().Phase == restored {
		return nil
	}
	cp, err := n.copyIn("restore", o, prepared)
	if err != nil {
		return err
	}
	defer cp.turn.Unlock()
	ctx, end := cp.begin(ctx)
	defer end()
	dir := n.imagesDir(cp.record().Capsule)
	images, err := openDir(dir)
	if err != nil {
		return err
	}
	defer images.Close()
	if err := cp.c.Restore(ctx, images); err != nil {
		return err // the home has it discarded
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return n.note(cp, func(r *copyRecord) { r.Phase = restored })
}

// Resume implements Peer.
func (n *Node) Resume(ctx context.Context, o Order) error {
	if o.From != 0 {
		if cp := n.find(o.Job, o.From); cp != nil {
			cp.turn.Lock()
			defer cp.turn.Unlock()
			if cp.record().Epoch == o.From {
				err := n.thaw(ctx, cp, o.Epoch)
				if errors.Is(err, capsule.ErrNoShim) {
					return n.refuse("resume", o, err, "")
				}
				return err
			}
		}
	}
	cp := n.find(o.Job, o.Epoch)
	if cp == nil {
		return n.refuse("resume", o, "this node knows nothing of it", "was it restarted?")
	}
	cp.turn.Lock()
	defer cp.turn.Unlock()
	switch p := cp.record().Phase; p {
	case running, ended:
		return nil
	case restored:
	case gone:
		return fault.New(fault.NotFound, "resume", "job "+string(o.Job), "the copy died before it ran", "")
	default:
		return n.refuse("resume", o, "it is "+string(p), "")
	}
	if _, err := cp.c.Status(ctx); errors.Is(err, capsule.ErrNoShim) {
		if err := n.note(cp, func(r *copyRecord) { r.Phase = gone }); err != nil {
			return err
		}
		return fault.New(fault.NotFound, "resume", "job "+string(o.Job), "the copy died before it ran", "")
	}
	err := n.resume(ctx, cp)
	if errors.Is(err, capsule.ErrNoShim) {
		return nil // it may have run: its end is reported like any other
	}
	return err
}

// Thaw implements Peer.
func (n *Node) Thaw(ctx context.Context, o Order) error {
	cp := n.find(o.Job, o.Epoch)
	if cp == nil {
		return n.refuse("thaw", o, "this node knows nothing of it", "")
	}
	cp.interrupt()
	defer cp.turn.Unlock()
	if cp.record().Phase != frozen {
		return nil
	}
	return n.thaw(ctx, cp, o.Epoch)
}

// Discard implements Peer.
func (n *Node) Discard(ctx context.Context, o Order) error {
	cp := n.find(o.Job, o.Epoch)
	if cp == nil {
		return nil
	}
	cp.interrupt()
	defer cp.turn.Unlock()
	return n.remove(ctx, cp)
}

// parseAvailable finds MemAvailable in /proc/meminfo, in bytes.
func parseAvailable(meminfo string) (int64, error) {
	for line := range strings.Lines(meminfo) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "MemAvailable:" && f[2] == "kB" {
			kb, err := strconv.ParseInt(f[1], 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}
