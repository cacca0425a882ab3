package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"mosimg/agent/load"
	"mosimg/agent/membership"
	"mosimg/agent/netup"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/unixhttp"
)

const (
	// gossipTargets is to how many members the load goes each second. MOSIX
	// sends to one; two keep news fresh when packets are lost.
	gossipTargets = 2
	// renewCheck is how often the certificate's age is looked at; the clock
	// may be stepped, so no timer is set for the day after.
	renewCheck = 15 * time.Second
	// fastReply: a long poll that ends sooner without news is not repeated
	// at once, or a head that does not hold it back would be flooded.
	fastReply = time.Second
)

// session is one stay at one place: get in, be a member, until ctx ends, the
// place changes or the head takes the membership back.
func (a *Agent) session(ctx context.Context, p place) {
	ctx, leave := context.WithCancel(ctx)
	defer leave()
	if a.cfg.NetStatus != "" {
		go a.watchNet(ctx, p, leave)
	}
	cred, err := loadCredentials(a.cfg.StateDir, p, a.key, time.Now())
	if err != nil {
		a.log.Debug("no earlier membership", "why", err)
	} else {
		a.log.Info("membership of before the restart is still good", "node", cred.node)
	}
	told := cred != nil // the head knows whether CRIU works here
	for ctx.Err() == nil {
		if cred == nil {
			told = a.isProbed()
			if cred = a.enrol(ctx, p); cred == nil {
				return
			}
		}
		if err := cred.save(a.cfg.StateDir); err != nil {
			a.log.Warn("membership not kept: a restart of the agent will enrol again", "why", err)
		}
		if err := a.belong(ctx, p, cred, told); err != nil {
			a.set(api.StateStarting, err.Error())
			sleep(ctx, backoff(2, rand.Float64()))
		}
		cred = nil
	}
}

// watchNet ends a session whose address is not ours any more.
func (a *Agent) watchNet(ctx context.Context, p place, leave func()) {
	for sleep(ctx, time.Second) {
		st, err := netup.ReadStatus(a.cfg.NetStatus)
		if err == nil && st.Up() && (st.Address != p.address || st.MAC != p.mac) {
			a.log.Warn("this machine's address has changed", "from", p.address, "to", st.Address)
			dropCredentials(a.cfg.StateDir)
			leave()
			return
		}
	}
}

// belong is the time as a member. It returns an error when membership could
// not begin, and nil when it ended.
func (a *Agent) belong(ctx context.Context, p place, cred *credentials, told bool) error {
	ctx, end := context.WithCancel(ctx)
	m := &member{loads: load.NewTable(cred.node)}
	m.cred.Store(cred)
	a.mode.drain(cred.drained())
	own := func() (*tls.Certificate, error) { return m.cred.Load().tls(a.key), nil }
	revoked := func(serial string) bool { return m.cred.Load().revoked[serial] }

	l, err := net.Listen("tcp", net.JoinHostPort(p.address, strconv.Itoa(a.cfg.APIPort)))
	if err != nil {
		end()
		return fault.New(fault.Environment, "listen for members on", p.address, err, "is another agent running here?")
	}
	meta := membership.Meta{
		Node: cred.node, APIPort: a.cfg.APIPort, Migration: a.inventory().CRIU.Usable,
		Fingerprint: identity.Fingerprint(a.key.Public()),
	}
	m.group, err = membership.Start(membership.Config{
		Node: cred.node, Address: p.address, Port: a.cfg.GossipPort,
		Meta: meta,
		Receive: func(msg []byte) {
			if err := m.loads.Take(msg, time.Now(), m.allowed); err != nil {
				a.log.Debug("load message dropped", "why", err)
			}
		},
		Changed: func(n api.NodeID, l api.Liveness) {
			if l == api.Left {
				m.loads.Forget(n)
			}
		},
		Log: a.log,
	}, cred.view)
	if err != nil {
		l.Close()
		end()
		return err
	}

	a.mu.Lock()
	a.member = m
	a.status.Node, a.status.Name = cred.node, cred.name
	a.mu.Unlock()
	if err := a.startEngine(cred.node); err != nil {
		// A node without jobs is still one to look at, and to mend.
		a.log.Error("no jobs can run here", "why", err)
	}
	a.setHostname(cred.name)
	a.set(api.StateMember, "")

	var wg sync.WaitGroup
	wg.Go(func() {
		err := a.server.ServeTLS(ctx, l, identity.ServerConfig(own, cred.ca, revoked, false))
		if err != nil {
			a.log.Error("API for members ended", "why", err)
		}
	})
	wg.Go(func() { a.gossip(ctx, m) })
	wg.Go(func() {
		select {
		case <-a.probed:
		case <-ctx.Done():
			return
		}
		meta.Migration = a.inventory().CRIU.Usable
		if err := m.group.SetMeta(meta); err != nil {
			a.log.Debug("not everybody has heard yet whether CRIU works here", "why", err)
		}
		if !told {
			a.readmit(ctx, p, m, false)
		}
	})
	wg.Go(func() { defer end(); a.follow(ctx, p, m) })
	<-ctx.Done()
	// Say goodbye before the sockets close.
	a.mu.Lock()
	a.member = nil
	a.mu.Unlock()
	m.group.Leave()
	end()
	wg.Wait()
	return nil
}

// allowed reports whether a node is a peer; safe from the moment that the
// credentials are stored.
func (m *member) allowed(n api.NodeID) bool {
	for _, p := range m.cred.Load().view.Peers {
		if p.Node == n {
			return true
		}
	}
	return false
}

// drained tells whether the head wants this node empty.
func (c *credentials) drained() bool {
	for _, p := range c.view.Peers {
		if p.Node == c.node {
			return p.Drain
		}
	}
	return false
}

// gossip measures and sends, once in load.Interval.
func (a *Agent) gossip(ctx context.Context, m *member) {
	var s load.Sampler
	if a.cfg.JobsLoad {
		s.Runnable = func() float64 {
			if e := a.engine.Load(); e != nil {
				return e.balancer.runnable()
			}
			return 0
		}
	}
	defer a.measured.Store(nil)
	tick := time.NewTicker(load.Interval)
	defer tick.Stop()
	for {
		now := time.Now()
		v, err := s.Sample(now)
		if err != nil {
			a.log.Error("load cannot be measured", "why", err)
			return
		}
		if e := a.engine.Load(); e != nil {
			v.Guests = len(e.node.Guests())
		}
		mode := a.mode.get()
		v.Speed, v.Blocked, v.Leaving = int(a.speed.Load()), mode.Blocked, mode.Leaving
		full, err := s.Pressure()
		if err != nil {
			a.log.Debug("memory pressure", "why", err)
		}
		a.measured.Store(&ownLoad{LoadVector: v, mean: s.Mean(), full: full})
		m.loads.SetOwn(v, now)
		m.group.Send(gossipTargets, m.loads.Message(now))
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// follow keeps the certificate and the view of the cluster fresh. It returns
// when ctx ends or when the head does not want us any more.
func (a *Agent) follow(ctx context.Context, p place, m *member) {
	own := func() (*tls.Certificate, error) { return m.cred.Load().tls(a.key), nil }
	hc := headClient(identity.ClientToHead(own, m.cred.Load().ca))
	defer hc.CloseIdleConnections()
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { a.renewLoop(ctx, hc, p, m) })

	for n := 0; ctx.Err() == nil; {
		have := m.cred.Load().view.Generation
		began := time.Now()
		var v api.ClusterView
		err := unixhttp.DoJSON(ctx, hc, http.MethodGet, fmt.Sprintf("%s%s?have=%d", p.head, api.PathCluster, have), nil, &v)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			n = 0
			a.set(api.StateMember, a.netReason())
			if v.Generation != have {
				a.take(m, v)
			} else if time.Since(began) < fastReply {
				sleep(ctx, fastReply)
			}
			if !m.cred.Load().selfRevoked() {
				continue
			}
		default:
			a.set(api.StateMember, "the head does not answer: "+err.Error())
		}
		// Either the head is away, or our certificate is not good any more,
		// or the head does not want us: an enrolment, which needs no
		// certificate, tells them apart.
		rejected := m.cred.Load().selfRevoked() || fault.KindOf(err) == fault.Refused
		if !a.readmit(ctx, p, m, rejected) {
			return
		}
		if !sleep(ctx, backoff(n, rand.Float64())) {
			return
		}
		n++
	}
}

// readmit asks the head whether we still belong, and takes over the fresh
// certificate. It returns false when we do not: the head, which had rejected
// us as a member, says no here too, or it gave us another number.
func (a *Agent) readmit(ctx context.Context, p place, m *member, rejected bool) bool {
	hc := headClient(identity.PinnedClient(p.ca))
	defer hc.CloseIdleConnections()
	cred, v := a.enrolOnce(ctx, hc, p, 0, 0)
	switch {
	case ctx.Err() != nil:
		return true
	case v.in && cred.node == m.cred.Load().node:
		a.replace(m, func(old *credentials) *credentials {
			if !rejected && old.cert.NotAfter.After(cred.cert.NotAfter) {
				return cred.withCert(old.cert) // renewed meanwhile
			}
			return cred
		})
		return true
	case v.in, rejected && v.state != api.StateNoHead:
		a.log.Warn("membership taken back by the head", "state", v.state, "why", v.reason)
		dropCredentials(a.cfg.StateDir)
		return false
	}
	return true // members go on without the head
}

// take applies a new view.
func (a *Agent) take(m *member, v api.ClusterView) {
	if old := m.cred.Load().view.Generation; v.Generation < old {
		a.log.Warn("the head went back to an older state", "from", old, "to", v.Generation)
	}
	a.replace(m, func(c *credentials) *credentials { return c.withView(v) })
	a.log.Debug("new view", "generation", v.Generation, "peers", len(v.Peers), "revoked", len(v.Revoked), "keys", len(v.GossipKeys))
}

// replace puts changed credentials in force, everywhere at once.
func (a *Agent) replace(m *member, change func(*credentials) *credentials) {
	m.writing.Lock()
	defer m.writing.Unlock()
	c := change(m.cred.Load())
	m.cred.Store(c)
	a.mode.drain(c.drained())
	a.server.CloseRevoked(func(serial string) bool { return c.revoked[serial] })
	if err := m.group.SetView(c.view); err != nil {
		a.log.Error("gossip keys", "why", err)
	}
	if err := c.save(a.cfg.StateDir); err != nil {
		a.log.Warn("membership not kept: a restart of the agent will enrol again", "why", err)
	}
	a.edit(func(s *api.AgentStatus) { s.Name = c.name })
	a.setHostname(c.name)
}

// renewLoop renews the certificate at half of its life. Once it has expired
// follow fails and enrols again.
func (a *Agent) renewLoop(ctx context.Context, hc *http.Client, p place, m *member) {
	for {
		c := m.cred.Load()
		if now := time.Now(); now.After(c.renewAt()) && now.Before(c.cert.NotAfter) {
			if err := a.renew(ctx, hc, p, m, c); err != nil && ctx.Err() == nil {
				a.log.Warn("certificate not renewed, it will be tried again", "expires", c.cert.NotAfter, "why", err)
			}
		}
		if !sleep(ctx, renewCheck) {
			return
		}
	}
}

func (a *Agent) renew(ctx context.Context, hc *http.Client, p place, m *member, c *credentials) error {
	csr, err := identity.NewCSR(a.key)
	if err != nil {
		return err
	}
	var reply api.RenewReply
	if err := unixhttp.DoJSON(ctx, hc, http.MethodPost, p.head+api.PathRenew, api.RenewRequest{CSR: csr}, &reply); err != nil {
		return err
	}
	cert, err := checkCert(reply.Certificate, c.ca, a.key, c.node, time.Now())
	if err != nil {
		return fault.New(fault.Untrusted, "renew at", p.head, err, "")
	}
	a.replace(m, func(c *credentials) *credentials { return c.withCert(cert) })
	a.log.Info("certificate renewed", "expires", cert.NotAfter)
	return nil
}

// netReason is what our own network service complains about, or "".
func (a *Agent) netReason() string {
	if a.cfg.NetStatus == "" {
		return ""
	}
	st, err := netup.ReadStatus(a.cfg.NetStatus)
	if err != nil {
		return err.Error()
	}
	return st.Reason
}
