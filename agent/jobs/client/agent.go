// Package client is the user's side of a job: the questions that mosrun, mosps
// and migrate put to the agent of their machine, and a Session, which is what
// a running mosrun does: it carries stdin, stdout, stderr and signals between its own
// descriptors and the job, wherever the job is and however often the agent is
// restarted meanwhile, and brings home how the job ended.
//
// It knows nothing of flags, exit statuses or terminals' signals: that is
// internal/nodecli.
package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// Agent is the agent of this machine, by its unix socket.
type Agent struct{ Socket string }

// askTime bounds a question that is answered from memory.
const askTime = 10 * time.Second

// startPatience is how long Start looks for a job that it may have begun,
// when the agent went away before it answered: an agent's restart takes a
// few seconds.
const startPatience = 60 * time.Second

func (a Agent) http() *unixhttp.Client { return unixhttp.New(a.Socket, "agent") }

// Start starts a job, or finds the one that was started with the same token,
// and returns its id. It waits as long as the start takes, which
// may be on another node.
func (a Agent) Start(ctx context.Context, req api.JobStart) (string, error) {
	var began time.Time // when the answer was lost
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		var started api.JobStarted
		err := a.http().Post(ctx, api.PathJobs, req, &started)
		var remote *unixhttp.Remote
		switch {
		case err == nil && started.ID == "":
			return "", fault.New(fault.Unavailable, "start a job", "", "the agent gave it no name", "is the agent of the same version?")
		case err == nil:
			return started.ID, nil
		case errors.As(err, &remote):
			return "", err
		case began.IsZero() && !answerLost(err):
			return "", err // nothing was asked
		case began.IsZero():
			began = time.Now()
		case time.Since(began) > startPatience:
			return "", fault.New(fault.Unavailable, "start a job", "", err, "the agent went away before it answered; mosps shows whether the job runs")
		}
		if !pause(ctx, wait) {
			return "", context.Cause(ctx)
		}
	}
}

// answerLost tells whether a request may have arrived although it failed.
func answerLost(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// pause waits, and tells whether ctx still lives.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// List is all jobs that the caller may see.
func (a Agent) List(ctx context.Context) (api.JobTable, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	var t api.JobTable
	return t, a.http().Get(ctx, api.PathJobs, &t)
}

// Members is the cluster as this agent knows it.
func (a Agent) Members(ctx context.Context) (api.MemberTable, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	var t api.MemberTable
	return t, a.http().Get(ctx, api.PathMembers, &t)
}

// Show is one job, by its id or the pid of its mosrun.
func (a Agent) Show(ctx context.Context, job string) (api.JobStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	var s api.JobStatus
	path, err := jobPath(job, "")
	if err != nil {
		return s, err
	}
	return s, a.http().Get(ctx, path, &s)
}

// Move moves a job and returns when it is there. It waits as long as that
// takes; when ctx ends first, the move goes on.
func (a Agent) Move(ctx context.Context, job, to string) (api.JobStatus, error) {
	var s api.JobStatus
	if to == "" {
		return s, fault.New(fault.Usage, "move job", job, "no destination is named", "give a node's number or name, or home")
	}
	path, err := jobPath(job, "/move")
	if err != nil {
		return s, err
	}
	return s, a.http().Post(ctx, path, api.JobMove{To: to}, &s)
}

// Moved says in words how a move ended that the agent has answered: an error
// if it was called off after all.
func Moved(s api.JobStatus) (string, error) {
	if s.Reason != "" {
		return "", fault.New(fault.Refused, "move job", s.ID, s.Reason, "the job runs on where it was")
	}
	where := fmt.Sprintf("moved to node %d", s.Node)
	if s.Node == s.Home {
		where = "moved home"
	}
	if s.Downtime > 0 {
		where += fmt.Sprintf(", stood still %d ms", s.Downtime.Milliseconds())
	}
	return "job " + s.ID + " " + where, nil
}

// Kill ends a job, wherever it is.
func (a Agent) Kill(ctx context.Context, job string) error {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	path, err := jobPath(job, "/kill")
	if err != nil {
		return err
	}
	return a.http().Post(ctx, path, struct{}{}, nil)
}

// jobPath is where a job is asked about. What cannot be a job's name would be
// another path, so it does not get that far.
func jobPath(job, verb string) (string, error) {
	other := func(r rune) bool {
		return !(r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r == '-' || r == '_')
	}
	if job == "" || strings.ContainsFunc(job, other) {
		return "", fault.New(fault.NotFound, "find job", fmt.Sprintf("%q", job), "no job has such a name", "mosps lists your jobs")
	}
	return api.PathJobs + "/" + job + verb, nil
}
