package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule"
	"mosimg/agent/capsule/control"
	"mosimg/agent/capsule/shim"
	"mosimg/agent/pages"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// NodeConfig is what a Node needs.
type NodeConfig struct {
	Self   api.NodeID
	Dir    string // in memory: capsules, images, journal
	Cgroup string // group for the capsules' groups
	// CRIU is how capsules made from now on run it.
	CRIU func() control.CRIU
	// Pages is the page-server protocol that it speaks.
	Pages func() pages.Protocol
	// Machine is what this one is, as far as it is known now.
	Machine func() Machine
	Roots   Roots
	// RootLost tells why a copy's tree is gone for good, or nil; if it is not
	// set, trees do not go.
	RootLost func(home api.NodeID, job JobID, epoch uint64) error
	// RootJobs lets in root's jobs of other homes.
	RootJobs bool
	// Lease is how long a guest's home may be unreachable before the guest is killed; 0 is DefaultLease.
	Lease time.Duration
	// Dial connects to another node's Serve.
	Dial func(ctx context.Context, node api.NodeID) (net.Conn, error)
	// Judge reaches the homes of copies.
	Judge Judge
	// Admit, if set, may refuse a job that is to start here or to come: that of a
	// Start, which has no Source, or of a Prepare.
	Admit func(Order) error
	// Memory is how many bytes a job that comes may need; nil is what the kernel calls available.
	Memory func() (int64, error)
	// Exe is the program that runs as shim: see capsule.Config.
	Exe string
	Log *slog.Logger // nil is silent
}

// Node does on one node what homes order. It remembers its copies in a
// journal in memory, and so survives the agent; the machine's end is theirs too.
type Node struct {
	conf    NodeConfig
	log     *slog.Logger
	journal *Journal[copyRecord]

	// entry is held while it is decided whether a copy may come, so that two do not
	// both get the last place.
	entry sync.Mutex

	mu     sync.Mutex // guards the following
	copies map[copyKey]*jobCopy
}

type copyKey struct {
	job   JobID
	epoch uint64
}

// copyRecord is what is journalled about a copy.
type copyRecord struct {
	Job     JobID
	Home    api.NodeID
	Epoch   uint64
	Root    uint64 // epoch in which its root was opened
	Phase   phase
	Capsule string        // its name; that of the epoch in which it was made
	Source  api.NodeID    `json:",omitempty"` // who may send its pages
	End     *End          `json:",omitempty"`
	Told    bool          `json:",omitempty"` // the home knows End
	Owner   control.Owner // of a job that comes
	Held    bool          `json:",omitempty"` // frozen because the home does not answer
	Since   time.Time     `json:",omitzero"`  // it has run here
	Bytes   int64         `json:",omitempty"` // of a job that comes, as measured at its source
	Load    float64       `json:",omitempty"` // of a job that comes, as its Bid has it
	Locked  bool          `json:",omitempty"`
	Moves   int           `json:",omitempty"`
}

// jobCopy is one copy of a job on this node.
type jobCopy struct {
	turn sync.Mutex // held by who works on the copy
	c    *capsule.Capsule
	// heard is when the home last answered, in Unix nanoseconds; told when it was
	// last told of the end.
	heard, told atomic.Int64
	watched     atomic.Bool // somebody waits for its end

	mu     sync.Mutex // guards the following
	rec    copyRecord
	cancel context.CancelFunc // of a Freeze or Restore under way
}

// OpenNode takes over what an earlier agent left in conf.Dir. Settle, or Run, then
// brings it in order; before that nothing is asked or told.
func OpenNode(conf NodeConfig) (*Node, error) {
	n := &Node{conf: conf, log: conf.Log, copies: make(map[copyKey]*jobCopy)}
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if n.journal, err = OpenJournal[copyRecord](filepath.Join(conf.Dir, "journal")); err != nil {
		return nil, fault.New(fault.Environment, "open", "the journal of copies", err, "")
	}
	all, err := n.journal.All()
	if err != nil {
		return nil, fault.New(fault.Environment, "read", "the journal of copies", err, "")
	}
	for _, rec := range all {
		cp := &jobCopy{rec: rec, c: capsule.Attach(rec.Capsule, n.capsuleDir(rec.Capsule), n.capsuleGroup(rec.Capsule))}
		cp.heard.Store(time.Now().UnixNano())
		n.copies[copyKey{rec.Job, rec.Epoch}] = cp
	}
	return n, nil
}

func capsuleName(job JobID, epoch uint64) string { return fmt.Sprintf("%s.%d", job, epoch) }

func (n *Node) capsuleDir(name string) string { return filepath.Join(n.conf.Dir, "capsules", name) }

func (n *Node) capsuleGroup(name string) string { return filepath.Join(n.conf.Cgroup, name) }

func (n *Node) imagesDir(name string) string { return filepath.Join(n.conf.Dir, "images", name) }

func (n *Node) copyOf(job JobID, epoch uint64) *jobCopy {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.copies[copyKey{job, epoch}]
}

// find finds the copy that an order is about: one of the home that gives it.
func (n *Node) find(o Order) *jobCopy {
	cp := n.copyOf(o.Job, o.Epoch)
	if cp != nil && cp.record().Home != o.Home {
		return nil
	}
	return cp
}

// note journals a copy's phase, before or after the act as the caller says.
func (n *Node) note(cp *jobCopy, f func(*copyRecord)) error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	rec := cp.rec
	f(&rec)
	if err := n.journal.Put(capsuleName(rec.Job, rec.Epoch), rec); err != nil {
		return fault.New(fault.Environment, "journal", "copy of job "+string(rec.Job), err, "is there memory left for "+n.conf.Dir+"?")
	}
	cp.rec = rec
	return nil
}

func (cp *jobCopy) record() copyRecord {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	return cp.rec
}

// create makes a copy with an empty capsule, unless may says why not; the caller
// unlocks turn. It is journalled before anything of it is there, so that an agent that dies
// meanwhile leaves nothing that the next one does not know of.
func (n *Node) create(ctx context.Context, o Order, may func() error) (*jobCopy, error) {
	if err := o.Job.check(); err != nil {
		return nil, err
	}
	name := capsuleName(o.Job, o.Epoch)
	cp := &jobCopy{
		c: capsule.Attach(name, n.capsuleDir(name), n.capsuleGroup(name)),
		rec: copyRecord{Job: o.Job, Home: o.Home, Epoch: o.Epoch, Root: o.Epoch, Capsule: name, Phase: prepared, Source: o.Source, Owner: o.Owner,
			Bytes: o.Bytes, Load: o.Bid.Load, Locked: o.Locked, Moves: o.Moves},
	}
	cp.heard.Store(time.Now().UnixNano())
	cp.turn.Lock()
	if err := n.enter(cp, may); err != nil {
		cp.turn.Unlock()
		return nil, err
	}
	root, err := n.conf.Roots.Open(ctx, o.Home, o.Job, o.Epoch)
	if err == nil {
		_, err = capsule.Start(ctx, capsule.Config{Exe: n.conf.Exe, Config: control.Config{
			ID: name, Dir: n.capsuleDir(name), Cgroup: n.capsuleGroup(name), Root: root, CRIU: n.conf.CRIU(),
		}})
	}
	if err != nil {
		err = errors.Join(err, n.remove(ctx, cp))
		cp.turn.Unlock()
		return nil, err
	}
	return cp, nil
}

// enter makes a copy known, unless may says why not.
func (n *Node) enter(cp *jobCopy, may func() error) error {
	n.entry.Lock()
	defer n.entry.Unlock()
	if err := may(); err != nil {
		return err
	}
	if err := n.note(cp, func(*copyRecord) {}); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.copies[copyKey{cp.rec.Job, cp.rec.Epoch}] = cp
	return nil
}

// welcome refuses jobs that may not be here, or not now.
func (n *Node) welcome(op string, o Order) error {
	if n.conf.Admit != nil {
		if err := n.conf.Admit(o); err != nil {
			return fault.New(fault.KindOf(err), op, fmt.Sprintf("job %s on node %d", o.Job, n.conf.Self), err, "")
		}
	}
	if o.Owner.UID == 0 && o.Home != n.conf.Self && !n.conf.RootJobs {
		return fault.New(fault.Refused, op, "job "+string(o.Job), "root's jobs stay at home", "run it as another user")
	}
	return nil
}

// Start implements Peer.
func (n *Node) Start(ctx context.Context, o Order, spec control.Spec) error {
	if n.copyOf(o.Job, o.Epoch) != nil {
		return fault.New(fault.Refused, "start", "job "+string(o.Job), "there is one of this name", "")
	}
	o.Owner = spec.Owner()
	cp, err := n.create(ctx, o, func() error { return n.welcome("start", o) })
	if err != nil {
		return err
	}
	defer cp.turn.Unlock()
	// After a crash in between, Settle finds an empty capsule and a home that
	// knows of no such job.
	if _, err = cp.c.Run(ctx, spec); err == nil {
		err = n.note(cp, func(r *copyRecord) { r.Phase, r.Since = running, time.Now() })
	}
	if err != nil {
		return errors.Join(err, n.remove(ctx, cp))
	}
	go n.watch(cp)
	return nil
}

// Capsule is that of a copy, for its streams and signals.
func (n *Node) Capsule(job JobID, epoch uint64) (*capsule.Capsule, error) {
	if cp := n.copyOf(job, epoch); cp != nil {
		return cp.c, nil
	}
	return nil, fault.New(fault.NotFound, "find", fmt.Sprintf("epoch %d of job %s", epoch, job), "it is not on this node", "")
}

// Guest is a job of another home that is here.
type Guest struct {
	Job   JobID
	Home  api.NodeID
	Epoch uint64
	Owner control.Owner
}

// Guests are the jobs of other homes that run here.
func (n *Node) Guests() []Guest {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []Guest
	for _, cp := range n.copies {
		if rec := cp.record(); rec.Home != n.conf.Self && rec.Phase == running {
			all = append(all, Guest{rec.Job, rec.Home, rec.Epoch, rec.Owner})
		}
	}
	return all
}

// Copy is a job that is on this node, or about to come.
type Copy struct {
	Guest
	Group  string    // the control group of its processes
	Since  time.Time // it has run here; zero while it comes
	Locked bool      // its user does not want it moved by itself
	Moves  int
	// Load and Bytes are those of a job that came by a move, as told by its source.
	Load  float64
	Bytes int64
}

// Copies are the jobs that run here or are about to come, those of this home too.
func (n *Node) Copies() []Copy {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []Copy
	for _, cp := range n.copies {
		rec := cp.record()
		c := Copy{
			Guest: Guest{rec.Job, rec.Home, rec.Epoch, rec.Owner}, Group: filepath.Join(n.capsuleGroup(rec.Capsule), shim.JobLeaf),
			Locked: rec.Locked, Moves: rec.Moves, Load: rec.Load, Bytes: rec.Bytes,
		}
		switch rec.Phase {
		case running:
			c.Since = rec.Since
		case prepared, restored:
		default:
			continue
		}
		all = append(all, c)
	}
	return all
}

// coming is the memory that jobs on their way here still need.
func (n *Node) coming() int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	var sum int64
	for _, cp := range n.copies {
		if rec := cp.record(); rec.Phase == prepared {
			sum += 2 * max(0, rec.Bytes)
		}
	}
	return sum
}

// remove removes a copy and all that belongs to it; turn is held.
func (n *Node) remove(ctx context.Context, cp *jobCopy) error {
	rec := cp.record()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stepTime)
	defer cancel()
	if err := cp.c.Remove(ctx); err != nil {
		return fault.New(fault.Environment, "remove", "capsule "+rec.Capsule, err, "")
	}
	if err := n.conf.Roots.Close(ctx, rec.Home, rec.Job, rec.Root); err != nil {
		return fault.New(fault.Environment, "close", "root of capsule "+rec.Capsule, err, "")
	}
	if err := os.RemoveAll(n.imagesDir(rec.Capsule)); err != nil {
		return err
	}
	if err := n.journal.Delete(capsuleName(rec.Job, rec.Epoch)); err != nil {
		return err
	}
	n.mu.Lock()
	delete(n.copies, copyKey{rec.Job, rec.Epoch})
	n.mu.Unlock()
	return nil
}

// watch waits for the end of a copy that runs here, unless somebody does already.
func (n *Node) watch(cp *jobCopy) {
	if !cp.watched.CompareAndSwap(false, true) {
		return
	}
	defer cp.watched.Store(false)
	st, err := cp.c.Wait(context.Background())
	switch {
	case err == nil && st.State == control.Ended:
		cp.turn.Lock()
		defer cp.turn.Unlock()
		if cp.record().Phase == running {
			err = n.noteEnd(context.Background(), cp, End{Exit: st.Exit, Signal: st.Signal})
		}
	case errors.Is(err, capsule.ErrNoShim):
		err = n.settleCopy(context.Background(), cp)
	}
	if err != nil {
		n.log.Warn("the end of a copy is not settled", "job", cp.record().Job, "err", err)
	}
}

// rootLost tells why a copy's tree is gone for good, or nil.
func (n *Node) rootLost(rec copyRecord) error {
	if n.conf.RootLost == nil {
		return nil
	}
	return n.conf.RootLost(rec.Home, rec.Job, rec.Root)
}

// noteEnd journals the end of a copy and tells its home.
func (n *Node) noteEnd(ctx context.Context, cp *jobCopy, end End) error {
	// A program whose files have gone from under it ends in some way of its own,
	// which says nothing about it.
	if err := n.rootLost(cp.record()); err != nil && end.Lost == "" {
		end.Lost = err.Error()
	}
	// What it wrote to mapped files may still be on its way from this node's
	// cache, and who waits for the job looks at its files next.
	if end.Lost == "" {
		if err := n.syncRoot(ctx, cp); err != nil {
			n.log.Warn("what a job wrote last to mapped files may not be at its home", "job", cp.record().Job, "home", cp.record().Home, "err", err)
		}
	}
	if err := n.note(cp, func(r *copyRecord) { r.Phase, r.End = ended, &end }); err != nil {
		return err
	}
	return n.tellEnd(ctx, cp)
}

// tellAgain is how often a home is told of an end that it knows: it may have
// given the job up while this node could not be reached.
const tellAgain = 30 * time.Second

// tellEnd tells the home how a copy ended, until it has heard. The copy
// stays, with what was not read of its output, until the home discards it or
// knows nothing of it any more.
func (n *Node) tellEnd(ctx context.Context, cp *jobCopy) error {
	rec := cp.record()
	if rec.End == nil || rec.Told && time.Since(time.Unix(0, cp.told.Load())) < tellAgain {
		return nil
	}
	cp.told.Store(time.Now().UnixNano())
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	err := n.conf.Judge.Ended(ctx, rec.Home, rec.Job, Placement{n.conf.Self, rec.Epoch}, *rec.End)
	switch fault.KindOf(err) {
	case fault.NotFound, fault.Refused: // it is not the job any more, or nobody's
		if err != nil {
			return n.remove(ctx, cp)
		}
	}
	if err != nil {
		return err
	}
	return n.note(cp, func(r *copyRecord) { r.Told = true })
}

// Settle brings every copy in order that nobody is working on: after a restart of
// the agent, and from time to time while a home could not be reached. It
// returns the number of copies whose fate is still open.
func (n *Node) Settle(ctx context.Context) int {
	n.mu.Lock()
	var all []*jobCopy
	for _, cp := range n.copies {
		all = append(all, cp)
	}
	n.mu.Unlock()
	open := 0
	for _, cp := range all {
		if err := n.settleCopy(ctx, cp); err != nil {
			open++
			level := slog.LevelWarn
			if errors.Is(err, errOpen) {
				level = slog.LevelDebug // a move is under way
			}
			n.log.Log(ctx, level, "a copy is not settled", "job", cp.record().Job, "epoch", cp.record().Epoch, "err", err)
		}
	}
	return open
}

// errBusy is a capsule that undoes what its agent was killed in.
var errBusy = errors.New("its shim is not done yet")

// errOpen is a copy of which the home has not decided yet.
var errOpen = errors.New("the home has not decided yet")

func (n *Node) settleCopy(ctx context.Context, cp *jobCopy) error {
	if !cp.turn.TryLock() {
		return nil // somebody is at it
	}
	defer cp.turn.Unlock()
	rec := cp.record()
	st, err := cp.c.Status(ctx)
	if errors.Is(err, capsule.ErrNoShim) {
		st.State, err = noShim, nil
	}
	if err != nil {
		return err
	}
	if rec.Phase == gone {
		st.State = noShim // whatever is left of it, the home was told that it never ran
	}
	if rec.Phase == running && st.State == control.Running {
		go n.watch(cp)
	}
	r, epoch := diagnose(rec.Phase, st.State), rec.Epoch
	if r == ask {
		var v Verdict
		if v, epoch, err = n.conf.Judge.Ask(ctx, rec.Home, rec.Job, Placement{n.conf.Self, rec.Epoch}); err != nil {
			return err
		}
		if r = treat(st.State, v); r == leave {
			return errOpen
		}
	}
	if r == leave {
		return nil
	}
	n.log.Info("settle", "job", rec.Job, "epoch", rec.Epoch, "phase", rec.Phase, "state", st.State, "remedy", r)
	switch r {
	case busy:
		return errBusy
	case tell:
		return n.tellEnd(ctx, cp)
	case resume:
		return n.resume(ctx, cp)
	case thaw:
		return n.thaw(ctx, cp, epoch)
	case noteRun:
		return n.note(cp, func(r *copyRecord) { r.Phase = running })
	case noteEnd:
		return n.noteEnd(ctx, cp, End{Exit: st.Exit, Signal: st.Signal})
	case noteLost:
		if last, err := cp.c.LastStatus(); err == nil && last.State == control.Ended {
			return n.noteEnd(ctx, cp, End{Exit: last.Exit, Signal: last.Signal})
		}
		if rec.Phase == frozen {
			// A frozen source that died is no loss: the other copy decides.
			return n.remove(ctx, cp)
		}
		return n.noteEnd(ctx, cp, End{Lost: "its shim died"})
	case noteGone:
		return n.note(cp, func(r *copyRecord) { r.Phase = gone })
	case throwAway:
		return n.remove(ctx, cp)
	}
	return nil
}

// resume lets a restored copy run; turn is held.
func (n *Node) resume(ctx context.Context, cp *jobCopy) error {
	// Journalled before it is done: a node that dies in between must not say that it never ran.
	if err := n.note(cp, func(r *copyRecord) { r.Phase, r.Since = running, time.Now() }); err != nil {
		return err
	}
	err := cp.c.Resume(ctx)
	if err == nil || errors.Is(err, capsule.ErrNoShim) {
		go n.watch(cp)
	}
	return err
}

// thaw lets a frozen source run on, in an epoch; turn is held.
func (n *Node) thaw(ctx context.Context, cp *jobCopy, epoch uint64) error {
	rec := cp.record()
	if epoch != rec.Epoch {
		if err := n.raise(cp, epoch); err != nil {
			return err
		}
	}
	if err := cp.c.Finish(ctx, false); err != nil {
		return err
	}
	if err := os.RemoveAll(n.imagesDir(rec.Capsule)); err != nil {
		n.log.Warn("images are left", "err", err)
	}
	return n.note(cp, func(r *copyRecord) { r.Phase = running })
}

// raise makes a copy that of a later epoch.
func (n *Node) raise(cp *jobCopy, epoch uint64) error {
	old := cp.record()
	if err := n.note(cp, func(r *copyRecord) { r.Epoch = epoch }); err != nil {
		return err
	}
	if err := n.journal.Delete(capsuleName(old.Job, old.Epoch)); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.copies, copyKey{old.Job, old.Epoch})
	n.copies[copyKey{old.Job, epoch}] = cp
	return nil
}

// available is the memory that the kernel would give without swapping.
func available() (int64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	return parseAvailable(string(data))
}

// openDir opens a folder for handing on.
func openDir(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
}
