package balance

import (
	"time"

	"mosimg/internal/api"
)

// How long a job is not sent again where it was refused: at first, and at most,
// with twice as long after each time; and for how long it is then tried nowhere else.
const (
	retryFirst = 2 * time.Second
	retryMost  = 5 * time.Minute
	retryElse  = time.Second
	// forgetSent is when a job that was sent shows in its node's load for certain.
	forgetSent = 20 * time.Second
)

// Ledger remembers what the next decision needs of those before it. The zero
// value is ready. It is not safe for concurrent use.
type Ledger struct {
	sent map[string]sent
	jobs map[string]*trials
}

type sent struct {
	Sent
	at time.Time
}

// trials are the moves of a job that failed since one succeeded.
type trials struct {
	why   string
	until time.Time // it is tried nowhere before
	nodes map[api.NodeID]trial
}

type trial struct {
	why   string
	times int
	until time.Time
}

// Went notes that a job has gone to a node, or was started there.
func (l *Ledger) Went(job string, to api.NodeID, load float64, bytes int64, now time.Time) {
	if l.sent == nil {
		l.sent = make(map[string]sent)
	}
	l.sent[job] = sent{Sent{To: to, Load: load, Bytes: bytes}, now}
	delete(l.jobs, job)
}

// Failed notes that a job could not go to a node.
func (l *Ledger) Failed(job string, to api.NodeID, why string, now time.Time) {
	if l.jobs == nil {
		l.jobs = make(map[string]*trials)
	}
	t := l.jobs[job]
	if t == nil {
		t = &trials{nodes: make(map[api.NodeID]trial)}
		l.jobs[job] = t
	}
	n := t.nodes[to]
	wait := retryMost
	if n.times < 8 {
		wait = min(retryMost, retryFirst<<n.times)
	}
	t.nodes[to] = trial{why: why, times: n.times + 1, until: now.Add(wait)}
	t.why, t.until = why, now.Add(retryElse)
}

// Pinned notes that a job cannot be moved at all now.
func (l *Ledger) Pinned(job, why string, wait time.Duration, now time.Time) {
	if l.jobs == nil {
		l.jobs = make(map[string]*trials)
	}
	if l.jobs[job] == nil {
		l.jobs[job] = &trials{nodes: make(map[api.NodeID]trial)}
	}
	l.jobs[job].why, l.jobs[job].until = why, now.Add(wait)
}

// Gone forgets a job that has ended.
func (l *Ledger) Gone(job string) {
	delete(l.sent, job)
	delete(l.jobs, job)
}

// Keep forgets the trials of all jobs but these.
func (l *Ledger) Keep(jobs []Job) {
	here := make(map[string]bool, len(jobs))
	for _, j := range jobs {
		here[j.ID] = true
	}
	for id := range l.jobs {
		if !here[id] {
			delete(l.jobs, id)
		}
	}
}

// Sent is what was sent of late.
func (l *Ledger) Sent(now time.Time) []Sent {
	var out []Sent
	for id, s := range l.sent {
		if s.Ago = max(0, now.Sub(s.at)); s.Ago > forgetSent {
			delete(l.sent, id)
			continue
		}
		out = append(out, s.Sent)
	}
	return out
}

// Judge fills in what speaks against a job from before.
func (l *Ledger) Judge(j *Job, now time.Time) {
	t := l.jobs[j.ID]
	if t == nil {
		return
	}
	if j.Wait = max(0, t.until.Sub(now)); j.Wait > 0 {
		j.WaitWhy = t.why
	}
	for node, n := range t.nodes {
		if now.Before(n.until) {
			if j.Refused == nil {
				j.Refused = make(map[api.NodeID]string)
			}
			j.Refused[node] = n.why
		}
	}
}
