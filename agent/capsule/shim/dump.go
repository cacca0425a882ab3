package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"mosimg/agent/capsule/control"
	"mosimg/agent/criu/swrk"
	"mosimg/internal/fault"
)

// errAborted is the decision against a move.
var errAborted = errors.New("the move was called off")

// dump dumps the job into images, which it closes, and returns when all of it is in the images folder (and
// its pages in the page socket) and the job is frozen. After an error the
// job runs on as before. The end of ctx before that point aborts; after it
// only finish decides.
func (s *shim) dump(ctx context.Context, images, pages *os.File, gate net.Conn) error {
	if err := s.change("dump", control.Dumping, control.Running); err != nil {
		images.Close()
		return err
	}
	verdict, finished, reached := make(chan bool, 1), make(chan struct{}), make(chan struct{})
	s.mu.Lock()
	s.verdict, s.finished = verdict, finished
	st := s.status
	s.mu.Unlock()

	// The request's end must not disturb what waits for the decision.
	dctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	detach := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	done := make(chan error, 1)
	go func() {
		defer images.Close()
		defer cancel(nil)
		err := s.dumpTo(dctx, st, images, pages, gate, func() bool {
			if !detach() {
				return false
			}
			close(reached)
			return <-verdict
		})
		done <- err
		s.endDump(err)
		close(finished)
	}()
	select {
	case <-reached:
		return nil
	case err := <-done:
		<-finished
		if errors.Is(err, swrk.ErrRace) {
			return fault.New(fault.Unavailable, "dump", "job of capsule "+s.conf.ID, err, "the job runs on; try again")
		}
		return fault.New(fault.Refused, "dump", "job of capsule "+s.conf.ID, err, "the job runs on")
	}
}

// dumpTo runs CRIU. decide is called with the job dumped and frozen, and says
// whether it is to be killed.
func (s *shim) dumpTo(ctx context.Context, st control.Status, images, pages *os.File, gate net.Conn, decide func() bool) error {
	if err := s.movable(st.Leader); err != nil {
		return err
	}
	opts := s.options(dumpLog)
	opts.Pid = proto.Int32(int32(st.Leader))
	extra := []uintptr(nil)
	if pages != nil {
		extra = append(extra, pages.Fd())
		opts.Ps = &rpc.CriuPageServerInfo{Fd: proto.Int32(criuExtraFD)}
	}
	commit := false
	var seizing sync.WaitGroup
	defer seizing.Wait()
	// Until CRIU's end, and not the request's: a CRIU that has begun to seize runs code in the
	// threads before it can let go of them, which a frozen job never does.
	seized, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	if pages != nil {
		// Nobody may read the pages any more; CRIU must not wait for one who does.
		defer context.AfterFunc(ctx, func() { _ = unix.Shutdown(int(pages.Fd()), unix.SHUT_RDWR) })() // else a pipe, whose reader ends it
	}
	_, err := s.runCRIU(ctx, rpc.CriuReqType_DUMP, opts, images, extra, func(ctx context.Context, n swrk.Notify) error {
		switch n.Stage {
		case swrk.PreDump:
			if err := s.quiet(ctx, st, gate); err != nil {
				return err
			}
			seizing.Go(func() { s.thawSeized(seized, st.Leader) })
			return nil
		case swrk.PostDump:
		default:
			return nil
		}
		if err := s.seal(ctx, st, images); err != nil {
			return err
		}
		s.mu.Lock()
		s.set(control.Dumped)
		s.mu.Unlock()
		if commit = decide(); !commit {
			return errAborted
		}
		return nil
	})
	if commit {
		// Also when CRIU died in between: the job is the other node's now.
		return nil
	}
	return err
}

// seal freezes the job at post-dump and saves what CRIU does not. From here
// until the decision the job stands still, even when CRIU dies.
func (s *shim) seal(ctx context.Context, st control.Status, images *os.File) error {
	fctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	if err := s.job.Freeze(fctx); err != nil {
		return err
	}
	pids, err := s.inTree(st.Leader)
	if err != nil {
		return err
	}
	if err := locked(pids); err != nil { // taken since quiet, which cannot be
		return err
	}
	im := image{Leader: st.Leader, Program: st.Program, Pids: pids, Pipes: s.pipes, CPUMicros: s.cpuMicros()}
	s.mu.Lock()
	im.LastSignal = s.lastSignal // no other one can come now
	s.mu.Unlock()
	if im.Tids, err = threadsOf(pids); err != nil {
		return err
	}
	im.Streams.Stopped = st.Stopped
	if im.Streams.Stdin, err = s.stdin.hold(); err != nil {
		return err
	}
	if im.Streams.Stdout, err = s.out[0].drain(); err != nil {
		return err
	}
	if im.Streams.Stderr, err = s.out[1].drain(); err != nil {
		return err
	}
	return s.saveImage(images, im)
}

// endDump carries out the decision, with CRIU gone.
func (s *shim) endDump(err error) {
	ctx, cancel := context.WithTimeout(context.Background(), settleTime)
	defer cancel()
	if err == nil {
		if err := errors.Join(s.criu.Kill(), s.killJob(ctx)); err != nil {
			s.log.Error("the copy of a job that has moved is not gone", "err", err)
		}
		s.mu.Lock()
		s.set(control.Moved)
		s.mu.Unlock()
		return
	}
	s.log.Info("dump ended without a move", "why", err)
	s.stdin.release()
	s.mu.Lock()
	if !s.status.Stopped {
		if err := s.job.Thaw(); err != nil {
			s.log.Error("cannot thaw the job", "err", err)
		}
	} else if err := s.job.Freeze(ctx); err != nil {
		s.log.Error("cannot stop the job again", "err", err)
	}
	s.set(control.Running)
	s.mu.Unlock()
	s.settle() // its leader may have been killed meanwhile
}

// finish decides about a dumped job and returns when that is carried out.
func (s *shim) finish(commit bool) error {
	s.mu.Lock()
	state, verdict, finished := s.status.State, s.verdict, s.finished
	if state != control.Dumped {
		s.mu.Unlock()
		return fault.New(fault.Refused, "finish the move of", "capsule "+s.conf.ID, "it is "+string(state), "")
	}
	select {
	case verdict <- commit:
	default: // decided by another request already
	}
	s.mu.Unlock()
	<-finished
	return nil
}

// movable tells why the job cannot be moved as it is now.
func (s *shim) movable(leader int) error {
	pids, err := s.inTree(leader)
	if err != nil {
		return err
	}
	uids, err := uidsOf(leader)
	if err != nil {
		return err
	}
	if len(uids) == 0 {
		return fmt.Errorf("process %d has no user", leader)
	}
	return pinned(pids, uids[0])
}

// looks is how often a tree that changes meanwhile is looked at.
const looks = 20

// inTree returns the processes of the job, all of which must be the leader's
// descendants: CRIU would leave others behind without an error. In a job that runs, one may
// end between the list and the look at it, and leave children that seem to be strays.
func (s *shim) inTree(leader int) (pids []int, err error) {
	for range looks {
		if pids, err = s.job.Procs(); err != nil {
			return nil, err
		}
		var parents map[int]int
		parents, err = ancestry(pids, leader)
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH):
			continue
		case err != nil:
			return nil, err
		}
		stray := strayIn(pids, parents, leader)
		if stray < 0 {
			return pids, nil
		}
		err = fmt.Errorf("process %d (%s) is in the job's group, but not in its tree", stray, nameOf(stray))
	}
	return nil, err
}

// ancestry is the parent of each of pids, and of each process between them and
// the leader: one that is about to be gone is no longer in its group's list, but still has its
// children.
func ancestry(pids []int, leader int) (parents map[int]int, err error) {
	parents = make(map[int]int)
	for _, pid := range pids {
		for p := pid; p > 1 && p != leader; p = parents[p] {
			if _, seen := parents[p]; seen {
				break
			}
			if parents[p], err = parentOf(p); err != nil {
				return nil, err
			}
		}
	}
	return parents, nil
}

// threadsOf lists the threads of processes, themselves among them.
func threadsOf(pids []int) (tids []int, err error) {
	for _, pid := range pids {
		names, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			tid, err := strconv.Atoi(n.Name())
			if err != nil {
				return nil, err
			}
			tids = append(tids, tid)
		}
	}
	return tids, nil
}

// strayIn is one of pids that does not descend from leader, or -1.
func strayIn(pids []int, parents map[int]int, leader int) int {
	for _, pid := range pids {
		p := pid
		for range len(parents) {
			if p == leader {
				break
			}
			p = parents[p]
		}
		if p != leader {
			return pid
		}
	}
	return -1
}

func parentOf(pid int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// pid (comm) state ppid: comm may have anything in it, so its end is the last parenthesis.
	f := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(f) < 2 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", pid, data)
	}
	return strconv.Atoi(f[1])
}
