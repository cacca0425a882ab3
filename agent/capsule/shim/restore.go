package shim

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"

	"mosimg/agent/capsule/control"
	"mosimg/agent/criu/swrk"
	"mosimg/internal/fault"
)

// restore brings a dumped job into this capsule and returns with all of it
// there and frozen, having run no instruction. After an error, or the end
// of ctx, nothing of it is left.
func (s *shim) restore(ctx context.Context, images *os.File, owner control.Owner) (err error) {
	if err := s.change("restore", control.Restoring, control.Empty); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.giveUp(ctx)
			err = fault.New(fault.Refused, "restore", "job in capsule "+s.conf.ID, err, "")
		}
	}()
	im, err := s.loadImage(images, owner)
	if err != nil {
		return err
	}
	if len(im.Pids) == 0 || len(im.Tids) < len(im.Pids) {
		return fmt.Errorf("%s names no processes", imageName)
	}
	pipes, err := newPipes(im.Streams)
	if err != nil {
		return err
	}
	defer pipes.closeJobEnds()
	if err := setLastPid(scratchPids(im.Tids, pidMax())); err != nil {
		return err
	}
	s.reaper.forget()
	var ended <-chan syscall.WaitStatus
	opts := s.options(restoreLog)
	opts.RstSibling = proto.Bool(true)
	for i, ino := range im.Pipes {
		opts.InheritFd = append(opts.InheritFd, &rpc.InheritFd{Key: proto.String(fmt.Sprintf("pipe:[%d]", ino)), Fd: proto.Int32(int32(criuExtraFD + i))})
	}
	resp, err := s.runCRIU(ctx, rpc.CriuReqType_RESTORE, opts, images, pipes.jobEnds(), func(ctx context.Context, n swrk.Notify) error {
		switch n.Stage {
		case swrk.SetupNamespaces:
			// The root task has no child yet; those it makes are born in the job's group.
			return s.job.Move(n.Pid)
		case swrk.PreResume:
			return s.holdRestored(ctx, im.Pids)
		}
		return nil
	})
	if err == nil && int(resp.GetRestore().GetPid()) != im.Leader {
		err = fmt.Errorf("criu restored process %d as the leader; it was %d", resp.GetRestore().GetPid(), im.Leader)
	}
	if err != nil {
		pipes.closeOurEnds()
		return err
	}
	// New processes of the job go on where the old node was, so that the numbers
	// CRIU took stay free for the next restore.
	if err := setLastPid(slices.Max(im.Tids)); err != nil {
		pipes.closeOurEnds()
		return err
	}
	ended = s.reaper.adopt(im.Leader)
	s.adoptJob(im.Leader, im.Program, ended, pipes, im.Streams)
	s.cpuBefore.Store(im.CPUMicros)
	s.mu.Lock()
	s.lastSignal = im.LastSignal
	s.mu.Unlock()
	s.mu.Lock()
	s.set(control.Restored)
	s.mu.Unlock()
	s.settle()
	return nil
}

// holdRestored freezes the job at pre-resume, with all of it in its group:
// what is elsewhere would run before the home has decided.
func (s *shim) holdRestored(ctx context.Context, want []int) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	if err := s.job.Freeze(ctx); err != nil {
		return err
	}
	got, err := s.job.Procs()
	if err != nil {
		return err
	}
	slices.Sort(got)
	want = slices.Sorted(slices.Values(want))
	if !slices.Equal(got, want) {
		return fmt.Errorf("restored processes %v; the job has %v", got, want)
	}
	return nil
}

// resume lets a restored job run, if its user has not stopped it.
func (s *shim) resume() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch s.status.State {
	case control.Running, control.Ended: // asked before
		return nil
	case control.Restored:
	default:
		return fault.New(fault.Refused, "resume", "capsule "+s.conf.ID, "it is "+string(s.status.State), "")
	}
	if !s.status.Stopped {
		if err := s.job.Thaw(); err != nil {
			return err
		}
	}
	s.set(control.Running)
	return nil
}

// defaultPidMax is the kernel's smallest usual limit.
const defaultPidMax = 32768

func pidMax() int {
	data, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		return defaultPidMax
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return defaultPidMax
	}
	return n
}

// scratchPids is a number after which CRIU, and threads that the shim makes
// meanwhile, find numbers that no process or thread of the job has: the
// middle of the widest gap between the job's own.
func scratchPids(job []int, limit int) int {
	edges := append([]int{firstPid}, job...)
	slices.Sort(edges)
	edges = append(edges, limit)
	start, width := firstPid, 0
	for i := range edges[:len(edges)-1] {
		if w := edges[i+1] - edges[i]; w > width {
			start, width = edges[i], w
		}
	}
	return start + width/2
}
