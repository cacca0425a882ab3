// Package mounts keeps the home files that guests on this node see as their
// root: one FUSE mount, by one small process (package forward), for each copy
// of a job. The processes outlive the agent. They reach the homes through the
// agent, which has the certificates: a restart of the agent is to them a
// link that is cut for a moment.
package mounts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/agent/homefiles/forward"
	"mosimg/agent/homefiles/process"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
)

// Config is what Roots need.
type Config struct {
	Dir    string // on tmpfs
	Self   api.NodeID
	Socket string // of Proxy
	// Lease is how long a home may be silent before its files are given up; 0 is migrate.DefaultLease.
	Lease time.Duration
	Log   *slog.Logger // nil is silent
}

// Roots is migrate.Roots.
type Roots struct {
	conf Config
	log  *slog.Logger
}

// New makes the folder.
func New(conf Config) (*Roots, error) {
	if conf.Lease == 0 {
		conf.Lease = migrate.DefaultLease
	}
	r := &Roots{conf: conf, log: conf.Log}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(conf.Dir, 0o700); err != nil {
		return nil, fault.New(fault.Environment, "make", conf.Dir, err, "")
	}
	return r, nil
}

// A mount has a folder of its own, with these in it. Nothing here may ever be
// removed by walking: below mountName are the home's files.
const (
	mountName   = "root"
	socketName  = "control"
	processName = "process.json"
	logName     = "log"
)

// mount is the folder of one mount.
type mount string

func (r *Roots) mount(job migrate.JobID, epoch uint64) mount {
	return mount(filepath.Join(r.conf.Dir, string(job)+"."+strconv.FormatUint(epoch, 10)))
}

func (m mount) path(name string) string { return filepath.Join(string(m), name) }

// process is who serves the mount; an error if nobody is known to.
func (m mount) process() (id process.ID, err error) {
	data, err := os.ReadFile(m.path(processName))
	if err != nil {
		return id, err
	}
	return id, json.Unmarshal(data, &id)
}

// Open implements migrate.Roots.
func (r *Roots) Open(ctx context.Context, home api.NodeID, job migrate.JobID, epoch uint64) (control.Root, error) {
	if home == r.conf.Self {
		return control.Root{Dir: "/"}, nil
	}
	m := r.mount(job, epoch)
	root := control.Root{Dir: m.path(mountName), Guest: true}
	if id, err := m.process(); err == nil && id.Alive() {
		return root, nil
	}
	if err := m.close(); err != nil { // what an earlier try has left
		return root, err
	}
	if err := os.MkdirAll(root.Dir, 0o755); err != nil {
		return root, err
	}
	conf, err := json.Marshal(forwardConfig{
		Dir: string(m), Capsule: string(job), Epoch: epoch, Home: home, Socket: r.conf.Socket, Lease: r.conf.Lease,
	})
	if err != nil {
		return root, err
	}
	id, err := process.Start(m.path(logName), Verb, string(conf))
	if err == nil {
		var data []byte
		if data, err = json.Marshal(id); err == nil {
			err = atomicfile.Write(m.path(processName), data, 0o600)
		}
		if err != nil {
			id.End()
		}
	}
	if err == nil {
		err = r.await(ctx, m)
	}
	if err != nil {
		return root, errors.Join(fault.New(fault.Unavailable, "mount home files for", "job "+string(job), err, ""), m.close())
	}
	return root, nil
}

// await waits until the mount answers.
func (r *Roots) await(ctx context.Context, m mount) error {
	ctx, cancel := context.WithTimeout(ctx, openTime)
	defer cancel()
	if err := ask(ctx, m, "ready"); err != nil {
		if data, rerr := os.ReadFile(m.path(logName)); rerr == nil && len(data) > 0 {
			r.log.Warn("home files", "mount", string(m), "log", string(data))
		}
		return err
	}
	return nil
}

// lostTime bounds the question whether a mount is there, which a process that has
// one answers at once.
const lostTime = 2 * time.Second

// openTime bounds a mount; syncTime the writing back of what a job has changed
// in mapped files, over a slow link.
const (
	openTime = 15 * time.Second
	syncTime = 2 * time.Minute
)

// Sync implements migrate.Roots.
func (r *Roots) Sync(ctx context.Context, home api.NodeID, job migrate.JobID, epoch uint64) error {
	if home == r.conf.Self {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, syncTime)
	defer cancel()
	m := r.mount(job, epoch)
	fail := func(err error) error {
		return fault.New(fault.Unavailable, "write back home files of", "job "+string(job), err, "")
	}
	synced := make(chan error, 1)
	go func() { synced <- syncfs(m.path(mountName)) }() // it may wait for a link that is gone
	select {
	case err := <-synced:
		if err != nil {
			return fail(err)
		}
	case <-ctx.Done():
		return fail(fmt.Errorf("the home has not taken them: %w", context.Cause(ctx)))
	}
	if err := ask(ctx, m, "drain"); err != nil {
		return fail(err)
	}
	return nil
}

func syncfs(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	if st.Type != unix.FUSE_SUPER_MAGIC {
		return fmt.Errorf("%s is not mounted", dir) // to sync another file system would sync nothing
	}
	return os.NewSyscallError("syncfs", unix.Syncfs(fd))
}

// Lost tells why a tree that was opened is gone for good, or nil.
func (r *Roots) Lost(home api.NodeID, job migrate.JobID, epoch uint64) error {
	if home == r.conf.Self {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), lostTime)
	defer cancel()
	err := ask(ctx, r.mount(job, epoch), "ready")
	if err == nil || ctx.Err() != nil { // a mount that is slow is there
		return nil
	}
	return fault.New(fault.Unavailable, "serve home files of", "job "+string(job), err, "")
}

// Close implements migrate.Roots.
func (r *Roots) Close(_ context.Context, home api.NodeID, job migrate.JobID, epoch uint64) error {
	if home == r.conf.Self {
		return nil
	}
	return r.mount(job, epoch).close()
}

// close ends the mount and removes its folder, file by file.
func (m mount) close() error {
	if id, err := m.process(); err == nil && !id.End() {
		return fmt.Errorf("process %d, which serves %s, does not end", id.PID, m)
	}
	forward.Unmount(m.path(mountName))
	var errs []error
	for _, name := range []string{socketName, processName, logName, mountName, "."} {
		// rmdir, for a folder: it fails on a mount that is still there.
		if err := os.Remove(filepath.Clean(m.path(name))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// dialIn connects to a socket in a folder whose path may be longer than a
// socket's may be.
func dialIn(ctx context.Context, dir, name string) (net.Conn, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var nd net.Dialer
	return nd.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name))
}
