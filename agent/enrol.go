package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/unixhttp"
	"mosimg/internal/version"
)

const (
	// pollWait is how long the head may hold back a pending answer.
	pollWait = 25 * time.Second
	// replyLimit is how long an answer may take beyond pollWait.
	replyLimit = 15 * time.Second
	// slowRetry is for answers that only a person changes.
	slowRetry = 20 * time.Second
	// firstRetry and lastRetry bound the pause after a failure.
	firstRetry = time.Second
	lastRetry  = 15 * time.Second
	// maxSkew is how far our clock may be off the head's: certificates are
	// backdated by identity.Backdate, and logs should be comparable.
	maxSkew = 30 * time.Second
)

// backoff is the pause before attempt n+1, n counted from 0; jitter in [0,1)
// spreads machines that failed together, such as all nodes of a head that
// was restarted.
func backoff(n int, jitter float64) time.Duration {
	d := lastRetry
	if n < 10 {
		d = min(firstRetry<<n, lastRetry)
	}
	return time.Duration(float64(d) * (0.75 + jitter/2))
}

// verdict is what an answer of the head means to us.
type verdict struct {
	state  api.AgentState
	reason string
	in     bool          // approved
	again  time.Duration // when to ask again if not
}

// judge reads the head's answer to an enrolment.
func judge(r *api.EnrolReply) verdict {
	switch r.State {
	case api.Approved:
		return verdict{state: api.StateMember, in: true}
	case api.Pending:
		// A head that holds the answer back sends 0: ask again at once, but
		// never in a tight loop.
		again := time.Duration(r.RetryMillis) * time.Millisecond
		return verdict{state: api.StatePending, reason: r.Reason, again: min(max(again, 200*time.Millisecond), slowRetry)}
	default:
		reason := r.Reason
		if reason == "" {
			reason = "the head says " + string(r.State)
		}
		return verdict{state: api.StateDenied, reason: reason, again: slowRetry}
	}
}

// judgeError reads a failure to get an answer. n counts failures in a row.
func judgeError(err error, n int, jitter float64) verdict {
	v := verdict{state: api.StateNoHead, reason: err.Error(), again: backoff(n, jitter)}
	switch {
	case errors.Is(err, identity.ErrPin):
		v.again = slowRetry
	case fault.KindOf(err) == fault.Refused, fault.KindOf(err) == fault.Usage, fault.KindOf(err) == fault.Untrusted:
		// The head answered, and said no.
		v.state, v.again = api.StateDenied, slowRetry
	default:
		if f := (*fault.Error)(nil); errors.As(err, &f) {
			v.reason = "the head does not answer: " + f.Err.Error()
		}
	}
	return v
}

// headClient is an HTTP client with one connection to a head.
func headClient(cfg *tls.Config) *http.Client {
	return &http.Client{
		Timeout: pollWait + replyLimit,
		Transport: &http.Transport{
			TLSClientConfig:       cfg,
			TLSHandshakeTimeout:   10 * time.Second,
			ResponseHeaderTimeout: pollWait + replyLimit,
			IdleConnTimeout:       time.Minute,
			MaxConnsPerHost:       2,
			DisableCompression:    true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// enrol asks the head until it lets us in; the state says what we wait for.
// It returns nil when ctx ended.
func (a *Agent) enrol(ctx context.Context, p place) *credentials {
	hc := headClient(identity.PinnedClient(p.ca))
	defer hc.CloseIdleConnections()
	wait := time.Duration(0) // the first answer is wanted at once, to show it
	for n := 0; ; {
		cred, v := a.enrolOnce(ctx, hc, p, wait, n)
		if ctx.Err() != nil {
			return nil
		}
		if v.in {
			return cred
		}
		a.set(v.state, v.reason)
		if v.state == api.StateNoHead {
			n++
			wait = 0
		} else {
			n = 0
		}
		if v.state == api.StatePending {
			wait = pollWait
		}
		if !sleep(ctx, v.again) {
			return nil
		}
	}
}

// enrolOnce is one question and what its answer means.
func (a *Agent) enrolOnce(ctx context.Context, hc *http.Client, p place, wait time.Duration, n int) (*credentials, verdict) {
	if a.cfg.JoinFile != "" { // a restarted head has left a new nonce
		if t, err := readTicket(a.cfg.JoinFile); err == nil && t.CA == p.ca {
			p.nonce = t.Nonce
		}
	}
	csr, err := identity.NewCSR(a.key)
	if err != nil {
		return nil, judgeError(err, n, rand.Float64())
	}
	host, _ := os.Hostname()
	req := api.EnrolRequest{
		Protocol: version.Protocol, CSR: csr, Nonce: p.nonce, MAC: p.mac, Address: p.address,
		Image: a.cfg.Image, Hostname: host, Inventory: a.inventory(), WaitMillis: int(wait.Milliseconds()),
	}
	var reply api.EnrolReply
	if err := unixhttp.DoJSON(ctx, hc, http.MethodPost, p.head+api.PathEnrol, req, &reply); err != nil {
		return nil, judgeError(err, n, rand.Float64())
	}
	if err := a.checkClock(reply.HeadTime); err != nil {
		return nil, verdict{state: api.StateDenied, reason: err.Error(), again: slowRetry}
	}
	v := judge(&reply)
	a.edit(func(s *api.AgentStatus) { s.Node, s.Name = reply.Node, reply.Name })
	if !v.in {
		return nil, v
	}
	if reply.Cluster == nil {
		return nil, judgeError(fault.New(fault.Untrusted, "enrol at", p.head, "it approved without a view of the cluster", "is the head of the same version?"), n, 0)
	}
	cred, err := newCredentials(reply.Certificate, reply.CA, p, a.key, reply.Node, reply.Name, *reply.Cluster, time.Now())
	if err != nil {
		return nil, judgeError(fault.New(fault.Untrusted, "enrol at", p.head, err, ""), n, rand.Float64())
	}
	return cred, v
}

// checkClock compares our clock with the head's, as it stood when it sent its
// answer. A clock that is far off is set on a machine of ours; elsewhere it is
// a refusal, since certificates would not be valid yet or not any more.
func (a *Agent) checkClock(head time.Time) error {
	if head.IsZero() {
		return nil
	}
	off := time.Until(head)
	if off.Abs() <= maxSkew {
		return nil
	}
	text := fmt.Sprintf("%v behind", off.Round(time.Second))
	if off < 0 {
		text = fmt.Sprintf("%v ahead of", (-off).Round(time.Second))
	}
	if !a.cfg.OwnMachine {
		return fault.New(fault.Refused, "compare", "clock", "this machine's clock is "+text+" the head's",
			"set it, e.g. with chrony or date; the agent may do so only on machines that mosimg booted")
	}
	if err := a.cfg.setClock(head); err != nil {
		return fault.New(fault.Environment, "set", "clock", err, "this machine's clock is "+text+" the head's")
	}
	a.log.Info("clock set to the head's", "it_was", text+" it")
	return nil
}

// setHostname gives a machine of ours the name that the head knows it by.
func (a *Agent) setHostname(name string) {
	if !a.cfg.OwnMachine || name == "" || len(name) > 64 {
		return
	}
	if old, err := os.Hostname(); err == nil && old == name {
		return
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		a.log.Warn("host name not set", "name", name, "why", err)
	}
}
