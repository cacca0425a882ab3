// Package enrol is the head API and the rules behind it: who is let in, who
// waits, who is turned away, and what members are told. The rules themselves
// are one pure function (judge) over one transaction of the registry, so an
// answer that was given is always on disk.
//
// The threat it works against: whoever is on the boot network can send any MAC
// and read anything that is served. A MAC is therefore no identity. What
// counts is a key made by the machine, a one-shot nonce that was given only to
// the address which leases to that MAC, an operator's approval, and that a
// living member keeps its place against a newcomer with its MAC.
package enrol

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"reflect"
	"sync"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/version"
	"mosimg/pxe/limit"
	"mosimg/pxe/registry"
	"mosimg/pxe/trace"
)

// Roles in records.
const (
	RoleHead = "head"
	RoleNode = "node"
)

const (
	// NonceLife is the time from a machine's script to its first enrolment:
	// a slow PC on a 10 Mbit/s hub needs 2 minutes, the rest is margin.
	NonceLife = 15 * time.Minute
	// maxWait bounds a long poll.
	maxWait = 30 * time.Second
	// rivalWindow is how long a pending machine that stopped asking keeps
	// its place against another key with its MAC: a long poll and a bit.
	rivalWindow = maxWait + 5*time.Second
	// maxPending bounds the machines that wait, and maxNonces the nonces
	// that wait to be used: both can be made by anyone on the network.
	maxPending = 1024
	maxNonces  = 4096
	// noncesPerMAC are kept unused for one machine: it may fetch its script
	// twice, but older ones are then nobody's.
	noncesPerMAC = 4
	// maxCerts that are good at once for one node; the oldest become void.
	maxCerts = 8
)

// Service is the membership service. Set the fields, then call Run.
type Service struct {
	Store *registry.Store
	// Prober asks an old member whether it is alive; nil means that none is.
	Prober Prober
	// CheckSource binds nonces to the address that fetched them. It is off
	// when another server leases addresses, since that one may give iPXE
	// and Linux on the same machine different ones.
	CheckSource bool
	// Listed are MACs that are approved without a question.
	Listed map[string]bool
	// Names are node names by MAC.
	Names map[string]string
	// Offered names the image set that the next boot of a machine gets which
	// runs one for arch ("" if that is not known); may be nil.
	Offered func(arch string) string
	// TicketUsed is called when the local ticket was used and must be
	// written anew; may be nil.
	TicketUsed func()
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log may be nil.
	Log *slog.Logger

	once   sync.Once
	limits *limit.Limiter
	seen   seen
	polls  polls
	views  viewCache
	source headCert
}

func (s *Service) init() {
	s.once.Do(func() {
		// An agent sends one request per 30 s; a room that boots behind
		// one relay shares no address.
		s.limits = limit.New(5, 20, 4096)
	})
}

func (s *Service) now() time.Time {
	if s.Now == nil {
		return time.Now()
	}
	return s.Now()
}

func (s *Service) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}

// IssueNonce makes the boot nonce for one machine's script. The zero from binds
// it to no address.
func (s *Service) IssueNonce(mac string, from netip.Addr) (string, error) {
	n := &registry.Nonce{Value: newNonce(), MAC: mac, Expires: s.now().Add(NonceLife)}
	if from.IsValid() {
		n.Source = from.String()
	}
	return n.Value, s.Store.Update(func(tx *registry.Tx) error {
		tx.Prune()
		all := tx.Nonces()
		var mine []*registry.Nonce
		for _, o := range all {
			if o.MAC == mac && o.Key == nil && !o.Local {
				mine = append(mine, o)
			}
		}
		for len(mine) >= noncesPerMAC {
			oldest := 0
			for i, o := range mine {
				if o.Expires.Before(mine[oldest].Expires) {
					oldest = i
				}
			}
			tx.DeleteNonce(mine[oldest].Value)
			mine = append(mine[:oldest], mine[oldest+1:]...)
		}
		if len(all) >= maxNonces {
			return fault.New(fault.Unavailable, "make a boot script", mac, "too many machines are booting", "try again in some minutes")
		}
		tx.PutNonce(n)
		return nil
	})
}

// IssueTicket makes the nonce for the agent on the head's own machine and
// drops those that were never used.
func (s *Service) IssueTicket(mac string, addr netip.Addr) (string, error) {
	n := &registry.Nonce{Value: newNonce(), MAC: mac, Source: addr.String(), Local: true}
	return n.Value, s.Store.Update(func(tx *registry.Tx) error {
		bound := map[string]bool{}
		for _, r := range tx.Nodes() {
			bound[r.Nonce] = true
		}
		for _, o := range tx.Nonces() {
			if o.Local && !bound[o.Value] {
				tx.DeleteNonce(o.Value)
			}
		}
		tx.PutNonce(n)
		return nil
	})
}

// Approved tells whether a machine's enrolment was approved by an operator or
// by a rule.
func (s *Service) Approved(mac string) (yes bool, err error) {
	err = s.Store.View(func(tx *registry.Tx) error {
		n := tx.Node(mac)
		yes = s.Listed[mac] || n != nil && n.State == api.Approved
		return nil
	})
	return yes, err
}

// Expected tells whether a machine would be let in if it enrolled now: it is
// approved, or an adoption window is open and nobody decided against it.
func (s *Service) Expected(mac string) (yes bool, err error) {
	err = s.Store.View(func(tx *registry.Tx) error {
		n := tx.Node(mac)
		switch {
		case n == nil, n.State == api.Pending:
			yes = s.Listed[mac] || tx.Adoption().Open(tx.Now())
		default:
			yes = n.State == api.Approved
		}
		return nil
	})
	return yes, err
}

// Denied is the reason why a machine must not boot from us, or "".
func (s *Service) Denied(mac string) (reason string, err error) {
	err = s.Store.View(func(tx *registry.Tx) error {
		if n := tx.Node(mac); n != nil && (n.State == api.Denied || n.State == api.Revoked) {
			reason = "an operator set it to " + string(n.State)
		}
		return nil
	})
	return reason, err
}

// Enrol decides on one request from an address. It may block for as long as
// the request allows while the machine is pending.
func (s *Service) Enrol(ctx context.Context, req *api.EnrolRequest, source netip.Addr) (*api.EnrolReply, error) {
	s.init()
	csr, err := checkRequest(req)
	if err != nil {
		return nil, err
	}
	spki := csr.RawSubjectPublicKeyInfo
	deadline := s.now().Add(min(time.Duration(max(0, req.WaitMillis))*time.Millisecond, maxWait))
	timeout := time.NewTimer(deadline.Sub(s.now()))
	defer timeout.Stop()
	first := true
	for {
		changed := s.Store.Changed()
		reply, err := s.decide(ctx, req, csr, spki, source, first)
		if err != nil {
			return nil, err
		}
		if reply.State != api.Pending || !s.now().Before(deadline) {
			return reply, nil
		}
		first = false
		select {
		case <-changed:
		case <-timeout.C:
		case <-ctx.Done():
			return reply, nil
		}
	}
}

// checkRequest checks what needs no registry.
func checkRequest(req *api.EnrolRequest) (*x509.CertificateRequest, error) {
	bad := func(kind fault.Kind, cause any, hint string) error {
		return fault.New(kind, "enrol", req.MAC, cause, hint)
	}
	if req.Protocol != version.Protocol {
		return nil, bad(fault.Refused, fmt.Sprintf("the machine speaks protocol %d and the head %d", req.Protocol, version.Protocol),
			"boot an image that was built with the head's version of mosimg")
	}
	mac, err := net.ParseMAC(req.MAC)
	if err != nil || len(mac) != 6 {
		req.MAC = printable(req.MAC)
		return nil, bad(fault.Usage, "not an Ethernet address", "")
	}
	req.MAC = mac.String()
	csr, err := identity.ParseCSR(req.CSR)
	if err != nil {
		return nil, bad(fault.Untrusted, fmt.Errorf("certificate request: %w", err), "")
	}
	return csr, nil
}

// decide is one round of Enrol: judge, probe if the rules ask for it, and
// carry the verdict out in the same transaction that the facts came from.
func (s *Service) decide(ctx context.Context, req *api.EnrolRequest, csr *x509.CertificateRequest, spki []byte, source netip.Addr, first bool) (*api.EnrolReply, error) {
	probed, about := notProbed, []byte(nil)
	for {
		var v verdict
		var rec *registry.Node
		var reply *api.EnrolReply
		usedTicket := false
		err := s.Store.Update(func(tx *registry.Tx) error {
			f := s.facts(tx, req, spki, source, first)
			if f.rec != nil && string(f.rec.Key) == string(about) {
				f.probed = probed
			}
			v, rec = judge(f), f.rec
			if v.act == ask {
				return nil
			}
			var err error
			reply, err = s.carryOut(tx, v, f, req, csr, first)
			usedTicket = err == nil && f.nonce != nil && f.nonce.Local && f.nonce.Key == nil && v.act == admit
			return err
		})
		if err != nil {
			return nil, err
		}
		if v.act == ask {
			// Slow, so outside the transaction. The record may change
			// meanwhile: the answer counts only for the key it is about.
			about, probed = rec.Key, s.probe(ctx, rec)
			continue
		}
		if v.act == admit && (v.reboot || rec == nil || rec.State != api.Approved) {
			s.polls.admitted(reply.Node)
		}
		if usedTicket && s.TicketUsed != nil {
			s.TicketUsed()
		}
		if first || reply == nil || reply.State != api.Pending {
			s.traceEnrol(req, source, v, reply)
		}
		if v.act == refuse {
			kind := fault.Refused
			if v.busy {
				kind = fault.Unavailable
			}
			return nil, fault.New(kind, "enrol", req.MAC, v.reason, "")
		}
		return reply, nil
	}
}

// facts gathers what judge looks at.
func (s *Service) facts(tx *registry.Tx, req *api.EnrolRequest, spki []byte, source netip.Addr, first bool) facts {
	f := facts{
		now: tx.Now(), mac: req.MAC, key: spki, source: source.String(), checkSource: s.CheckSource,
		nonce: tx.Nonce(req.Nonce), rec: tx.Node(req.MAC),
		listed: s.Listed[req.MAC], window: tx.Adoption().Open(tx.Now()),
	}
	if f.nonce != nil && f.nonce.Local {
		f.rec = headRecord(tx, f.rec)
	}
	if f.rec == nil {
		pending := 0
		for _, n := range tx.Nodes() {
			if n.State == api.Pending {
				pending++
			}
		}
		f.full = pending >= maxPending
		return f
	}
	same := string(f.rec.Key) == string(spki)
	f.rival = !same && tx.Now().Sub(s.seen.last(req.MAC)) < rivalWindow && (f.rec.State == api.Pending || !settled(f.rec, tx.Now()))
	if first {
		// Only a request that just came in is a sign of life: one that
		// waits here may be that of a machine switched off meanwhile.
		f.contested = same && s.seen.contested(req.MAC, tx.Now())
		if f.rival {
			s.seen.contend(req.MAC, tx.Now())
		}
	}
	return f
}

// settled tells whether a member had time to start its API after it got its
// certificate, so that a probe says something.
func settled(n *registry.Node, now time.Time) bool {
	const start = 15 * time.Second
	cert, err := x509.ParseCertificate(n.Cert)
	return err == nil && now.Sub(cert.NotBefore.Add(identity.Backdate)) > start
}

// headRecord is the record of the head's own machine, which stays the same
// when its network card is replaced.
func headRecord(tx *registry.Tx, byMAC *registry.Node) *registry.Node {
	for _, n := range tx.Nodes() {
		if n.Role == RoleHead {
			return n
		}
	}
	return byMAC
}

// carryOut writes a verdict down and makes the reply.
func (s *Service) carryOut(tx *registry.Tx, v verdict, f facts, req *api.EnrolRequest, csr *x509.CertificateRequest, first bool) (*api.EnrolReply, error) {
	n := f.rec
	if v.alert != "" {
		// The victim is whom the nonce was given to.
		victim := n
		if f.nonce != nil && f.nonce.MAC != f.mac {
			victim = tx.Node(f.nonce.MAC)
		}
		if victim != nil && victim.Alert != v.alert {
			victim.Alert = v.alert
			tx.PutNode(victim)
		}
		s.log().Warn("enrol: alert", "mac", f.mac, "address", f.source, "alert", v.alert)
	}
	if v.act == refuse {
		return nil, nil
	}
	reply := &api.EnrolReply{State: api.Pending, Reason: v.reason, HeadTime: f.now}
	switch {
	case v.act == turnAway:
		reply.State, reply.Node, reply.Name = api.Denied, n.Node, n.Name
		return reply, nil
	case n == nil:
		n = &registry.Node{NodeRecord: api.NodeRecord{MAC: f.mac, State: api.Pending, Role: RoleNode, FirstSeen: f.now}}
	case n.MAC != f.mac:
		// The head's machine has a new network card: its record moves, and
		// ends what another machine had under this MAC.
		if other := tx.Node(f.mac); other != nil {
			tx.Revoke(other)
			tx.DeleteNode(f.mac)
		}
		tx.DeleteNode(n.MAC)
		n.MAC = f.mac
	}
	// Bound before anything is told; and again if it went with a record.
	bound := *f.nonce
	bound.Key = f.key
	if f.nonce.Key == nil || tx.Nonce(bound.Value) == nil {
		tx.PutNonce(&bound)
	}
	before := *n
	if v.take {
		take(tx, v, n, f, req, csr)
		if first {
			s.seen.touch(f.mac, f.now)
		}
	}
	if v.act == admit {
		if f.nonce.Local {
			n.Role = RoleHead
			if n.Name == "" || n.Name == fmt.Sprintf("node%d", n.Node) {
				n.Name = freeName(tx, RoleHead)
			}
		}
		if n.State != api.Approved {
			s.approve(tx, n)
			if v.adopt {
				a := tx.Adoption()
				a.Left--
				tx.PutAdoption(a)
			}
		}
		der, err := s.certificate(tx, n, csr, f)
		if err != nil {
			return nil, err
		}
		reply.State, reply.Certificate, reply.CA = api.Approved, der, s.Store.CA().Cert.Raw
	} else {
		reply.RetryMillis = 2000
	}
	if !reflect.DeepEqual(&before, n) || f.rec == nil {
		n.LastSeen = f.now
		tx.PutNode(n)
	}
	reply.Node, reply.Name = n.Node, n.Name
	if v.act == admit {
		reply.Cluster = tx.View()
	}
	return reply, nil
}

// take makes the request's key, nonce and inventory the record's.
func take(tx *registry.Tx, v verdict, n *registry.Node, f facts, req *api.EnrolRequest, csr *x509.CertificateRequest) {
	if v.reboot {
		tx.Revoke(n)
	}
	n.Key, n.Nonce = f.key, f.nonce.Value
	n.Fingerprint = identity.Fingerprint(csr.PublicKey)
	n.Address = f.source
	n.Image = printable(req.Image)
	inv := cleanInventory(req.Inventory)
	n.Inventory = &inv
}

// certificate issues a certificate, or gives the last one again while it is
// young and the same in all but its date: a machine that asks in a loop must
// not fill the registry.
func (s *Service) certificate(tx *registry.Tx, n *registry.Node, csr *x509.CertificateRequest, f facts) ([]byte, error) {
	if old, err := x509.ParseCertificate(n.Cert); err == nil && identity.SameKey(old.PublicKey, csr.PublicKey) &&
		len(old.IPAddresses) == 1 && old.IPAddresses[0].String() == n.Address &&
		f.now.After(old.NotBefore) && f.now.Before(old.NotBefore.Add(identity.CertLifetime/4)) && !tx.IsRevoked(identity.Serial(old)) {
		return n.Cert, nil
	}
	return s.issue(tx, n, csr)
}

func (s *Service) issue(tx *registry.Tx, n *registry.Node, csr *x509.CertificateRequest) ([]byte, error) {
	cert, err := s.Store.CA().IssueNode(csr.PublicKey, n.Node, net.ParseIP(n.Address), tx.Now())
	if err != nil {
		return nil, err
	}
	var keep []registry.Cert
	for _, c := range n.Certs {
		if tx.Now().Before(c.Expires) {
			keep = append(keep, c)
		}
	}
	if drop := len(keep) - maxCerts + 1; drop > 0 {
		tx.Revoke(&registry.Node{NodeRecord: api.NodeRecord{Node: n.Node}, Certs: keep[:drop]})
		keep = keep[drop:]
	}
	n.Cert = cert.Raw
	n.Certs = append(keep, registry.Cert{Serial: identity.Serial(cert), Expires: cert.NotAfter})
	return cert.Raw, nil
}

// Renew issues a certificate for a member, for its old key or a new one.
func (s *Service) Renew(peer *x509.Certificate, req *api.RenewRequest) (*api.RenewReply, error) {
	csr, err := identity.ParseCSR(req.CSR)
	if err != nil {
		return nil, fault.New(fault.Untrusted, "renew certificate", "", err, "")
	}
	reply := new(api.RenewReply)
	return reply, s.Store.Update(func(tx *registry.Tx) error {
		n, err := member(tx, peer)
		if err != nil {
			return err
		}
		reply.Certificate, err = s.issue(tx, n, csr)
		if err != nil {
			return err
		}
		n.Key, n.Fingerprint = csr.RawSubjectPublicKeyInfo, identity.Fingerprint(csr.PublicKey)
		if b := tx.Nonce(n.Nonce); b != nil {
			b.Key = n.Key // the boot's nonce follows the machine's key
			tx.PutNonce(b)
		}
		tx.PutNode(n)
		return nil
	})
}

// member is the record of a member that presents a certificate, or why it is
// none.
func member(tx *registry.Tx, peer *x509.Certificate) (*registry.Node, error) {
	no := func(cause string) error { return fault.New(fault.Refused, "talk to the head", "", cause, "") }
	if peer == nil {
		return nil, no("no certificate: enrol first")
	}
	id, err := identity.NodeOf(peer)
	if err != nil {
		return nil, no(err.Error())
	}
	n := tx.NodeByID(id)
	switch {
	case tx.IsRevoked(identity.Serial(peer)):
		return nil, no(fmt.Sprintf("the certificate of node %d is revoked", id))
	case n == nil:
		return nil, no(fmt.Sprintf("node %d is no longer in the registry", id))
	case n.State != api.Approved:
		return nil, no(fmt.Sprintf("node %d is %s", id, n.State))
	}
	return n, nil
}

func (s *Service) traceEnrol(req *api.EnrolRequest, source netip.Addr, v verdict, reply *api.EnrolReply) {
	state, node, reason := "refused", api.NodeID(0), v.reason
	if reply != nil {
		state, node = string(reply.State), reply.Node
	}
	args := []any{"address", source, "state", state}
	if node != 0 {
		args = append(args, "node", int(node))
	}
	if v.reboot {
		args = append(args, "reboot", true)
	}
	if reason != "" {
		args = append(args, "reason", reason)
	}
	trace.Event(s.log(), trace.Enrol, req.MAC, args...)
}

// headCert is the head API's server certificate, issued anew at half of its
// life and whenever the clock left it.
type headCert struct {
	// mu guards the following.
	mu   sync.Mutex
	cert *tls.Certificate
}

func (s *Service) serverCertificate() (*tls.Certificate, error) {
	s.source.mu.Lock()
	defer s.source.mu.Unlock()
	now := s.now()
	if c := s.source.cert; c != nil && now.After(c.Leaf.NotBefore) && now.Before(c.Leaf.NotBefore.Add(identity.CertLifetime/2)) {
		return c, nil
	}
	leaf, err := s.Store.CA().IssueHead(s.Store.HeadKey().Public(), now)
	if err != nil {
		return nil, err
	}
	s.source.cert = identity.TLSCertificate(leaf, s.Store.CA().Cert, s.Store.HeadKey())
	return s.source.cert, nil
}

// TLS is the configuration of the head API. A void certificate passes the
// handshake and is refused by the handlers, so that the agent learns why.
func (s *Service) TLS() *tls.Config {
	c := identity.ServerConfig(s.serverCertificate, s.Store.CA().Cert, nil, true)
	c.Time = s.now
	return c
}
