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
	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/capsule/shim"
	"mosimg/agent/pages"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// The orders of a home: Node is a Peer.

func (n *Node) refuse(op string, o Order, cause any, hint string) error {
	return fault.New(fault.Refused, op, fmt.Sprintf("epoch %d of job %s on node %d", o.Epoch, o.Job, n.conf.Self), cause, hint)
}

// over refuses an order about a copy that has ended.
func (n *Node) over(op string, o Order) error {
	return fault.New(fault.NotFound, op, fmt.Sprintf("epoch %d of job %s on node %d", o.Epoch, o.Job, n.conf.Self), "it has ended", "")
}

// Prepare implements Peer.
func (n *Node) Prepare(ctx context.Context, o Order) error {
	if cp := n.find(o); cp != nil {
		if p := cp.record().Phase; p != prepared {
			return n.refuse("prepare", o, "it is "+string(p), "")
		}
		return nil
	}
	cp, err := n.create(ctx, o, func() error { return errors.Join(n.welcome("prepare", o), n.fits(o)) })
	if err != nil {
		return err
	}
	defer cp.turn.Unlock()
	if err := os.MkdirAll(n.imagesDir(cp.rec.Capsule), 0o700); err != nil {
		return errors.Join(err, n.remove(ctx, cp))
	}
	return nil
}

// fits tells why a job of this size and machine cannot go on here.
func (n *Node) fits(o Order) error {
	self := n.conf.Machine()
	if err := o.Machine.Fits(self); err != nil {
		return n.refuse("prepare", o, err, "")
	}
	free, err := n.memory()
	if err != nil {
		return err
	}
	// What has come and what is restored of it are both in memory for a moment.
	free -= n.coming()
	if need := 2*o.Bytes + memoryMargin; need > free {
		return n.refuse("prepare", o, fmt.Sprintf("it needs %d MiB for a moment, %d MiB are free", need>>20, max(0, free)>>20), "")
	}
	return nil
}

// memoryMargin is what a node keeps for itself.
const memoryMargin = 16 << 20

func (n *Node) memory() (int64, error) {
	if n.conf.Memory != nil {
		return n.conf.Memory()
	}
	return available()
}

// Inspect implements Peer.
func (n *Node) Inspect(ctx context.Context, o Order) (Facts, error) {
	cp := n.find(o)
	if cp == nil {
		return Facts{}, n.refuse("inspect", o, "this node knows nothing of it", "")
	}
	if cp.record().Phase == ended {
		return Facts{}, n.over("inspect", o)
	}
	st, err := cp.c.Measure(ctx)
	if err != nil {
		return Facts{}, err
	}
	if st.State == control.Ended {
		return Facts{}, n.over("inspect", o)
	}
	if st.State != control.Running || st.Use == nil {
		return Facts{}, n.refuse("inspect", o, "it is "+string(st.State), "")
	}
	return Facts{Machine: n.conf.Machine(), Use: *st.Use}, nil
}

// bridge lets a home talk to a copy's shim.
func (n *Node) bridge(ctx context.Context, conn net.Conn, o Order, from api.NodeID) error {
	cp := n.find(o)
	if cp == nil || o.Home != from {
		return control.Send(conn, control.Answer{Error: control.FromError(fault.New(fault.NotFound, "find", fmt.Sprintf("epoch %d of job %s", o.Epoch, o.Job), "it is not on this node", ""))})
	}
	return cp.c.Bridge(ctx, conn)
}

// copyIn finds a copy, takes its turn, and refuses one that is in another
// phase; the caller unlocks turn.
func (n *Node) copyIn(op string, o Order, want phase) (*jobCopy, error) {
	cp := n.find(o)
	if cp == nil {
		return nil, n.refuse(op, o, "this node knows nothing of it", "")
	}
	cp.turn.Lock()
	if p := cp.record().Phase; p != want {
		cp.turn.Unlock()
		if p == ended {
			return nil, n.over(op, o)
		}
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
func (n *Node) Freeze(ctx context.Context, o Order) (Pids, error) {
	cp, err := n.copyIn("freeze", o, running)
	if err != nil {
		return nil, err
	}
	defer cp.turn.Unlock()
	ctx, end := cp.begin(ctx)
	defer end()
	err = n.send(ctx, cp, o)
	if err == nil {
		var pids Pids
		if pids, err = n.pids(cp); err == nil {
			return pids, nil
		}
	}
	tctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTime)
	defer cancel()
	if st, serr := cp.c.Status(tctx); serr == nil && st.State == control.Dumped {
		// The home cannot commit without our word that all was sent.
		err = errors.Join(err, n.thaw(tctx, cp, o.Epoch))
	}
	return nil, err
}

// pids are the numbers of a frozen copy's processes.
func (n *Node) pids(cp *jobCopy) (Pids, error) {
	leaf, err := cgroup.Open(filepath.Join(n.capsuleGroup(cp.record().Capsule), shim.JobLeaf))
	if err != nil {
		return nil, err
	}
	defer func() { _ = leaf.Close() }()
	procs, err := leaf.Procs()
	if err != nil {
		return nil, err
	}
	pids := make(Pids)
	for _, pid := range procs {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return nil, err
		}
		inside, err := parseNSpid(string(data))
		if err != nil {
			return nil, fmt.Errorf("/proc/%d/status: %w", pid, err)
		}
		pids[inside] = uint32(pid)
	}
	return pids, nil
}

// parseNSpid finds a process's number in its innermost namespace.
func parseNSpid(status string) (uint32, error) {
	for line := range strings.Lines(status) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "NSpid:" {
			pid, err := strconv.ParseUint(f[len(f)-1], 10, 32)
			return uint32(pid), err
		}
	}
	return 0, errors.New("no NSpid")
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
	err = n.dump(ctx, cp, o, images, w)
	if err != nil && fault.KindOf(err) == fault.Unavailable && ctx.Err() == nil && w.Images == 0 {
		// A race with a process that ended, and nothing has been sent of the job.
		n.log.Info("dump again", "job", o.Job, "err", err)
		if err := emptyDir(images); err != nil {
			return err
		}
		err = n.dump(ctx, cp, o, images, w)
	}
	if err != nil {
		return err
	}
	// From here on the job stands still, and after a crash the home is asked.
	if err := n.note(cp, func(r *copyRecord) { r.Phase = frozen }); err != nil {
		return err
	}
	// Pages of home files that the job has changed may be in this node's cache only.
	if err := n.syncRoot(ctx, cp); err != nil {
		return err
	}
	if err := sendFiles(images, w); err != nil {
		return err
	}
	return w.End()
}

// emptyDir removes the files of an open folder, which stays the same one.
func emptyDir(dir *os.File) error {
	root, err := os.OpenRoot(dir.Name())
	if err != nil {
		return err
	}
	defer root.Close()
	entries, err := os.ReadDir(dir.Name())
	for _, e := range entries {
		err = errors.Join(err, root.RemoveAll(e.Name()))
	}
	return err
}

func (n *Node) syncRoot(ctx context.Context, cp *jobCopy) error {
	rec := cp.record()
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	return n.conf.Roots.Sync(ctx, rec.Home, rec.Job, rec.Root)
}

// dump runs the dump with a page socket between CRIU and us.
func (n *Node) dump(ctx context.Context, cp *jobCopy, o Order, images *os.File, w *pages.Writer) error {
	ours, theirs, err := pageSockets()
	if err != nil {
		return err
	}
	defer ours.Close()
	served := make(chan error, 1)
	go func() {
		err := pages.Serve(ours, n.conf.Pages(), w)
		if err != nil {
			ours.Close() // CRIU sees that its pages are not wanted, and fails
		}
		served <- err
	}()
	if o.To.Node == o.Home {
		err = cp.c.DumpWhen(ctx, images, theirs, func(ctx context.Context) error {
			return n.conf.Judge.Unlocked(ctx, o.Home, o.Job, Placement{n.conf.Self, o.Epoch})
		})
	} else {
		err = cp.c.Dump(ctx, images, theirs)
	}
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
	limit, err := n.memory()
	if err != nil {
		return err
	}
	return pages.Receive(conn, pages.NewStore(root, limit))
}

// Restore implements Peer.
func (n *Node) Restore(ctx context.Context, o Order) (Pids, error) {
	if cp := n.find(o); cp != nil && cp.record().Phase == restored {
		return n.pids(cp)
	}
	cp, err := n.copyIn("restore", o, prepared)
	if err != nil {
		return nil, err
	}
	defer cp.turn.Unlock()
	ctx, end := cp.begin(ctx)
	defer end()
	dir := n.imagesDir(cp.record().Capsule)
	images, err := openDir(dir)
	if err != nil {
		return nil, err
	}
	defer images.Close()
	if err := cp.c.Restore(ctx, images, cp.record().Owner); err != nil {
		return nil, err // the home has it discarded
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := n.note(cp, func(r *copyRecord) { r.Phase = restored }); err != nil {
		return nil, err
	}
	return n.pids(cp)
}

// Resume implements Peer.
func (n *Node) Resume(ctx context.Context, o Order) error {
	if o.From != 0 {
		if cp := n.find(Order{Home: o.Home, Job: o.Job, Epoch: o.From}); cp != nil {
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
	cp := n.find(o)
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
	_, err := cp.c.Status(ctx)
	var why any
	switch {
	case errors.Is(err, capsule.ErrNoShim):
		why = "the copy died before it ran"
	case o.Reason != "":
		why = o.Reason
	default:
		if err := n.rootLost(cp.record()); err != nil {
			why = err
		}
	}
	if why != nil {
		// Without its files it could do nothing that the source could not do better.
		if err := n.note(cp, func(r *copyRecord) { r.Phase = gone }); err != nil {
			return err
		}
		return fault.New(fault.NotFound, "resume", "job "+string(o.Job), why, "")
	}
	err = n.resume(ctx, cp)
	if errors.Is(err, capsule.ErrNoShim) {
		return nil // it may have run: its end is reported like any other
	}
	return err
}

// Thaw implements Peer.
func (n *Node) Thaw(ctx context.Context, o Order) error {
	cp := n.find(o)
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
	cp := n.find(o)
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
