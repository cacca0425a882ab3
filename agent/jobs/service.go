// Package jobs is the home's side of jobs, beside package migrate, which knows
// where they are: it starts them as who asked, carries their stdin, stdout,
// stderr and signals between mosrun and wherever the job is, lists, moves and
// kills them, and ends each of them once.
//
// A job belongs to the mosrun that started it. When that process is gone the job
// is killed, wherever it is; an agent that is restarted finds both again. mosrun
// speaks to us by package wire, we to the job's shim by package capsule. Both
// count bytes from the beginning of a stream, and nothing is forgotten before
// the next one has it, so either connection may break at any byte: nothing
// is lost, doubled or reordered. So it is with signals: mosrun keeps each until it
// has reached the job.
package jobs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"mosimg/agent/agentapi"
	"mosimg/agent/capsule"
	"mosimg/agent/homefiles/home"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// Config is what a Service needs. Self, Dir, Home, Capsule and Nodes are required.
type Config struct {
	Self api.NodeID
	Dir  string // of the journal of Info
	Home *migrate.Home
	// Capsule is that of a job's copy, here or on another node. It does not connect.
	Capsule func(migrate.JobID, migrate.Placement) (*capsule.Capsule, error)
	// Nodes are the members of the cluster as known here.
	Nodes func() []api.Member
	// Guests are the jobs of other homes that are here; nil if that is not told.
	Guests func(context.Context) []api.JobStatus
	// Balance chooses for jobs that may be anywhere; nil: they stay at home.
	Balance Balance
	// RootJobs lets root's jobs leave home.
	RootJobs bool
	// Lease is how long a node may be silent before it has killed its guests; 0 is migrate.DefaultLease.
	Lease time.Duration
	Log   *slog.Logger // nil is silent
}

// Balance is what a Service asks of the node's balancer.
type Balance interface {
	// Place is where a job starts that its user wants on the best node, with the reason;
	// 0 is nowhere. bytes is the memory that it asks for.
	Place(job migrate.JobID, bytes int64) (api.NodeID, string)
	// Gone tells of a job that has ended or was not started.
	Gone(migrate.JobID)
	// Keeps is why this home lets none of its jobs leave by itself; "" if it does.
	Keeps() string
	// Stays tells why jobs of this home stay where they are, as their nodes see it.
	Stays(context.Context, []migrate.Record) map[migrate.JobID]string
}

// Service carries the jobs of this home. Its methods may be called by many goroutines.
type Service struct {
	conf    Config
	log     *slog.Logger
	journal *migrate.Journal[Info]
	handler http.Handler

	base context.Context // of all that the service does by itself
	stop context.CancelFunc

	mu   sync.Mutex // guards the following
	jobs map[migrate.JobID]*job
	work sync.WaitGroup // of the jobs' keepers; added to only while base lives
}

// New takes over the jobs of an earlier agent, whose records conf.Home has. Run
// then goes on with them.
func New(conf Config) (*Service, error) {
	s := &Service{conf: conf, log: conf.Log, jobs: make(map[migrate.JobID]*job)}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if conf.Lease == 0 {
		s.conf.Lease = migrate.DefaultLease
	}
	s.base, s.stop = context.WithCancel(context.Background())
	s.handler = s.routes()
	var err error
	if s.journal, err = migrate.OpenJournal[Info](conf.Dir); err != nil {
		return nil, fault.New(fault.Environment, "open", "the journal of this home's jobs", err, "")
	}
	infos, err := s.journal.All()
	if err != nil {
		return nil, fault.New(fault.Environment, "read", "the journal of this home's jobs", err, "")
	}
	for _, rec := range conf.Home.Jobs() {
		info, ok := infos[string(rec.Job)]
		if !ok {
			// It is written first and deleted last. Nobody can come for this job any
			// more: an Info without a mosrun ends it.
			s.log.Error("a job is in one journal only, and is ended", "job", rec.Job)
			info = Info{Job: rec.Job, UID: rec.Owner.UID, GID: rec.Owner.GID, Groups: rec.Owner.Groups, Started: rec.Started}
		}
		delete(infos, string(rec.Job))
		j := s.newJob(info)
		close(j.started)
		s.jobs[rec.Job] = j
	}
	for id := range infos { // the agent died before the job was begun, or after it was forgotten
		if err := s.journal.Delete(id); err != nil {
			return nil, fault.New(fault.Environment, "write", "the journal of this home's jobs", err, "")
		}
	}
	return s, nil
}

// Run keeps the jobs until ctx ends. Nothing of a job ends with it.
func (s *Service) Run(ctx context.Context) {
	s.mu.Lock()
	for _, j := range s.jobs {
		select {
		case <-j.started:
			s.keep(j)
		default: // who is starting it will
		}
	}
	s.mu.Unlock()
	<-ctx.Done()
	s.mu.Lock()
	s.stop()
	s.mu.Unlock()
	s.work.Wait()
}

// keep begins to work on a job, once; mu is held.
func (s *Service) keep(j *job) {
	if s.base.Err() == nil && !j.kept {
		j.kept = true
		s.work.Go(func() { j.keep(s.base) })
	}
}

// Handler serves api.PathJobs and all below it, to local users only.
func (s *Service) Handler() http.Handler { return s.handler }

// Changed tells the service that a job's record is another one. It returns at once.
func (s *Service) Changed(rec migrate.Record) {
	s.mu.Lock()
	j := s.jobs[rec.Job]
	s.mu.Unlock()
	if j != nil {
		j.look()
	}
}

// Owner is as whom a job's guests may use the home's files.
func (s *Service) Owner(id migrate.JobID) (home.Cred, error) {
	s.mu.Lock()
	j := s.jobs[id]
	s.mu.Unlock()
	if j == nil {
		return home.Cred{}, noJob(string(id))
	}
	info := j.infoNow()
	return home.Cred{UID: info.UID, GID: info.GID, Groups: info.Groups}, nil
}

// startTime bounds the start of a job, on another node too.
const startTime = time.Minute

// start starts a job for a caller, or finds the one that its request has
// begun already.
func (s *Service) start(ctx context.Context, who agentapi.Caller, req api.JobStart) (migrate.JobID, error) {
	if err := checkStart(req); err != nil {
		return "", err
	}
	p, err := openProcess(who.PID)
	if err != nil {
		return "", fault.New(fault.Refused, "start", "job", fmt.Errorf("cannot see the process that asks: %w", err), "")
	}
	defer p.close()
	facts, err := p.facts()
	if err == nil && facts.euid != who.UID {
		err = fmt.Errorf("process %d is user %d's now, and was user %d's", who.PID, facts.euid, who.UID)
	}
	if err != nil {
		return "", fault.New(fault.Refused, "start", "job", fmt.Errorf("cannot look at the process that asks: %w", err), "")
	}
	spec, err := specOf(req, who, facts)
	if err != nil {
		return "", err
	}
	id := jobID(s.conf.Self, who.PID, req.Token)
	node, err := s.startOn(who, id, req)
	if err != nil {
		return "", err
	}
	boot, err := bootID()
	if err != nil {
		return "", err
	}
	info := Info{
		Job: id, Token: req.Token,
		UID: spec.UID, GID: spec.GID, Groups: spec.Groups,
		PID: who.PID, Began: facts.began, Boot: boot,
		Argv: req.Argv, Started: time.Now(), Locked: req.Locked, NoStdin: req.NoStdin,
	}
	j, fresh, err := s.admit(info)
	if err != nil {
		return "", err
	}
	if !fresh {
		select {
		case <-j.started:
			return j.id, j.startErr
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
	defer close(j.started)
	// Not the caller's time: it may lose the connection and ask again.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTime)
	defer cancel()
	err = j.setInfo(func(*Info) {})
	if err == nil {
		err = s.conf.Home.Start(ctx, j.id, node, spec)
		// Not if the node may have begun it: the program would run twice.
		if req.Best && node != s.conf.Self && fault.KindOf(err) == fault.Unavailable && !errors.Is(err, migrate.ErrNoAnswer) {
			s.log.Info("a job starts at home: the best node does not take it", "job", j.id, "node", node, "why", err)
			node = s.conf.Self
			err = s.conf.Home.Start(ctx, j.id, node, spec)
		}
	}
	if err != nil {
		j.startErr = err
		s.drop(j)
		return "", err
	}
	s.log.Info("job started", "job", j.id, "node", node, "uid", info.UID)
	s.mu.Lock()
	s.keep(j)
	s.mu.Unlock()
	return j.id, nil
}

// admit makes a job of this name, or finds the one of the same request.
func (s *Service) admit(info Info) (j *job, fresh bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.base.Err() != nil {
		return nil, false, fault.New(fault.Unavailable, "start", "job", "the agent is about to end", "try again in a moment")
	}
	for _, j := range s.jobs {
		if i := j.infoNow(); i.Token == info.Token && i.UID == info.UID {
			return j, false, nil
		}
	}
	if s.jobs[info.Job] != nil {
		return nil, false, fault.New(fault.Refused, "start", "job "+string(info.Job), "there is one of this name", "try again")
	}
	j = s.newJob(info)
	s.jobs[info.Job] = j
	return j, true, nil
}

// drop forgets a job that is over or was never begun: its Info last.
func (s *Service) drop(j *job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conf.Balance != nil {
		s.conf.Balance.Gone(j.id)
	}
	delete(s.jobs, j.id)
	if err := s.journal.Delete(string(j.id)); err != nil {
		s.log.Error("a job that is over stays in the journal", "job", j.id, "err", err)
	}
}

// find finds a job that has been started, by its name or the pid of its
// mosrun, for a caller who may steer it.
func (s *Service) find(ctx context.Context, who agentapi.Caller, name string) (*job, error) {
	s.mu.Lock()
	found := s.jobs[migrate.JobID(name)]
	if pid, err := strconv.Atoi(name); found == nil && err == nil {
		for _, j := range s.jobs {
			i := j.infoNow()
			// A pid comes again: an ended job's mosrun may have left it to another one's.
			if i.PID == pid && (found == nil || i.Started.After(found.infoNow().Started)) {
				found = j
			}
		}
	}
	s.mu.Unlock()
	if found == nil {
		return nil, noJob(name)
	}
	if !found.mine(who) {
		return nil, fault.New(fault.Refused, "find", "job "+name, "it is another user's", "")
	}
	select {
	case <-found.started:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if found.startErr != nil {
		return nil, noJob(name)
	}
	return found, nil
}

func noJob(name string) error {
	return fault.New(fault.NotFound, "find", "job "+name, "there is none of this name", "mosps lists your jobs; those of others are at their homes")
}

// seenBy are the started jobs that a caller may see, in the order of their start.
func (s *Service) seenBy(who agentapi.Caller) []*job {
	s.mu.Lock()
	defer s.mu.Unlock()
	var seen []*job
	for _, j := range s.jobs {
		select {
		case <-j.started:
			if j.startErr == nil && j.mine(who) {
				seen = append(seen, j)
			}
		default:
		}
	}
	slices.SortFunc(seen, func(a, b *job) int {
		x, y := a.infoNow(), b.infoNow()
		return cmp.Or(x.Started.Compare(y.Started), cmp.Compare(x.Job, y.Job))
	})
	return seen
}

// startOn is the node on which a caller's job starts.
func (s *Service) startOn(who agentapi.Caller, id migrate.JobID, req api.JobStart) (api.NodeID, error) {
	name := req.Node
	switch {
	case req.Best:
		return s.best(who, id, req.Bytes)
	case name == "":
		return s.conf.Self, nil
	}
	m, err := resolve(s.conf.Nodes(), s.conf.Self, name)
	if err == nil {
		err = takesJobs(m)
	}
	if err == nil {
		err = s.mayLeave(who.UID, m.Node)
	}
	if err != nil {
		return 0, fault.New(fault.KindOf(err), "start", "job on "+name, err, "")
	}
	return m.Node, nil
}

// best is the node on which a job starts whose user leaves the choice to us.
func (s *Service) best(who agentapi.Caller, id migrate.JobID, bytes int64) (api.NodeID, error) {
	if s.conf.Balance == nil || s.mayLeave(who.UID, 0) != nil {
		return s.conf.Self, nil
	}
	node, why := s.conf.Balance.Place(id, bytes)
	if node == 0 {
		return 0, fault.New(fault.Unavailable, "start", "job", why, "ask for less with -m, or wait")
	}
	s.log.Debug("placed", "job", id, "node", node, "why", why)
	return node, nil
}

// mayLeave refuses to send root's jobs to other machines, whose users are not
// this one's root.
func (s *Service) mayLeave(uid int, to api.NodeID) error {
	if uid == 0 && to != s.conf.Self && !s.conf.RootJobs {
		return fault.New(fault.Refused, "use", fmt.Sprintf("node %d", to), "root's jobs stay at home", "run it as another user")
	}
	return nil
}

// move moves a job for its user.
func (s *Service) move(ctx context.Context, j *job, to string) error {
	fail := func(err error) error {
		return fault.New(fault.KindOf(err), "move", "job "+string(j.id), err, "")
	}
	rec, err := s.conf.Home.Job(j.id)
	if err != nil {
		return err
	}
	info := j.infoNow()
	m, err := resolve(s.conf.Nodes(), s.conf.Self, to)
	switch {
	case err != nil:
		return fail(err)
	case rec.At.Node == m.Node || rec.End != nil || rec.Next != nil:
		// Home says it better than a look at the node would.
	default:
		if err = takesMoves(m); err == nil {
			err = s.mayLeave(int(info.UID), m.Node)
		}
		if from, ferr := resolve(s.conf.Nodes(), s.conf.Self, strconv.Itoa(int(rec.At.Node))); err == nil && ferr == nil && !from.Migration {
			err = noMigration(from)
		}
		if err != nil {
			return fail(err)
		}
	}
	return s.conf.Home.Move(ctx, j.id, m.Node)
}

// killTime is how long a user waits to see a job dead.
const killTime = 8 * time.Second

// kill kills a job, and returns when it has ended.
func (s *Service) kill(ctx context.Context, j *job) error {
	if err := j.doom(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, killTime)
	defer cancel()
	rec, err := j.awaitEnd(ctx)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fault.New(fault.Unavailable, "kill", "job "+string(j.id), fmt.Sprintf("node %d does not answer", rec.At.Node), "it is killed as soon as it does")
	}
	return err
}
