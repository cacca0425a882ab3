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
	"os"
	"path/filepath"
	"strconv"
	"time"

	"mosimg/agent/capsule/control"
	"mosimg/agent/homefiles/forward"
	"mosimg/agent/homefiles/process"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// Config is what Roots need.
type Config struct {
	Dir    string // on tmpfs
	Self   api.NodeID
	Socket string // of Introduce
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

// mount is the folder of one mount.
type mount string

// A mount has a folder of its own, with these in it. Nothing here may ever be
// removed by walking: below mountName are the home's files.
const (
	mountName   = "root"
	socketName  = "control"
	processName = "process.json"
	newSuffix   = ".new" // of a file that is being written
	endName     = "end"  // why the mount is over
	logName     = "log"
)

func (r *Roots) mount(job migrate.JobID, epoch uint64) (mount, error) {
	if name := string(job); name == "" || filepath.Base(name) != name {
		return "", fault.New(fault.Usage, "name a folder for", fmt.Sprintf("job %q", name), "it is no name of a file", "")
	}
	return mount(filepath.Join(r.conf.Dir, string(job)+"."+strconv.FormatUint(epoch, 10))), nil
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

// record writes down that this process serves the mount. It does so itself, before
// anything is mounted, so that no mount is ever without it.
func (m mount) record() error {
	id, err := process.Self()
	if err != nil {
		return err
	}
	data, err := json.Marshal(id)
	if err != nil {
		return err
	}
	path := m.path(processName)
	if err := os.WriteFile(path+newSuffix, data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+newSuffix, path)
}

// openTime bounds a mount, and lostTime the question whether it is there, which
// its process answers at once.
const (
	openTime = 15 * time.Second
	lostTime = 2 * time.Second
)

// Open implements migrate.Roots.
func (r *Roots) Open(ctx context.Context, home api.NodeID, job migrate.JobID, epoch uint64) (control.Root, error) {
	if home == r.conf.Self {
		return control.Root{Dir: "/"}, nil
	}
	m, err := r.mount(job, epoch)
	if err != nil {
		return control.Root{}, err
	}
	root := control.Root{Dir: m.path(mountName), Guest: true}
	fail := func(err error) error {
		return fault.New(fault.Unavailable, "mount home files for", "job "+string(job), err, "")
	}
	ctx, cancel := context.WithTimeout(ctx, openTime)
	defer cancel()
	if id, err := m.process(); err == nil && id.Alive() {
		if _, err := m.ask(ctx, question{Op: opReady}); err != nil {
			return root, fail(err)
		}
		return root, nil
	}
	if err := m.close(); err != nil { // what an earlier try has left
		return root, fail(err)
	}
	if err := m.start(forwardConfig{
		Dir: string(m), Capsule: string(job), Epoch: epoch, Home: home, Socket: r.conf.Socket, Lease: r.conf.Lease,
	}); err != nil {
		return root, errors.Join(fail(err), m.close())
	}
	if _, err := m.ask(ctx, question{Op: opReady}); err != nil {
		if data, rerr := os.ReadFile(m.path(logName)); rerr == nil && len(data) > 0 {
			r.log.Warn("home files", "mount", string(m), "log", string(data))
		}
		return root, errors.Join(fail(err), m.close())
	}
	return root, nil
}

// start starts the process of a mount.
func (m mount) start(conf forwardConfig) error {
	if err := os.MkdirAll(m.path(mountName), 0o755); err != nil {
		return err
	}
	data, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	_, err = process.Start(m.path(logName), Verb, string(data))
	return err
}

// Lost tells why a tree that was opened is gone for good, or nil.
func (r *Roots) Lost(home api.NodeID, job migrate.JobID, epoch uint64) error {
	if home == r.conf.Self {
		return nil
	}
	m, err := r.mount(job, epoch)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), lostTime)
	defer cancel()
	_, err = m.ask(ctx, question{Op: opReady})
	if err == nil {
		return nil
	}
	// A mount that is slow is there, and one that this agent, for some reason of
	// its own, cannot ask.
	var over overError
	if id, perr := m.process(); perr == nil && id.Alive() && !errors.As(err, &over) {
		return nil
	}
	return fault.New(fault.Unavailable, "serve home files of", "job "+string(job), err, "")
}

// Close implements migrate.Roots.
func (r *Roots) Close(_ context.Context, home api.NodeID, job migrate.JobID, epoch uint64) error {
	if home == r.conf.Self {
		return nil
	}
	m, err := r.mount(job, epoch)
	if err == nil {
		err = m.close()
	}
	if err != nil {
		return fault.New(fault.Environment, "unmount home files of", "job "+string(job), err, "")
	}
	return nil
}

// close ends the mount and removes its folder, file by file.
func (m mount) close() error {
	id, err := m.process()
	ended := err != nil || id.End()
	forward.Unmount(m.path(mountName))
	// A process that waits in its own mount ends only now.
	if !ended && !id.End() {
		return fmt.Errorf("process %d, which serves %s, does not end", id.PID, m)
	}
	var errs []error
	for _, name := range []string{socketName, processName + newSuffix, processName, endName, logName, mountName, "."} {
		// rmdir, for a folder: it fails on a mount that is still there.
		if err := os.Remove(filepath.Clean(m.path(name))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
