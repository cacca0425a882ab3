package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"google.golang.org/protobuf/proto"

	"mosimg/agent/criu/swrk"
	"mosimg/internal/fault"
	"mosimg/internal/urgent"
)

// Descriptors of a CRIU worker, beside stdio.
const (
	criuSocketFD = 3
	criuImagesFD = 4
	criuExtraFD  = 5 // the first of what a dump or restore adds
)

// hangLimit bounds a dump or restore: CRIU has been seen to hang for ever. A
// gigabyte takes some seconds; a slow link that the pages go over is bounded
// by the agent, which closes the page socket.
const hangLimit = 10 * time.Minute

// exitTime is how long CRIU may take to end after its last word. It is killed then, and the
// job with it if CRIU still has code of its own in it: better that the job waits for longer.
const exitTime = 20 * time.Second

// ghostLimit is the largest deleted file that travels with the images.
const ghostLimit = 256 << 20

// options are those that dump and restore share.
func (s *shim) options(log string) *rpc.CriuOpts {
	level := s.conf.CRIU.LogLevel
	if level == 0 {
		level = 2
	}
	return &rpc.CriuOpts{
		// Not by ImagesDirFd: CRIU would look the descriptor up in /proc/PID of
		// whom it takes for its client.
		ImagesDirFd:   proto.Int32(-1),
		ImagesDir:     proto.String(fmt.Sprintf("/proc/self/fd/%d", criuImagesFD)),
		LogFile:       proto.String(log),
		LogLevel:      proto.Int32(int32(level)),
		NotifyScripts: proto.Bool(true),
		ExtUnixSk:     proto.Bool(true),
		// No FileLocks: restore would wait for the lock that the frozen source holds
		// until it is killed. Locks in home files are the home's, and CRIU sees none.
		LinkRemap:         proto.Bool(true),
		GhostLimit:        proto.Uint32(ghostLimit),
		EvasiveDevices:    proto.Bool(true),
		ManageCgroups:     proto.Bool(true),
		ManageCgroupsMode: rpc.CriuCgMode_IGNORE.Enum(),
		NetworkLock:       rpc.CriuNetworkLockMethod_SKIP.Enum(),
		SkipFileRwxCheck:  proto.Bool(true),
	}
}

// runCRIU runs one request in a CRIU of its own, in the capsule's group for
// it. Its error is one line that says why, from CRIU's log.
func (s *shim) runCRIU(ctx context.Context, kind rpc.CriuReqType, opts *rpc.CriuOpts, images *os.File, extra []uintptr, on func(context.Context, swrk.Notify) error) (*rpc.CriuResp, error) {
	if s.conf.CRIU.Bundle == "" || len(s.conf.CRIU.Argv) == 0 {
		return nil, errors.New("this node has no CRIU")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, hangLimit, fmt.Errorf("criu does not end in %v", hangLimit))
	defer cancel()
	conn, sock, err := swrk.Pair()
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	defer sock.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	group, err := s.criu.File()
	if err != nil {
		return nil, err
	}
	defer group.Close()
	var argv []string
	for _, a := range s.conf.CRIU.Argv {
		argv = append(argv, strings.ReplaceAll(a, s.conf.CRIU.Bundle, bundleDir))
	}
	argv = append(argv, swrk.Args(criuSocketFD)...)
	attr := &syscall.ProcAttr{
		Dir: "/",
		// No HOME: CRIU would look there for its configuration.
		Env:   append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, s.conf.CRIU.Env...),
		Files: append([]uintptr{null.Fd(), null.Fd(), null.Fd(), sock.Fd(), images.Fd()}, extra...),
		Sys:   &syscall.SysProcAttr{Setsid: true, UseCgroupFD: true, CgroupFD: int(group.Fd())},
	}
	pid, ended, err := s.reaper.start(argv, attr)
	if err != nil {
		return nil, fault.New(fault.Environment, "start", "criu", err, "is the CRIU bundle complete?")
	}
	s.log.Debug("criu", "pid", pid, "request", kind)
	if err := urgent.RaiseSession(pid); err != nil {
		s.log.Warn("criu is no more urgent than jobs: they stand still for longer", "why", err)
	}
	sock.Close()
	resp, err := conn.Do(ctx, &rpc.CriuReq{Type: kind.Enum(), Opts: opts}, on)
	_ = conn.Close()
	select {
	case <-ended:
	case <-time.After(exitTime):
		err = errors.Join(err, s.criu.Kill())
		<-ended
	}
	if err == nil {
		return resp, nil
	}
	if errors.Is(err, errAborted) {
		return nil, err
	}
	log := readLog(images, opts.GetLogFile())
	if why := swrk.Explain(log); why != "" && errors.Is(err, swrk.ErrFailed) {
		err = fmt.Errorf("criu: %s", why)
		if swrk.Raced(log) {
			err = fmt.Errorf("%w (%w)", swrk.ErrRace, err)
		}
	}
	return nil, err
}

// readLog is what CRIU has written, as far as it can be read.
func readLog(images *os.File, name string) string {
	root, err := openRoot(images)
	if err != nil {
		return ""
	}
	defer root.Close()
	data, err := root.ReadFile(name)
	if err != nil {
		return ""
	}
	return string(data)
}
