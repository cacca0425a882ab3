// Package runbench measures what mosrun costs beside starting the same program
// plainly: how long a program that does nothing takes, and whether one that only
// computes is slowed down. The home is a node without a cluster in this process,
// with the services and the socket that agents have; jobs run in capsules of
// their own, mosrun is the real command.
package runbench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"mosimg/agent/agentapi"
	"mosimg/agent/capsule"
	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/jobs"
	"mosimg/agent/migrate"
	"mosimg/agent/pages"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// Bench is a home to start jobs at. Make it with New.
type Bench struct {
	dir, group string
	mosrun     string
	node       *migrate.Node
	home       *migrate.Home
	cancel     context.CancelFunc
	work       sync.WaitGroup
}

// New starts the services. mosagent is the agent's program, which is mosrun too;
// "" looks for it beside this program and in PATH. It needs root.
func New(ctx context.Context, mosagent string) (*Bench, error) {
	if os.Geteuid() != 0 {
		return nil, fault.New(fault.Refused, "measure", "mosrun", "only root can make capsules", "run this as root")
	}
	mosagent, err := findAgent(mosagent)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("/dev/shm", "mosimg-bench-")
	if err != nil {
		return nil, fault.New(fault.Environment, "make a folder in", "/dev/shm", err, "a tmpfs is needed there")
	}
	// Jobs that an interrupt has left are ended by the services: they stay until Close.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	b := &Bench{dir: dir, mosrun: filepath.Join(dir, "mosrun"), cancel: cancel}
	if err := b.setUp(ctx, mosagent); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

func findAgent(path string) (string, error) {
	if path == "" {
		if exe, err := os.Executable(); err == nil {
			path = filepath.Join(filepath.Dir(exe), "mosagent")
		}
		if _, err := os.Stat(path); err != nil {
			if path, err = exec.LookPath("mosagent"); err != nil {
				return "", fault.New(fault.Environment, "find", "mosagent", "it is neither beside this program nor in PATH", "name it with --mosagent")
			}
		}
	}
	path, err := filepath.Abs(path)
	if err == nil {
		_, err = exec.LookPath(path)
	}
	if err != nil {
		return "", fault.New(fault.Environment, "use", "mosagent", err, "name another one with --mosagent")
	}
	return path, nil
}

// alone is the cluster of one node.
type alone struct{}

func (alone) Status() api.AgentStatus  { return api.AgentStatus{State: api.StateMember, Node: 1} }
func (alone) Members() api.MemberTable { return api.MemberTable{Self: 1, Members: []api.Member{self}} }

var self = api.Member{Node: 1, Name: "bench", Self: true, Liveness: api.Alive}

// ownTree is the root of jobs at home.
type ownTree struct{}

func (ownTree) Open(context.Context, api.NodeID, migrate.JobID, uint64) (control.Root, error) {
	return control.Root{Dir: "/"}, nil
}
func (ownTree) Sync(context.Context, api.NodeID, migrate.JobID, uint64) error  { return nil }
func (ownTree) Close(context.Context, api.NodeID, migrate.JobID, uint64) error { return nil }

// judge is the only home.
type judge struct{ b *Bench }

func (j judge) Ended(ctx context.Context, home api.NodeID, job migrate.JobID, p migrate.Placement, end migrate.End) error {
	return j.b.home.Ended(ctx, home, job, p, end)
}

func (j judge) Ask(ctx context.Context, home api.NodeID, job migrate.JobID, p migrate.Placement) (migrate.Verdict, uint64, error) {
	return j.b.home.Ask(ctx, home, job, p)
}

func (j judge) Unlocked(ctx context.Context, home api.NodeID, job migrate.JobID, p migrate.Placement) error {
	return j.b.home.Unlocked(ctx, home, job, p)
}

func (b *Bench) setUp(ctx context.Context, mosagent string) error {
	mount, err := cgroup.Mount()
	if err != nil {
		return err
	}
	b.group = filepath.Join(mount, filepath.Base(b.dir))
	if err := os.Symlink(mosagent, b.mosrun); err != nil {
		return err
	}
	nobody := func(context.Context, api.NodeID) (net.Conn, error) { return nil, errors.New("there is no other node") }
	b.node, err = migrate.OpenNode(migrate.NodeConfig{
		Self: 1, Dir: filepath.Join(b.dir, "node"), Cgroup: b.group, Roots: ownTree{}, Dial: nobody,
		CRIU:    func() control.CRIU { return control.CRIU{} },
		Pages:   func() pages.Protocol { return pages.ProtocolOf("") },
		Machine: func() migrate.Machine { return migrate.Machine{NoCRIU: "nothing is moved here"} },
		Judge:   judge{b},
	})
	if err != nil {
		return err
	}
	journal, err := migrate.OpenJournal[migrate.Record](filepath.Join(b.dir, "records"))
	if err != nil {
		return err
	}
	var service *jobs.Service
	b.home, err = migrate.NewHome(migrate.HomeConfig{
		Self: 1, Journal: journal, Peer: func(api.NodeID) migrate.Peer { return b.node },
		Changed: func(r migrate.Record) { service.Changed(r) },
	})
	if err != nil {
		return err
	}
	service, err = jobs.New(jobs.Config{
		Self: 1, Dir: filepath.Join(b.dir, "info"), Home: b.home,
		Capsule: func(job migrate.JobID, at migrate.Placement) (*capsule.Capsule, error) {
			return b.node.Capsule(job, at.Epoch)
		},
		Nodes: func() []api.Member { return []api.Member{self} },
	})
	if err != nil {
		return err
	}
	l, err := agentapi.ListenUnix(b.socket())
	if err != nil {
		return err
	}
	server := agentapi.New(alone{}, nil)
	server.Handle(api.PathJobs, service.Handler())
	server.Handle(api.PathJobs+"/", service.Handler())
	b.work.Go(func() { b.node.Run(ctx) })
	b.work.Go(func() { b.home.Run(ctx) })
	b.work.Go(func() { service.Run(ctx) })
	b.work.Go(func() { _ = server.ServeUnix(ctx, l) }) // mosrun says when there is none
	return nil
}

func (b *Bench) socket() string { return filepath.Join(b.dir, "agent.sock") }

// closeTime bounds the end of jobs that a broken measurement has left.
const closeTime = 10 * time.Second

// Close ends the services and all jobs, and removes what New made.
func (b *Bench) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	var errs []error
	if b.home != nil {
		for _, r := range b.home.Jobs() {
			errs = append(errs, b.node.Discard(ctx, migrate.Order{Job: r.Job, Home: 1, Epoch: r.At.Epoch}))
		}
	}
	b.cancel()
	b.work.Wait()
	if b.group != "" {
		errs = append(errs, cgroup.Remove(ctx, b.group))
	}
	// Capsules mount only in namespaces of their own.
	return errors.Join(append(errs, os.RemoveAll(b.dir))...)
}

// Plain starts a program as a shell would, and gives what it took and said.
func (b *Bench) Plain(ctx context.Context, argv ...string) (time.Duration, string, error) {
	return run(ctx, argv)
}

// Job does the same under mosrun.
func (b *Bench) Job(ctx context.Context, argv ...string) (time.Duration, string, error) {
	return run(ctx, append([]string{b.mosrun, "--socket", b.socket(), "--"}, argv...))
}

func run(ctx context.Context, argv []string) (time.Duration, string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	began := time.Now()
	err := cmd.Run()
	took := time.Since(began)
	if err != nil {
		return 0, "", fault.New(fault.Environment, "run", filepath.Base(argv[0]), fmt.Errorf("%w: %s", err, bytes.TrimSpace(complaint.Bytes())), "")
	}
	return took, out.String(), nil
}
