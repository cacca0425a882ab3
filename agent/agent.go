// Package agent is the service that makes a machine a node: it proves itself
// to the head, becomes a member of the cluster, tells the others its load and
// answers questions about what it knows. It keeps going without the head; the
// head is needed to get in and to let others in or out.
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/agentapi"
	"mosimg/agent/console"
	"mosimg/agent/criu"
	"mosimg/agent/inventory"
	"mosimg/agent/load"
	"mosimg/agent/membership"
	"mosimg/agent/migrate"
	"mosimg/agent/netup"
	"mosimg/internal/api"
	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/version"
)

// Config is what an agent is told. Either Head and CA or JoinFile is needed.
type Config struct {
	Head  string // https://ADDRESS:PORT
	CA    string // identity.Pin of the cluster's CA
	Nonce string // boot nonce, may be ""
	// JoinFile holds an api.LocalTicket; it is waited for and read anew at
	// each enrolment. It stands for Head, CA, Nonce, MAC and Address.
	JoinFile string
	// MAC and Address of this node; "" means those by which NetStatus or
	// the route to the head says it is reached.
	MAC, Address string
	Image        string // id of the image set that runs, may be ""

	StateDir string // own key and membership, 0700; "" means RunDir/agent
	Socket   string // for local users; "" means api.AgentSocket
	// NetStatus is the file of our own network service; "" on a host that
	// has another one.
	NetStatus string
	// OwnMachine is set on a machine that mosimg booted: the agent then may
	// set its clock and its name.
	OwnMachine bool
	// Bundle is where CRIU lies, see criu.Find.
	Bundle string
	// NoCRIU, if set, is why CRIU is not even tried.
	NoCRIU string

	// JobsDir, on tmpfs, holds all about jobs; "" means StateDir/jobs.
	JobsDir string
	// Cgroup is the control group for jobs; "" means mosimg in the cgroup2 mount.
	Cgroup string
	// RootJobs lets root's jobs leave their home, and come here.
	RootJobs bool
	// Lease is how long a guest outlives the silence of its home; 0 means migrate.DefaultLease.
	Lease time.Duration

	// NoBalance lets jobs start and stay where they are told to; a node that is leaving
	// sends its guests away even so.
	NoBalance bool
	// JobsLoad makes this node's load that of its jobs alone. On a machine that mosimg booted the
	// rest is mosimg itself, which is busiest while a job moves: counted, one move would be the
	// reason of the next. Where several agents share one machine, all would see the same load otherwise.
	JobsLoad bool
	// Speed of a CPU of this node; 0: it is measured.
	Speed int

	APIPort, GossipPort int // 0: those of package api

	// Consoles are the devices to show the status on; none: not shown.
	Consoles []string
	// Keys says that the consoles' keyboards are the agent's: see console.Run.
	Keys bool

	Log *slog.Logger // nil: silent

	// setClock replaces clock_settime in tests.
	setClock func(time.Time) error
}

func (c Config) withDefaults() Config {
	if c.StateDir == "" {
		c.StateDir = filepath.Join(api.RunDir, "agent")
	}
	if c.JobsDir == "" {
		c.JobsDir = filepath.Join(c.StateDir, "jobs")
	}
	if c.Lease == 0 {
		c.Lease = migrate.DefaultLease
	}
	if c.Socket == "" {
		c.Socket = api.AgentSocket
	}
	if c.APIPort == 0 {
		c.APIPort = api.AgentPort
	}
	if c.GossipPort == 0 {
		c.GossipPort = api.GossipPort
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.setClock == nil {
		c.setClock = func(t time.Time) error {
			ts := unix.NsecToTimespec(t.UnixNano())
			return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
		}
	}
	return c
}

// Agent is a running agent.
type Agent struct {
	cfg    Config
	log    *slog.Logger
	key    identity.Key
	server *agentapi.Server

	// probed is closed once it is known whether CRIU works here.
	probed chan struct{}

	changed chan struct{} // wakes the console; holds one token

	mode *modeKeeper
	// speed of a CPU; 0 until it is known.
	speed atomic.Int64
	// measured is this machine as gossip last saw it; nil while it is no member.
	measured atomic.Pointer[ownLoad]

	// engine carries jobs; nil until this machine has got its number.
	engine  atomic.Pointer[engine]
	engines sync.WaitGroup
	// life ends with Run; end ends it before, with a reason.
	life context.Context
	end  context.CancelCauseFunc

	mu   sync.Mutex // guards the following
	inv  api.Inventory
	tool criu.Tool // once probed
	// status is what PathStatus tells, without what is worked out on demand.
	status api.AgentStatus
	// member is what this node has as a member; nil while it is none.
	member *member
}

// member is a membership that is in force.
type member struct {
	group *membership.Group
	loads *load.Table
	// cred is read at each handshake; writing serialises its changes.
	cred    atomic.Pointer[credentials]
	writing sync.Mutex
}

// Run is the agent until ctx ends; then it leaves the cluster. It returns an
// error only when it cannot even begin.
func Run(ctx context.Context, cfg Config) error {
	cfg = cfg.withDefaults()
	// What we were started with and did not open ourselves is nobody else's
	// business: a file of ours in a job could keep it from moving.
	if err := unix.CloseRange(3, ^uint(0)>>1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		cfg.Log.Debug("inherited files stay open in what we start", "why", err)
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return fault.New(fault.Environment, "make", cfg.StateDir, err, "run this as root, or give --state")
	}
	if err := os.Chmod(cfg.StateDir, 0o700); err != nil {
		return fault.New(fault.Environment, "protect", cfg.StateDir, err, "")
	}
	key, err := loadKey(cfg.StateDir)
	if err != nil {
		return err
	}
	a := &Agent{
		cfg: cfg, log: cfg.Log, key: key,
		probed:  make(chan struct{}),
		changed: make(chan struct{}, 1),
		inv:     inventory.Read(),
		status: api.AgentStatus{
			Version: version.String(), Protocol: version.Protocol, State: api.StateStarting,
			Fingerprint: identity.Fingerprint(key.Public()), Image: cfg.Image, Head: cfg.Head,
			MAC: cfg.MAC, Address: cfg.Address,
		},
	}
	a.inv.CRIU.Reason = "it is still being tried out"
	if a.mode, err = openMode(cfg.StateDir); err != nil {
		a.log.Error("the mode that this node was in is not known", "why", err)
	}
	a.server = agentapi.New(a, a.log)
	if err := os.MkdirAll(filepath.Dir(cfg.Socket), 0o755); err != nil {
		return fault.New(fault.Environment, "make", filepath.Dir(cfg.Socket), err, "run this as root, or give --socket")
	}
	if err := os.MkdirAll(cfg.JobsDir, 0o700); err != nil {
		return fault.New(fault.Environment, "make", cfg.JobsDir, err, "run this as root, or give --jobs")
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	a.life, a.end = ctx, end
	defer a.engines.Wait()
	a.handleJobs(ctx)
	a.handleMode()
	l, err := agentapi.ListenUnix(cfg.Socket)
	if err != nil {
		return err
	}

	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		if err := a.serveHomeFiles(ctx); err != nil {
			a.log.Error("home files of guests are not connected", "why", err)
		}
	})
	wg.Go(func() {
		if err := a.server.ServeUnix(ctx, l); err != nil {
			a.log.Error("local API ended", "why", err)
		}
	})
	wg.Go(func() {
		a.probe(ctx)
		a.calibrate() // what CRIU does at the same time would be measured with it
	})
	if len(cfg.Consoles) > 0 {
		src := console.Source{Status: a.Status, Members: a.Members}
		wg.Go(func() { console.Run(ctx, cfg.Consoles, cfg.Keys, src, a.changed) })
		a.wake()
	}
	for ctx.Err() == nil {
		p, ok := a.awaitPlace(ctx)
		if !ok {
			break
		}
		a.set(api.StateStarting, "asking the head")
		a.session(ctx, p)
	}
	if err := context.Cause(ctx); fault.KindOf(err) == fault.Environment {
		return err
	}
	return nil
}

// probe tries CRIU out. The node enrols meanwhile and joins whatever the
// result is; it is told to head and members when it is there.
func (a *Agent) probe(ctx context.Context) {
	defer close(a.probed)
	st := criu.Status{CRIUStatus: api.CRIUStatus{Reason: a.cfg.NoCRIU}}
	if a.cfg.NoCRIU == "" {
		st = criu.Probe(ctx, a.cfg.Bundle, a.cfg.StateDir, a.log)
	}
	if ctx.Err() != nil {
		return
	}
	if st.Usable {
		a.log.Info("criu works", "version", st.Version, "env", st.Tool.Env)
	} else {
		a.log.Warn("criu is unusable: this node takes only jobs placed at start", "why", st.Reason)
	}
	a.mu.Lock()
	a.inv.CRIU, a.status.CRIU, a.tool = st.CRIUStatus, st.CRIUStatus, st.Tool
	a.mu.Unlock()
	a.wake()
}

// speedFile in the state folder keeps the measured speed: an agent that is started
// again on a busy machine must not measure it anew.
const speedFile = "speed"

// speedPause is between the rounds of the measurement.
const speedPause = 500 * time.Millisecond

// calibrate finds out how fast a CPU of this machine is.
func (a *Agent) calibrate() {
	speed, err := a.cfg.Speed, error(nil)
	path := filepath.Join(a.cfg.StateDir, speedFile)
	if speed == 0 {
		data, _ := os.ReadFile(path)
		speed, _ = strconv.Atoi(string(data))
	}
	if speed <= 0 {
		if speed, err = load.Speed(speedPause); err == nil {
			err = atomicfile.Write(path, []byte(strconv.Itoa(speed)), 0o600)
		}
	}
	if err != nil {
		a.log.Warn("the speed of this machine", "why", err)
	}
	a.speed.Store(int64(speed))
	a.log.Info("speed of a CPU", "is", speed, "reference", load.ReferenceSpeed)
}

// ownLoad is this machine as it was last measured.
func (a *Agent) ownLoad() (ownLoad, bool) {
	if own := a.measured.Load(); own != nil {
		return *own, true
	}
	return ownLoad{}, false
}

// inventory is this machine as far as it is known now.
func (a *Agent) inventory() api.Inventory {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.inv
}

// isProbed reports whether CRIU's part of the inventory is final.
func (a *Agent) isProbed() bool {
	select {
	case <-a.probed:
		return true
	default:
		return false
	}
}

// set changes the state that is shown; it says so in the log when it is new.
func (a *Agent) set(s api.AgentState, reason string) {
	a.mu.Lock()
	same := a.status.State == s && a.status.Reason == reason
	a.status.State, a.status.Reason = s, reason
	a.mu.Unlock()
	if same {
		return
	}
	switch {
	case reason == "":
		a.log.Info("state", "is", s)
	case s == api.StateStarting, s == api.StatePending:
		a.log.Info("state", "is", s, "why", reason)
	default:
		a.log.Warn("state", "is", s, "why", reason)
	}
	a.wake()
}

// edit changes other parts of the status.
func (a *Agent) edit(f func(*api.AgentStatus)) {
	a.mu.Lock()
	f(&a.status)
	a.mu.Unlock()
	a.wake()
}

func (a *Agent) wake() {
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

// Status implements agentapi.Source.
func (a *Agent) Status() api.AgentStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.status
	if a.member != nil {
		c := a.member.cred.Load()
		s.Generation, s.CertExpires = c.view.Generation, c.cert.NotAfter
	}
	return s
}

// Members implements agentapi.Source.
func (a *Agent) Members() api.MemberTable {
	a.mu.Lock()
	m := a.member
	a.mu.Unlock()
	if m == nil {
		return api.MemberTable{Members: []api.Member{}}
	}
	c := m.cred.Load()
	t := api.MemberTable{Cluster: c.view.Name, Self: c.node, Members: m.group.Members()}
	now := time.Now()
	for i := range t.Members {
		e := &t.Members[i]
		v, age, ok := m.loads.Get(e.Node, now)
		if ok {
			e.Load, e.AgeMillis = &v, age.Milliseconds()
		}
		e.Liveness = doubt(e.Liveness, e.Self, ok, age, now.Sub(e.Since), len(t.Members))
	}
	return t
}

// doubt turns Alive into Suspect for a node that should have been heard of
// again by now: memberlist keeps its own suspicions to itself, but a node
// that stopped sends no news of its load either. News of a living node
// reaches everybody in about log2(n) seconds; the rest is margin for a lost
// packet and a slow machine.
func doubt(l api.Liveness, self, heard bool, age, since time.Duration, n int) api.Liveness {
	limit := 3 * load.Interval
	for ; n > 1; n /= 2 {
		limit += load.Interval
	}
	if l == api.Alive && !self && since > limit && (!heard || age > limit) {
		return api.Suspect
	}
	return l
}

// place is where this machine stands: which head, and how we are reached.
type place struct {
	head, ca, nonce, mac, address string
}

func (p place) String() string { return fmt.Sprintf("%s at %s", p.address, p.head) }

// awaitPlace waits until it is known which head to ask and which address to
// give; the state says what is missing.
func (a *Agent) awaitPlace(ctx context.Context) (place, bool) {
	for {
		p, state, err := a.locate()
		if err == nil {
			a.edit(func(s *api.AgentStatus) { s.Head, s.MAC, s.Address = p.head, p.mac, p.address })
			return p, true
		}
		a.set(state, err.Error())
		if !sleep(ctx, 250*time.Millisecond) {
			return place{}, false
		}
	}
}

// locate works out the place, or says what is missing.
func (a *Agent) locate() (place, api.AgentState, error) {
	p := place{head: a.cfg.Head, ca: a.cfg.CA, nonce: a.cfg.Nonce, mac: a.cfg.MAC, address: a.cfg.Address}
	if a.cfg.NetStatus != "" {
		st, err := netup.ReadStatus(a.cfg.NetStatus)
		if err != nil {
			return p, api.StateNoLease, fmt.Errorf("network: %w", err)
		}
		if !st.Up() {
			if st.MAC != "" {
				a.edit(func(s *api.AgentStatus) { s.MAC = st.MAC })
			}
			return p, st.State, errText(first(st.Reason, "waiting for an address"))
		}
		p.mac, p.address = st.MAC, st.Address
	}
	if a.cfg.JoinFile != "" {
		t, err := readTicket(a.cfg.JoinFile)
		if err != nil {
			return p, api.StateNoHead, err
		}
		p.head, p.ca, p.nonce = t.Head, t.CA, t.Nonce
		p.mac, p.address = first(p.mac, t.MAC), first(p.address, t.Address)
	}
	if err := checkHead(p.head, p.ca); err != nil {
		return p, api.StateNoHead, err
	}
	if p.address == "" || p.mac == "" {
		mac, addr, err := towards(p.head)
		if err != nil {
			return p, api.StateNoHead, err
		}
		p.mac, p.address = first(p.mac, mac), first(p.address, addr)
	}
	return p, "", nil
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// errText is an error with just this text.
type errText string

func (e errText) Error() string { return string(e) }

// sleep waits for d and reports false when ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
