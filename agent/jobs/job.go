package jobs

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/agentapi"
	"mosimg/agent/capsule"
	"mosimg/agent/capsule/control"
	"mosimg/agent/migrate"
	"mosimg/internal/fault"
)

// job is a job of this home, from its start until its end was taken.
type job struct {
	s  *Service
	id migrate.JobID
	// started closes when it is known whether the job was started; startErr is
	// why it was not, and is not written to after that.
	started  chan struct{}
	startErr error
	kept     bool // keep was called; guarded by Service.mu

	again chan struct{} // one token: the record is to be looked at

	mu      sync.Mutex    // guards the following
	changed chan struct{} // closed, and replaced, when any of it changes
	info    Info
	rec     migrate.Record // as follow last saw it
	place   *place         // nil while no copy runs, and for good when the job is lost
	orders  []order
	ordered uint64 // the highest ID of an order that came to this agent
	sending bool   // the first of orders is on its way to the job now
	session *session
	taken   bool // nobody waits for the job's end any more
	// silent tells that its node has not answered for a while; use and stopped
	// are what it last said.
	silent  bool
	use     control.Use
	stopped bool
}

// place is a copy that runs, or that has ended and still holds output.
type place struct {
	at migrate.Placement
	// ctx ends when the copy is the job no more, or when its connections are not to be trusted.
	ctx    context.Context
	cancel context.CancelFunc
}

// errLost is a job of which no copy is left.
var errLost = errors.New("the job is lost")

func (s *Service) newJob(info Info) *job {
	return &job{s: s, id: info.Job, info: info, started: make(chan struct{}), again: make(chan struct{}, 1), changed: make(chan struct{})}
}

// change changes what mu guards and wakes all who wait for a change.
func (j *job) change(f func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	f()
	close(j.changed)
	j.changed = make(chan struct{})
}

// await waits until f, which is called with mu held, says that it is so.
func (j *job) await(ctx context.Context, f func() bool) error {
	for {
		j.mu.Lock()
		so, changed := f(), j.changed
		j.mu.Unlock()
		if so {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (j *job) infoNow() Info {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.info
}

// setInfo journals a change of the job's Info, and only then makes it true.
func (j *job) setInfo(f func(*Info)) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	info := j.info
	f(&info)
	if err := j.s.journal.Put(string(j.id), info); err != nil {
		return fault.New(fault.Environment, "journal", "job "+string(j.id), err, "")
	}
	j.info = info
	return nil
}

// mine tells whether a caller may see and steer the job.
func (j *job) mine(who agentapi.Caller) bool {
	return who.Local && (who.UID == 0 || who.UID == int(j.infoNow().UID))
}

// look makes follow look at the record.
func (j *job) look() {
	select {
	case j.again <- struct{}{}:
	default:
	}
}

// follow keeps place at where the record says that the job is.
func (j *job) follow(ctx context.Context) {
	for {
		if rec, err := j.s.conf.Home.Job(j.id); err == nil {
			j.change(func() { j.settle(ctx, rec) })
		}
		select {
		case <-j.again:
		case <-ctx.Done():
			return
		}
	}
}

// settle takes a record; mu is held. Until the home knows that a committed copy
// runs, it is no place: if it turns out never to have run, what it was
// given would be gone with it.
func (j *job) settle(ctx context.Context, rec migrate.Record) {
	j.rec = rec
	lost := rec.End != nil && rec.End.Lost != ""
	there := !lost && (rec.Running || rec.End != nil)
	if j.place != nil && (!there || j.place.at != rec.At) {
		j.place.cancel()
		j.place = nil
	}
	if there && j.place == nil {
		j.newPlace(ctx, rec.At)
	}
}

func (j *job) newPlace(ctx context.Context, at migrate.Placement) {
	p := &place{at: at}
	p.ctx, p.cancel = context.WithCancel(ctx)
	j.place = p
}

// reconnect gives up the connections to the job's copy for new ones.
func (j *job) reconnect(ctx context.Context) {
	j.change(func() {
		if j.place != nil {
			j.place.cancel()
			j.newPlace(ctx, j.place.at)
		}
	})
}

// awaitPlace is where the job runs, or has ended.
func (j *job) awaitPlace(ctx context.Context) (p *place, err error) {
	lost := false
	err = j.await(ctx, func() bool {
		p, lost = j.place, j.rec.End != nil && j.rec.End.Lost != ""
		return p != nil || lost
	})
	if err == nil && lost {
		err = errLost
	}
	return p, err
}

// awaitEnd waits for the job's end. The record is the last one also after an error.
func (j *job) awaitEnd(ctx context.Context) (rec migrate.Record, err error) {
	err = j.await(ctx, func() bool { rec = j.rec; return rec.End != nil })
	return rec, err
}

// capsule is that of a place. The context is that of a question to it.
func (j *job) capsule(ctx context.Context, p *place, limit time.Duration) (*capsule.Capsule, context.Context, context.CancelFunc, error) {
	c, err := j.s.conf.Capsule(j.id, p.at)
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	stop := context.AfterFunc(p.ctx, cancel)
	return c, ctx, func() { stop(); cancel() }, nil
}

// keep works on the job until its end was taken, or ctx ends.
func (j *job) keep(ctx context.Context) {
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var work sync.WaitGroup
	for _, f := range []func(context.Context){j.follow, j.steer, j.watch, j.guard} {
		work.Go(func() { f(wctx) })
	}
	err := j.await(ctx, func() bool { return j.taken && j.rec.End != nil })
	cancel()
	work.Wait()
	if err != nil || !j.forget(ctx) {
		return // the next agent goes on
	}
	j.s.log.Info("job ended", "job", j.id)
	j.s.drop(j)
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.session != nil { // it asks again, and hears that there is no such job
		j.session.cancel()
	}
}

// guard ends the job with its mosrun.
func (j *job) guard(ctx context.Context) {
	info := j.infoNow()
	for wait := newPause(); ; {
		p, err := openMosrun(info)
		if err == nil {
			err = p.awaitEnd(ctx)
		}
		if err == nil || errors.Is(err, errGone) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
			break
		}
		// Anything else says nothing about mosrun: no job is killed for that.
		if ctx.Err() == nil {
			j.s.log.Warn("cannot watch a mosrun", "job", j.id, "pid", info.PID, "err", err)
		}
		if !wait.wait(ctx, nil) {
			return
		}
	}
	if !j.ended() {
		j.s.log.Info("mosrun is gone: its job is killed", "job", j.id, "pid", info.PID)
		if err := j.doom(); err != nil {
			// Killed all the same; an agent that is restarted sees for itself that mosrun is gone.
			j.s.log.Warn("kill a job whose mosrun is gone", "job", j.id, "err", err)
		}
	}
	j.change(func() { j.taken = true })
}

// errGone is a mosrun that has ended.
var errGone = errors.New("it has ended")

// openMosrun holds on to a job's mosrun, if that still runs.
func openMosrun(info Info) (*process, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if boot != info.Boot {
		return nil, errGone
	}
	p, err := openProcess(info.PID)
	if err != nil {
		return nil, err
	}
	f, err := p.facts()
	if err == nil && f.began != info.Began {
		err = errGone
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// forgetTime bounds one try of forget.
const forgetTime = 30 * time.Second

// forget drops the job's record and what is left of it on its node. A node that
// is silent for so long that it has lost the job itself is not waited for.
func (j *job) forget(ctx context.Context) bool {
	began := time.Now()
	for wait := newPause(); ; {
		fctx, cancel := context.WithTimeout(ctx, forgetTime)
		err := j.s.conf.Home.Forget(fctx, j.id)
		cancel()
		if err == nil {
			return true
		}
		if _, err := j.s.conf.Home.Job(j.id); err != nil {
			return true // it was forgotten, and this agent did not get to note that
		}
		j.s.log.Warn("an ended job cannot be forgotten yet", "job", j.id, "err", err)
		if time.Since(began) > j.s.patience() {
			if err := j.s.conf.Home.Lost(j.id, "its node does not answer"); err != nil {
				j.s.log.Warn("give up a job", "job", j.id, "err", err)
			}
		}
		if !wait.wait(ctx, nil) {
			return false
		}
	}
}

// pause is a time to wait that grows, until something has gone well again.
type pause struct{ next time.Duration }

// firstPause and lastPause bound the wait before a node is tried again.
const (
	firstPause = 20 * time.Millisecond
	lastPause  = time.Second
)

func newPause() *pause { return &pause{firstPause} }

func (p *pause) reset() { p.next = firstPause }

// wait waits, at most until early closes, and tells whether ctx still lives.
func (p *pause) wait(ctx context.Context, early <-chan struct{}) bool {
	t := time.NewTimer(p.next)
	defer t.Stop()
	p.next = min(2*p.next, lastPause)
	select {
	case <-t.C:
	case <-early:
	case <-ctx.Done():
		return false
	}
	return ctx.Err() == nil
}
