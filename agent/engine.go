package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"mosimg/agent/agentapi"
	"mosimg/agent/capsule"
	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/homefiles/home"
	"mosimg/agent/homefiles/keeper"
	"mosimg/agent/homefiles/mounts"
	"mosimg/agent/jobs"
	"mosimg/agent/migrate"
	"mosimg/agent/pages"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/unixhttp"
	"mosimg/internal/upgrade"
	"mosimg/internal/version"
)

// engine carries jobs: those that were started here (home, service) and those
// that are here (node). It begins when this machine gets its number, and goes
// on when membership ends: jobs outlive that as they outlive the agent.
type engine struct {
	self    api.NodeID
	node    *migrate.Node
	home    *migrate.Home
	files   *keeper.Client
	roots   *mounts.Roots
	server  migrate.Server
	service *jobs.Service
	// balancer decides which of the jobs that are here go elsewhere.
	balancer *balancer
}

// Folders below Config.JobsDir. All are in memory: a home's journal on a disk
// would tell of jobs whose mosrun, terminal and pipes ended with the machine.
const (
	homeDir   = "home"
	nodeDir   = "node"
	mountsDir = "files"
)

// openEngine takes over what an earlier agent left, or begins with nothing.
func (a *Agent) openEngine(self api.NodeID) (*engine, error) {
	group := a.cfg.Cgroup
	if group == "" {
		mount, err := cgroup.Mount()
		if err != nil {
			return nil, err
		}
		group = filepath.Join(mount, "mosimg")
	}
	e := &engine{self: self}
	dir := filepath.Join(a.cfg.JobsDir, strconv.Itoa(int(self)))
	for _, sub := range []string{homeDir, nodeDir, mountsDir} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fault.New(fault.Environment, "make", filepath.Join(dir, sub), err, "")
		}
	}
	e.files = keeper.NewClient(keeper.ClientConfig{
		Socket:  filepath.Join(dir, "keeper.sock"),
		LogFile: filepath.Join(dir, "keeper.log"),
		Self:    self,
		Owner:   func(job migrate.JobID) (home.Cred, error) { return e.service.Owner(job) },
		Log:     a.log,
	})
	var err error
	e.roots, err = mounts.New(mounts.Config{Dir: filepath.Join(dir, mountsDir), Self: self, Socket: a.homeFilesSocket(), Lease: a.cfg.Lease, Log: a.log})
	if err != nil {
		return nil, err
	}
	client := migrate.Client{Dial: a.dialMigrate}
	e.balancer = &balancer{
		self: self, client: client, members: a.Members, own: a.ownLoad, mode: a.mode.get, off: a.cfg.NoBalance, rootJobs: a.cfg.RootJobs, log: a.log,
		brought: func() error { return a.mode.change(api.ModeChange{Bringing: new(bool)}) },
	}
	e.node, err = migrate.OpenNode(migrate.NodeConfig{
		Self: self, Dir: filepath.Join(dir, nodeDir), Cgroup: group,
		CRIU: a.criu, Pages: func() pages.Protocol { return pages.ProtocolOf(a.inventory().CRIU.Version) }, Machine: a.machine, Roots: e.roots, RootLost: e.roots.Lost,
		Dial: a.dialMigrate, Lease: a.cfg.Lease, RootJobs: a.cfg.RootJobs, Log: a.log,
		Admit: e.balancer.admit,
		Judge: homeJudge{self: self, home: func() *migrate.Home { return e.home }, others: client},
	})
	if err != nil {
		return nil, err
	}
	e.balancer.node = e.node
	journal, err := migrate.OpenJournal[migrate.Record](filepath.Join(dir, homeDir, "records"))
	if err != nil {
		return nil, fault.New(fault.Environment, "open", "the journal of jobs", err, "")
	}
	e.home, err = migrate.NewHome(migrate.HomeConfig{
		Self: self, Journal: journal, Files: e.files, Log: a.log,
		Peer: func(n api.NodeID) migrate.Peer {
			if n == self {
				return e.node
			}
			return migrate.Client{Dial: a.dialMigrate, Node: n}
		},
		Changed: func(r migrate.Record) { e.service.Changed(r) },
		Locked:  func(job migrate.JobID) bool { return e.service.Locked(job) },
	})
	if err != nil {
		return nil, err
	}
	e.service, err = jobs.New(jobs.Config{
		Self: self, Dir: filepath.Join(dir, homeDir, "info"), Home: e.home, Capsule: func(job migrate.JobID, at migrate.Placement) (*capsule.Capsule, error) {
			if at.Node == self {
				return e.node.Capsule(job, at.Epoch)
			}
			return migrate.Client{Dial: a.dialMigrate, Node: at.Node}.Capsule(self, job, at.Epoch), nil
		},
		Nodes:   func() []api.Member { return a.Members().Members },
		Guests:  e.guests,
		Balance: e.balancer,
		Lease:   a.cfg.Lease, RootJobs: a.cfg.RootJobs, Log: a.log,
	})
	if err != nil {
		return nil, err
	}
	e.balancer.service = e.service
	e.server = migrate.Server{Node: e.node, Home: e.home, Propose: e.service.Propose, Why: e.balancer.whyOf, Log: a.log}
	return e, nil
}

// guests are the jobs of other homes that are here, as far as this node knows them.
func (e *engine) guests(ctx context.Context) []api.JobStatus {
	var all []api.JobStatus
	for _, g := range e.node.Guests() {
		st := api.JobStatus{ID: string(g.Job), UID: int(g.Owner.UID), State: api.JobRuns, Home: g.Home, Node: e.self, Epoch: g.Epoch}
		if c, err := e.node.Capsule(g.Job, g.Epoch); err == nil {
			if m, err := c.Measure(ctx); err == nil && m.Use != nil {
				st.Bytes, st.Processes, st.CPUSeconds = m.Use.Bytes, m.Use.Processes, float64(m.Use.CPUMicros)/1e6
			}
		}
		all = append(all, st)
	}
	return all
}

// startEngine starts the engine once this machine has a number. A machine that
// the head gives another number later cannot be the home of its jobs any more:
// the agent ends, and the next one begins anew.
func (a *Agent) startEngine(self api.NodeID) error {
	if e := a.engine.Load(); e != nil {
		if e.self != self {
			a.end(fault.New(fault.Environment, "carry the jobs of", fmt.Sprintf("node %d", e.self), fmt.Sprintf("this machine is node %d now", self), "the agent begins anew"))
		}
		return nil
	}
	e, err := a.openEngine(self)
	if err != nil {
		return err
	}
	a.engine.Store(e)
	a.engines.Go(func() { e.run(a.life) })
	return nil
}

// run keeps the jobs in order until ctx ends. Nothing of a job ends with it.
func (e *engine) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { e.node.Run(ctx) })
	wg.Go(func() { e.home.Run(ctx) })
	wg.Go(func() { e.service.Run(ctx) })
	wg.Go(func() { e.balancer.run(ctx) })
	wg.Wait()
}

// homeJudge asks this home directly, and others over the network.
type homeJudge struct {
	self   api.NodeID
	home   func() *migrate.Home
	others migrate.Client
}

func (j homeJudge) Ended(ctx context.Context, home api.NodeID, job migrate.JobID, c migrate.Placement, end migrate.End) error {
	if home == j.self {
		return j.home().Ended(ctx, home, job, c, end)
	}
	return j.others.Ended(ctx, home, job, c, end)
}

func (j homeJudge) Unlocked(ctx context.Context, home api.NodeID, job migrate.JobID, c migrate.Placement) error {
	if home == j.self {
		return j.home().Unlocked(ctx, home, job, c)
	}
	return j.others.Unlocked(ctx, home, job, c)
}

func (j homeJudge) Ask(ctx context.Context, home api.NodeID, job migrate.JobID, c migrate.Placement) (migrate.Verdict, uint64, error) {
	if home == j.self {
		return j.home().Ask(ctx, home, job, c)
	}
	return j.others.Ask(ctx, home, job, c)
}

// criu is how capsules run it: as the probe found that it works.
func (a *Agent) criu() control.CRIU {
	a.mu.Lock()
	defer a.mu.Unlock()
	return control.CRIU{Bundle: a.tool.Bundle, Argv: a.tool.Argv, Env: a.tool.Env}
}

// machine is what decides which jobs can come here.
func (a *Agent) machine() migrate.Machine {
	inv := a.inventory()
	a.mu.Lock()
	bundle := a.tool.Bundle
	a.mu.Unlock()
	m := migrate.Machine{
		Version: fmt.Sprintf("mosimg protocol %d with criu %s", version.Protocol, inv.CRIU.Version),
		Arch:    inv.Arch, Features: inv.CPUFlags, XSave: inv.XSaveBytes,
	}
	if !inv.CRIU.Usable {
		m.NoCRIU = inv.CRIU.Reason
	} else if bundle == "" {
		// In a capsule it would have to be found in the job's own tree.
		m.NoCRIU = "CRIU is installed on this machine, but not there as a bundle of its own (see mosagent agent --criu)"
	}
	return m
}

// dialLimit bounds a connection to another member.
const dialLimit = 10 * time.Second

// errNoMember is why nothing can be asked of others yet.
var errNoMember = errors.New("this machine is not a member of the cluster")

// dialNode opens a stream of a protocol to another member, by mutual TLS.
func (a *Agent) dialNode(ctx context.Context, node api.NodeID, path, protocol string) (net.Conn, error) {
	a.mu.Lock()
	m := a.member
	a.mu.Unlock()
	if m == nil {
		return nil, errNoMember
	}
	c := m.cred.Load()
	addr := ""
	for _, p := range c.view.Peers {
		if p.Node == node {
			addr = p.Address
		}
	}
	if addr == "" {
		return nil, fault.New(fault.NotFound, "find", fmt.Sprintf("node %d", node), "the head does not list it", "see: mosmon")
	}
	own := func() (*tls.Certificate, error) { return m.cred.Load().tls(a.key), nil }
	revoked := func(serial string) bool { return m.cred.Load().revoked[serial] }
	d := tls.Dialer{Config: identity.ClientToNode(own, c.ca, node, revoked)}
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(addr, strconv.Itoa(a.cfg.APIPort)))
	if err != nil {
		return nil, err
	}
	return upgrade.Dial(ctx, conn, path, protocol)
}

func (a *Agent) dialMigrate(ctx context.Context, node api.NodeID) (net.Conn, error) {
	return a.dialNode(ctx, node, api.PathMigrate, api.UpgradeMigrate)
}

// homeFilesSocket is where the mounts of home files on this node find us.
func (a *Agent) homeFilesSocket() string { return filepath.Join(a.cfg.JobsDir, "homefiles.sock") }

// serveHomeFiles introduces this node's mounts with the homes of their jobs.
func (a *Agent) serveHomeFiles(ctx context.Context) error {
	l, err := mounts.Listen(a.homeFilesSocket())
	if err != nil {
		return err
	}
	return mounts.Introduce(ctx, l, func(ctx context.Context, home api.NodeID) (net.Conn, error) {
		return a.dialNode(ctx, home, api.PathHomeFiles, api.UpgradeHomeFiles)
	}, a.log)
}

// handleJobs adds what the engine answers to the API. Until there is one, that
// is a refusal that a later try may not get.
func (a *Agent) handleJobs(ctx context.Context) {
	with := func(f func(*engine, http.ResponseWriter, *http.Request)) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			e := a.engine.Load()
			if e == nil {
				unixhttp.Fail(w, fault.New(fault.Unavailable, "ask", "agent", errNoMember, "see: mosagent status"))
				return
			}
			f(e, w, r)
		})
	}
	service := with(func(e *engine, w http.ResponseWriter, r *http.Request) { e.service.Handler().ServeHTTP(w, r) })
	a.server.Handle(api.PathJobs, service)
	a.server.Handle(api.PathJobs+"/", service)
	member := func(f func(*engine, net.Conn, api.NodeID), protocol string) http.Handler {
		return with(func(e *engine, w http.ResponseWriter, r *http.Request) {
			from := agentapi.CallerOf(r.Context())
			if from.Local {
				unixhttp.Fail(w, fault.New(fault.Refused, "open a stream at", r.URL.Path, "only members may", ""))
				return
			}
			conn, release, err := a.server.Stream(w, r, protocol)
			if err != nil {
				return
			}
			defer release()
			f(e, conn, from.Node)
		})
	}
	a.server.Handle("GET "+api.PathMigrate, member(func(e *engine, conn net.Conn, from api.NodeID) {
		e.server.Serve(ctx, conn, from)
	}, api.UpgradeMigrate))
	a.server.Handle("GET "+api.PathHomeFiles, member(func(e *engine, conn net.Conn, from api.NodeID) {
		if err := e.files.Serve(ctx, conn, from); err != nil {
			a.log.Warn("home files", "from", from, "err", err)
		}
	}, api.UpgradeHomeFiles))
}
