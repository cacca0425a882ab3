// Package shim is the process that owns a capsule: process 1 of the capsule's
// pid namespace, in its mount namespace, never dumped. It outlives the agent
// that started it, and when it dies the kernel kills all that is in the capsule, so
// nothing is ever left behind.
//
// It sets up what the job sees (root, /proc, /dev, /run), starts the leader,
// is the parent of leader and CRIU, holds the other ends of the job's stdio, and
// freezes the job at the points of a move where nothing else is fast enough:
// at CRIU's post-dump and pre-resume. It decides nothing about a move: an
// agent tells it, over the socket described in package control.
//
// CRIU runs as the shim's child, in the capsule's pid and mount namespaces
// but not in its ipc and uts namespaces. So no mount tree has to be
// dumped, process numbers mean the same to the shim and to CRIU, and what CRIU restores becomes the shim's
// child.
package shim

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/internal/urgent"
)

// Verb is the first argument that makes a program a shim: see Dispatch.
const Verb = "shim"

// launchVerb is the second argument of the short-lived process that becomes
// the leader.
const launchVerb = "launch"

// Descriptors that a shim is started with.
const (
	ConfigFD = 3 // control.Config as JSON, to its end
	ReadyFD  = 4 // the shim writes ReadyWord, or what went wrong, and closes
)

// ReadyWord is a shim's first sign of life.
const ReadyWord = "ready\n"

// SocketName is a shim's socket, in its folder.
const SocketName = "shim.sock"

// StatusName is where the job's end is kept, in the shim's folder: a
// control.Status as JSON.
const StatusName = "status.json"

// Names of the groups below Config.Cgroup. CRIU is not in the job's group, as
// freezing the job would freeze it too.
const (
	ShimLeaf = "shim"
	CRIULeaf = "criu"
	JobLeaf  = "job"
)

// Dispatch runs this process as a shim if its arguments ask for that. Every
// program that starts capsules calls it first thing in main.
func Dispatch(args []string) (code int, ours bool) {
	switch {
	case len(args) < 2 || args[1] != Verb:
		return 0, false
	case len(args) > 2 && args[2] == launchVerb:
		return launchMain(), true
	}
	return Main(), true
}

// Main is the shim. It returns its exit status when its agent has told it to quit.
func Main() int {
	ready := os.NewFile(ReadyFD, "ready")
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	s, err := setUp(log)
	if err != nil {
		fmt.Fprintln(ready, err)
		return 1
	}
	io.WriteString(ready, ReadyWord) //nolint:errcheck // an agent that is gone already will ask the socket
	ready.Close()
	s.serve()
	return 0
}

// setUp makes this process the shim of its capsule. The order matters: what is
// named by a path of the host is opened before the root changes.
func setUp(log *slog.Logger) (*shim, error) {
	if os.Getpid() != 1 {
		return nil, fmt.Errorf("start shim: not process 1 of a pid namespace; only an agent starts shims")
	}
	// Process 1 does not die of a signal that it has no handler for, but Go has
	// handlers for all. Not Ignore, which the job would inherit.
	signal.Notify(make(chan os.Signal, 1), unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGPIPE, unix.SIGUSR1, unix.SIGUSR2)

	if err := urgent.Raise(); err != nil {
		log.Warn("the shim is no more urgent than its job", "why", err)
	}
	// What an agent was started with and did not mean for us: no job may have it.
	if err := unix.CloseRange(ReadyFD+1, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, err
	}
	conf, err := readConfig()
	if err != nil {
		return nil, err
	}
	s := &shim{conf: conf, log: log.With("capsule", conf.ID), stop: make(chan struct{})}
	s.changed = newBroadcast()
	s.status.State = control.Empty
	if s.dir, err = os.OpenRoot(conf.Dir); err != nil {
		return nil, err
	}
	if s.job, err = cgroup.Open(filepath.Join(conf.Cgroup, JobLeaf)); err != nil {
		return nil, err
	}
	if s.criu, err = cgroup.Open(filepath.Join(conf.Cgroup, CRIULeaf)); err != nil {
		return nil, err
	}
	if s.listener, err = listen(conf.Dir); err != nil {
		return nil, err
	}
	if err := enterRoot(conf); err != nil {
		return nil, fmt.Errorf("set up the root of capsule %s: %w", conf.ID, err)
	}
	s.reaper = newReaper()
	go s.reaper.run(context.Background())
	return s, nil
}

func readConfig() (control.Config, error) {
	var conf control.Config
	f := os.NewFile(ConfigFD, "config")
	defer f.Close()
	if err := json.NewDecoder(f).Decode(&conf); err != nil {
		return conf, fmt.Errorf("read the shim's configuration: %w", err)
	}
	return conf, nil
}

// listen makes the socket. A unix socket's path may have 107 bytes, and folders
// may be deep: so the folder is named by a descriptor.
func listen(dir string) (*net.UnixListener, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: "/proc/self/fd/" + strconv.Itoa(int(d.Fd())) + "/" + SocketName})
}

// saveStatus keeps the job's end for an agent that comes after this shim.
func (s *shim) saveStatus(st control.Status) {
	data, err := json.Marshal(st)
	if err == nil {
		err = s.dir.WriteFile(StatusName+".new", data, 0o600)
	}
	if err == nil {
		err = s.dir.Rename(StatusName+".new", StatusName)
	}
	if err != nil {
		s.log.Error("cannot keep the job's status", "err", err)
	}
}
