package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/capsule/leader"
	"mosimg/internal/fault"
)

// shim is a capsule from the inside.
type shim struct {
	conf     control.Config
	log      *slog.Logger
	dir      *os.Root // the folder of the capsule, which no path leads to any more
	job      *cgroup.Leaf
	criu     *cgroup.Leaf
	listener *net.UnixListener
	reaper   *reaper
	changed  *broadcast // after every change of status
	stop     chan struct{}
	quit     sync.Once // closes stop
	// leaderImage is the program of a restored job's leader; set before the job is there.
	leaderImage []byte
	// cpuBefore is how long the job has run on other nodes, in microseconds.
	cpuBefore atomic.Int64

	mu     sync.Mutex // guards the following
	status control.Status
	// ended is how the leader ended, once it has. settle decides what that means.
	ended *syscall.WaitStatus
	// lastSignal is the highest ID of a signal that the job was sent, here or before.
	lastSignal uint64
	// verdict takes the decision about a dumped job; finished closes when it
	// is carried out. Both are there in state Dumped only.
	verdict  chan bool
	finished chan struct{}
	stdin    *inStream
	pipes    [3]uint64     // inode numbers of stdin, stdout, stderr
	out      [2]*outStream // stdout, stderr
}

// firstPid is where the processes of a job begin. Below it are the threads of
// the shim, which at the next node may have other numbers.
const firstPid = 1000

// settleTime bounds the wait for what was killed to be gone, and for what was
// told to freeze to stand still. Longer than that only a process takes that
// waits for a dead file server.
const settleTime = 10 * time.Second

// change moves the capsule from one of the states to another, or refuses.
func (s *shim) change(op string, to control.State, from ...control.State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if slices.Contains(from, s.status.State) {
		s.set(to)
		return nil
	}
	return fault.New(fault.Refused, op, "capsule "+s.conf.ID, "it is "+string(s.status.State), "")
}

// set changes the state; mu is held.
func (s *shim) set(to control.State) {
	s.log.Info("state", "from", s.status.State, "to", to)
	s.status.State = to
	s.changed.wake()
}

func (s *shim) query() control.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

// start runs the program of a new job.
func (s *shim) start(ctx context.Context, spec *control.Spec) (err error) {
	if spec == nil {
		return fault.New(fault.Usage, "start", "capsule "+s.conf.ID, "no program", "")
	}
	if err := s.change("start", control.Restoring, control.Empty); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.giveUp(ctx)
		}
	}()
	if err := userRunDir(spec.UID, spec.GID); err != nil {
		return err
	}
	pipes, err := newPipes(streamState{})
	if err != nil {
		return err
	}
	defer pipes.closeJobEnds()
	if err := setLastPid(firstPid - 1); err != nil {
		return err
	}
	l, err := s.launch(spec, pipes)
	if err != nil {
		pipes.closeOurEnds()
		return err
	}
	s.adoptJob(l.pid, l.program, l.ended, pipes, streamState{})
	s.mu.Lock()
	s.set(control.Running)
	s.mu.Unlock()
	s.settle()
	return nil
}

// adoptJob makes a tree of processes the capsule's job.
func (s *shim) adoptJob(leader, program int, ended <-chan syscall.WaitStatus, p *pipes, st streamState) {
	s.mu.Lock()
	s.status.Leader, s.status.Program, s.status.Stopped = leader, program, st.Stopped
	s.stdin = newInStream(p, st.Stdin)
	s.pipes = p.numbers
	s.out[0] = newOutStream(p.stdout, st.Stdout)
	s.out[1] = newOutStream(p.stderr, st.Stderr)
	s.mu.Unlock()
	s.changed.wake()
	go func() {
		ws := <-ended
		s.mu.Lock()
		s.ended = &ws
		s.mu.Unlock()
		s.settle()
	}()
}

// settle ends the job if its leader has ended and nobody is about to decide
// something else about it.
func (s *shim) settle() {
	s.mu.Lock()
	state, ws := s.status.State, s.ended
	s.mu.Unlock()
	if ws == nil || state != control.Running && state != control.Restored {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	// The leader ends last, unless it was killed.
	if err := s.killJob(ctx); err != nil {
		s.log.Error("processes of an ended job are left", "err", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status.State != state {
		return
	}
	if ws.Signaled() {
		s.status.Signal, s.status.Core = int(ws.Signal()), ws.CoreDump()
	} else {
		s.status.Exit = ws.ExitStatus()
	}
	st := s.status
	st.State = control.Ended
	s.saveStatus(st)
	s.set(control.Ended)
}

// giveUp ends in state Failed with nothing left of a job that was to be here.
func (s *shim) giveUp(context.Context) {
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	if err := errors.Join(s.criu.Kill(), s.killJob(ctx)); err != nil {
		s.log.Error("processes of a failed job are left", "err", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.set(control.Failed)
}

func (s *shim) killJob(ctx context.Context) error {
	return errors.Join(s.job.Kill(), s.job.AwaitEmpty(ctx))
}

// kill kills the job, whatever it is doing. A restored job that never ran here
// has not ended: it was given up.
func (s *shim) kill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	if s.query().State == control.Restored {
		if err := s.change("kill", control.Failed, control.Restored); err == nil {
			return s.killJob(ctx)
		}
	}
	return s.killJob(ctx)
}

// signal sends a signal to the program or to its process group. The group is
// the leader's too; it has all signals blocked, but KILL and STOP cannot be.
// While the job is being dumped it takes none: one that comes after CRIU has read
// the process's pending signals would be lost by the move.
func (s *shim) signal(req control.Request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.status
	if st.State != control.Running {
		return fault.New(fault.Refused, "signal", "capsule "+s.conf.ID, "it is "+string(st.State), "try again in a moment")
	}
	if req.ID != 0 && req.ID <= s.lastSignal {
		return nil // it came before, and its sender did not hear that
	}
	sig, target := syscall.Signal(req.Signal), st.Program
	if req.Group && sig != unix.SIGKILL && sig != unix.SIGSTOP {
		target = -st.Leader
	}
	err := unix.Kill(target, sig)
	if err == unix.ESRCH { // the program is gone; daemons of its may be left
		return fault.New(fault.NotFound, "signal", "program of capsule "+s.conf.ID, fmt.Errorf("it has ended: %w", err), "")
	}
	if err == nil {
		s.lastSignal = max(s.lastSignal, req.ID)
	}
	return err
}

// setStopped freezes the job for its user, or lets it run on.
func (s *shim) setStopped(ctx context.Context, stopped bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.status.State {
	case control.Running:
	case control.Restored:
		s.status.Stopped = stopped // Resume looks at it
		return nil
	default:
		return fault.New(fault.Refused, "stop or continue", "capsule "+s.conf.ID, "it is "+string(s.status.State), "try again in a moment")
	}
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	var err error
	if stopped {
		err = s.job.Freeze(ctx)
	} else {
		err = s.job.Thaw()
	}
	if err == nil {
		s.status.Stopped = stopped
		s.changed.wake()
	}
	return err
}

// launched is a leader that has started its program.
type launched struct {
	pid     int
	program int
	ended   <-chan syscall.WaitStatus
}

// launch starts the process that becomes the leader, and waits until the
// program runs or is known not to.
func (s *shim) launch(spec *control.Spec, p *pipes) (launched, error) {
	var l launched
	var ours, theirs []*os.File
	defer func() { control.CloseAll(ours); control.CloseAll(theirs) }()
	for range 3 { // leader's report, spec, error
		r, w, err := os.Pipe()
		if err != nil {
			return l, err
		}
		ours, theirs = append(ours, r), append(theirs, w)
	}
	ours[1], theirs[1] = theirs[1], ours[1] // the spec goes the other way
	group, err := s.job.File()
	if err != nil {
		return l, err
	}
	defer group.Close()
	attr := &syscall.ProcAttr{
		Dir:   "/",
		Env:   []string{},
		Files: append(p.jobEnds(), theirs[0].Fd(), theirs[1].Fd(), theirs[2].Fd()),
		Sys: &syscall.SysProcAttr{
			Setsid:      true,
			Cloneflags:  unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
			UseCgroupFD: true,
			CgroupFD:    int(group.Fd()),
		},
	}
	pid, ended, err := s.reaper.start([]string{"/proc/self/exe", Verb, launchVerb}, attr)
	if err != nil {
		return l, err
	}
	control.CloseAll(theirs)
	theirs = nil
	go func(w *os.File) {
		json.NewEncoder(w).Encode(spec) //nolint:errcheck // the other end says what it misses
		w.Close()
	}(ours[1])
	ours = []*os.File{ours[0], ours[2]}
	var failure control.Error
	if json.NewDecoder(ours[1]).Decode(&failure) == nil {
		<-ended
		return l, failure.Err()
	}
	program, err := leader.Started(ours[0])
	if err != nil {
		s.job.Kill() //nolint:errcheck // the leader ends by itself
		<-ended
		kind := fault.Refused
		if errors.Is(err, unix.ENOENT) {
			kind = fault.NotFound
		}
		hint := ""
		if !errors.Is(err, leader.ErrExec) {
			hint = "are its resource limits (ulimit -a) large enough to start a program?"
		}
		return l, fault.New(kind, "run", spec.Argv[0], err, hint)
	}
	return launched{pid: pid, program: program, ended: ended}, nil
}

// setLastPid makes the kernel give out numbers after this one.
func setLastPid(pid int) error {
	f, err := os.OpenFile("/proc/sys/kernel/ns_last_pid", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(strconv.Itoa(pid))
	return err
}

// userRunDir makes what XDG_RUNTIME_DIR usually names.
func userRunDir(uid, gid uint32) error {
	dir := filepath.Join("/run/user", strconv.FormatUint(uint64(uid), 10))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.Chown(dir, int(uid), int(gid))
}

// contentHash names small things by their content; nobody gains by a collision.
func contentHash(b []byte) []byte {
	h := fnv.New64a()
	h.Write(b)
	return h.Sum(nil)
}
