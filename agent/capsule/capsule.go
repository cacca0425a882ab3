// Package capsule runs jobs in capsules: what a job lives in on one node.
//
// A capsule is a pid, a mount, an ipc and a uts namespace, a control group,
// and a shim (package shim) that owns them and outlives the agent. The root
// is the home's tree: bound at home, home files elsewhere; /proc, /dev,
// /dev/shm and /run are the capsule's own. A capsule holds one job in its life:
// started in it, or restored in it. A job moves by being dumped in one
// capsule and restored in another, so the name of a capsule is that of a job at
// one epoch.
//
// This package is the agent's side: it starts shims, finds those that an
// earlier agent started, talks to them, and removes what is left of a capsule.
// It knows nothing about moves between machines: that is package migrate.
package capsule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/capsule/shim"
	"mosimg/internal/fault"
)

// Config says how to make a capsule. ID, Dir, Cgroup, Root and CRIU are required.
type Config struct {
	control.Config
	// Exe is the program that runs as shim: one that calls shim.Dispatch. ""
	// is this process's own.
	Exe string
}

// Capsule is a running shim. Its methods may be called by many goroutines.
type Capsule struct {
	id     string
	dir    string
	cgroup string
	// remote connects to a capsule on another node; nil for one that is here.
	remote func(context.Context) (net.Conn, error)
}

// Remote is a capsule on another node, by connections that lead to Bridge
// there. It can do what control.Request.Remote allows.
func Remote(id string, connect func(context.Context) (net.Conn, error)) *Capsule {
	return &Capsule{id: id, remote: connect}
}

// Bridge serves one connection of another node's Remote: one request, and
// what follows from it. It closes the connection.
func (c *Capsule) Bridge(ctx context.Context, conn net.Conn) error {
	defer conn.Close()
	var req control.Request
	if _, err := control.Receive(conn, &req); err != nil {
		return err
	}
	if !req.Remote() {
		err := fault.New(fault.Refused, string(req.Verb), "capsule "+c.id, "another node may not ask for that", "")
		return control.Send(conn, control.Answer{Error: control.FromError(err)})
	}
	shim, err := c.dial(ctx)
	if err != nil {
		return control.Send(conn, control.Answer{Error: control.FromError(err)})
	}
	defer shim.Close()
	if err := control.Send(shim, req); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	done := make(chan struct{})
	go func() { // what the other node sends, its end above all
		defer close(done)
		if req.Stream() {
			_, _ = io.Copy(shim, conn)
		} else {
			_, _ = conn.Read(make([]byte, 1))
		}
		shim.Close()
	}()
	if req.Stream() {
		_, err = io.Copy(conn, shim)
	} else {
		var a control.Answer
		if _, err = control.Receive(shim, &a); err == nil {
			err = control.Send(conn, a)
		}
	}
	conn.Close()
	<-done
	return err
}

// startTime bounds the set-up of a capsule, which takes some 30 ms. What may
// take long is a root on a link that has just gone.
const startTime = 15 * time.Second

// Start makes an empty capsule. Its folder and control groups are made, and are
// gone again after an error.
func Start(ctx context.Context, conf Config) (_ *Capsule, err error) {
	defer func() {
		if err != nil {
			err = fault.New(fault.Environment, "start", "capsule "+conf.ID, err, "")
		}
	}()
	if err := os.MkdirAll(filepath.Dir(conf.Dir), 0o700); err != nil {
		return nil, err
	}
	if err := os.Mkdir(conf.Dir, 0o700); err != nil {
		return nil, err
	}
	c := &Capsule{id: conf.ID, dir: conf.Dir, cgroup: conf.Cgroup}
	defer func() {
		if err != nil {
			rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTime)
			defer cancel()
			err = errors.Join(err, c.Remove(rctx))
		}
	}()
	for _, name := range []string{shim.CRIULeaf, shim.JobLeaf} {
		l, err := cgroup.Create(filepath.Join(conf.Cgroup, name))
		if err != nil {
			return nil, err
		}
		_ = l.Close()
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	if err := spawn(ctx, conf); err != nil {
		return nil, err
	}
	return c, nil
}

// spawn starts the shim and waits for its first word.
func spawn(ctx context.Context, conf Config) error {
	own, err := cgroup.Create(filepath.Join(conf.Cgroup, shim.ShimLeaf))
	if err != nil {
		return err
	}
	defer func() { _ = own.Close() }()
	group, err := own.File()
	if err != nil {
		return err
	}
	defer group.Close()
	log, err := os.OpenFile(filepath.Join(conf.Dir, "shim.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	confR, confW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer confW.Close()
	readyR, readyW, err := os.Pipe()
	if err != nil {
		confR.Close()
		return err
	}
	defer readyR.Close()
	exe := conf.Exe
	if exe == "" {
		exe = "/proc/self/exe"
	}
	cmd := &exec.Cmd{
		Path:       exe,
		Args:       []string{"mosimg-shim", shim.Verb, conf.ID},
		Dir:        "/",
		Env:        []string{},
		Stderr:     log,
		ExtraFiles: []*os.File{confR, readyW}, // shim.ConfigFD, shim.ReadyFD
		SysProcAttr: &unix.SysProcAttr{
			Setsid:      true,
			Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS,
			UseCgroupFD: true,
			CgroupFD:    int(group.Fd()),
		},
	}
	err = cmd.Start()
	confR.Close()
	readyW.Close()
	if err != nil {
		return err
	}
	go cmd.Wait() //nolint:errcheck // its end is seen at its socket; here it is only reaped
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	if err := json.NewEncoder(confW).Encode(conf.Config); err != nil {
		return err
	}
	confW.Close()
	word, err := io.ReadAll(io.LimitReader(readyR, 4096))
	if err != nil {
		return err
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case len(word) == 0:
		return fmt.Errorf("its shim ended before it was ready; %s", tail(filepath.Join(conf.Dir, "shim.log")))
	case string(word) != shim.ReadyWord:
		return errors.New(strings.TrimSpace(string(word)))
	}
	return nil
}

// tail is the last line of a log, in words.
func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	if last := lines[len(lines)-1]; last != "" {
		return "it said: " + last
	}
	return "it said nothing, so it was killed: is there memory left?"
}

// Attach is a capsule that an earlier agent made: with its shim running or not.
func Attach(id, dir, cgroup string) *Capsule { return &Capsule{id: id, dir: dir, cgroup: cgroup} }

// ID is the capsule's name.
func (c *Capsule) ID() string { return c.id }

// dial connects to the shim.
func (c *Capsule) dial(ctx context.Context) (net.Conn, error) {
	if c.remote != nil {
		return c.remote(ctx)
	}
	d, err := os.Open(c.dir)
	if err != nil {
		return nil, c.gone(err)
	}
	defer d.Close()
	// By descriptor, because a socket's path may have 107 bytes only.
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: "/proc/self/fd/" + strconv.Itoa(int(d.Fd())) + "/" + shim.SocketName})
	if err != nil {
		return nil, c.gone(err)
	}
	return conn, nil
}

// ErrNoShim is a capsule without a shim: nothing of it runs any more.
var ErrNoShim = errors.New("its shim is gone")

func (c *Capsule) gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
		err = fmt.Errorf("%w (%w)", ErrNoShim, err)
	}
	return fault.New(fault.Unavailable, "talk to", "capsule "+c.id, err, "")
}

// call is one request and its answer. The end of ctx hangs up.
func (c *Capsule) call(ctx context.Context, req control.Request, files ...*os.File) (control.Status, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return control.Status{}, err
	}
	defer conn.Close()
	a, err := c.exchange(ctx, conn, req, files...)
	return a.Status, err
}

func (c *Capsule) exchange(ctx context.Context, conn net.Conn, req control.Request, files ...*os.File) (a control.Answer, err error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err = control.Send(conn, req, files...)
	if err == nil {
		var extra []*os.File
		extra, err = control.Receive(conn, &a)
		control.CloseAll(extra)
	}
	if ctx.Err() != nil && err != nil {
		return a, context.Cause(ctx)
	}
	if err != nil {
		return a, c.gone(err)
	}
	return a, a.Error.Err()
}

// Run starts a program as the capsule's job. The error wraps the errno when
// the program cannot be run: ENOENT for one that is not there.
func (c *Capsule) Run(ctx context.Context, spec control.Spec) (control.Status, error) {
	return c.call(ctx, control.Request{Verb: control.Start, Spec: &spec})
}

// Status is what the shim knows about the job.
func (c *Capsule) Status(ctx context.Context) (control.Status, error) {
	return c.call(ctx, control.Request{Verb: control.Query})
}

// Measure is Status with what the job takes.
func (c *Capsule) Measure(ctx context.Context) (control.Status, error) {
	return c.call(ctx, control.Request{Verb: control.Query, Measure: true})
}

// Wait returns when the job has ended, has been committed elsewhere, or has been given up.
func (c *Capsule) Wait(ctx context.Context) (control.Status, error) {
	return c.call(ctx, control.Request{Verb: control.Wait})
}

// LastStatus is how a job ended whose shim is gone, if that is known.
func (c *Capsule) LastStatus() (control.Status, error) {
	var st control.Status
	data, err := os.ReadFile(filepath.Join(c.dir, shim.StatusName))
	if err != nil {
		return st, err
	}
	return st, json.Unmarshal(data, &st)
}

// Dump dumps the job into the folder images and returns when it is frozen and
// complete there; Finish then decides. With a page socket, memory goes to it by
// CRIU's page-server protocol. After an error the job runs on. The end of
// ctx calls the dump off.
func (c *Capsule) Dump(ctx context.Context, images, pages *os.File) error {
	files := []*os.File{images}
	if pages != nil {
		files = append(files, pages)
	}
	_, err := c.call(ctx, control.Request{Verb: control.Dump}, files...)
	return err
}

// DumpWhen is Dump in a moment of which quiet says, by nil, that it is a good
// one. It is asked again and again, with the job frozen meanwhile; after a while its
// error is that of the dump.
func (c *Capsule) DumpWhen(ctx context.Context, images, pages *os.File, quiet func(context.Context) error) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "gate"), os.NewFile(uintptr(fds[1]), "gate")
	defer theirs.Close()
	gate, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return err
	}
	var asked sync.WaitGroup
	defer asked.Wait()
	defer gate.Close()
	asked.Go(func() {
		var req control.Request
		for {
			if _, err := control.Receive(gate, &req); err != nil {
				return // nothing more is asked
			}
			if control.Send(gate, control.Answer{Error: control.FromError(quiet(ctx))}) != nil {
				return
			}
		}
	})
	_, err = c.call(ctx, control.Request{Verb: control.Dump}, images, pages, theirs)
	return err
}

// Finish decides about a dumped job: with commit it is killed here, otherwise
// it runs on.
func (c *Capsule) Finish(ctx context.Context, commit bool) error {
	_, err := c.call(ctx, control.Request{Verb: control.Finish, Commit: commit})
	return err
}

// Restore brings a dumped job, of this owner, into an empty capsule and returns with it there
// and frozen; Resume then lets it run. After an error nothing of it is left
// and the capsule is of no more use.
func (c *Capsule) Restore(ctx context.Context, images *os.File, owner control.Owner) error {
	_, err := c.call(ctx, control.Request{Verb: control.Restore, Owner: &owner}, images)
	return err
}

// Resume lets a restored job run.
func (c *Capsule) Resume(ctx context.Context) error {
	_, err := c.call(ctx, control.Request{Verb: control.Resume})
	return err
}

// Stop freezes the job as SIGTSTP would; Cont lets it run on. It stays stopped when it moves.
func (c *Capsule) Stop(ctx context.Context) error {
	_, err := c.call(ctx, control.Request{Verb: control.Stop})
	return err
}

// Cont undoes Stop.
func (c *Capsule) Cont(ctx context.Context) error {
	_, err := c.call(ctx, control.Request{Verb: control.Cont})
	return err
}

// Kill kills every process of the job.
func (c *Capsule) Kill(ctx context.Context) error {
	_, err := c.call(ctx, control.Request{Verb: control.Kill})
	return err
}

// Signal sends a signal to the job's program, or to its process group, as a
// terminal does for the interrupt key.
func (c *Capsule) Signal(ctx context.Context, sig unix.Signal, group bool) error {
	_, err := c.call(ctx, control.Request{Verb: control.Signal, Signal: int(sig), Group: group})
	return err
}

// SignalOnce is Signal for the id-th one: if it is sent again, or one before it, it
// arrives once, also when the job has moved in between. 0 is Signal itself.
func (c *Capsule) SignalOnce(ctx context.Context, id uint64, sig unix.Signal, group bool) error {
	_, err := c.call(ctx, control.Request{Verb: control.Signal, ID: id, Signal: int(sig), Group: group})
	return err
}

// Remove ends the shim, kills what is left and removes the folder and the
// control groups. It is no error if any of them is gone already.
func (c *Capsule) Remove(ctx context.Context) error {
	if _, err := c.call(ctx, control.Request{Verb: control.Quit}); err != nil && !errors.Is(err, ErrNoShim) {
		return err
	}
	var errs []error
	// The shim first: it is process 1, so nothing survives it.
	for _, name := range []string{shim.ShimLeaf, shim.JobLeaf, shim.CRIULeaf, "."} {
		errs = append(errs, cgroup.Remove(ctx, filepath.Join(c.cgroup, name)))
	}
	// The capsule's mounts went with its namespace; nothing is mounted here.
	errs = append(errs, os.RemoveAll(c.dir))
	return errors.Join(errs...)
}
