package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/unixhttp"
)

// testHead is a small head with real TLS: enough of the head API for agents,
// and switches that the tests turn. It approves whom approve says.
type testHead struct {
	t   *testing.T
	ca  *identity.CA
	url string
	srv *http.Server
	l   net.Listener

	mu      sync.Mutex // guards the following
	changed chan struct{}
	nodes   map[string]*testNode // by MAC
	view    api.ClusterView
	// approve decides about a MAC that asks for the first time.
	approve bool
	// skew is how far this head's clock is off ours.
	skew time.Duration
	// issued is subtracted from a certificate's time of issue.
	issued time.Duration
	enrols int
	renews int
}

type testNode struct {
	id     api.NodeID
	state  api.NodeState
	key    any
	serial []string
}

func newKey32() []byte {
	k := make([]byte, 32)
	rand.Read(k)
	return k
}

func startHead(t *testing.T) *testHead {
	t.Helper()
	ca, err := identity.NewCA("testcluster")
	if err != nil {
		t.Fatal(err)
	}
	h := &testHead{
		t: t, ca: ca, approve: true,
		changed: make(chan struct{}),
		nodes:   make(map[string]*testNode),
		view:    api.ClusterView{Generation: 1, Name: "testcluster", GossipKeys: [][]byte{newKey32()}},
	}
	h.listen("127.0.0.1:0")
	return h
}

func (h *testHead) listen(addr string) {
	h.t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		h.t.Fatal(err)
	}
	leaf, err := h.ca.IssueHead(key.Public(), time.Now().Add(h.skew))
	if err != nil {
		h.t.Fatal(err)
	}
	own := identity.TLSCertificate(leaf, h.ca.Cert, key)
	cfg := identity.ServerConfig(func() (*tls.Certificate, error) { return own, nil }, h.ca.Cert, nil, true)
	cfg.Time = func() time.Time { return time.Now().Add(h.skew) }
	l, err := tls.Listen("tcp", addr, cfg)
	if err != nil {
		h.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+api.PathEnrol, h.enrol)
	mux.HandleFunc("POST "+api.PathRenew, h.member(h.renew))
	mux.HandleFunc("GET "+api.PathCluster, h.member(h.cluster))
	h.srv = &http.Server{Handler: mux, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	h.l = l
	h.url = "https://" + l.Addr().String()
	go h.srv.Serve(l)
	h.t.Cleanup(func() { h.srv.Close() })
}

// stop and restart play a head that is away for a while.
func (h *testHead) stop() { h.l.Close(); h.srv.Close() }

func (h *testHead) restart() { h.listen(h.url[len("https://"):]) }

// change edits the head's state under its lock and wakes everybody.
func (h *testHead) change(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
	h.view.Generation++
	close(h.changed)
	h.changed = make(chan struct{})
}

func (h *testHead) admit(mac string) { h.change(func() { h.nodes[mac].state = api.Approved }) }

// revoke turns a member out as the real head does: certificates void, peer
// gone, key rotated in three phases.
func (h *testHead) revoke(mac string) {
	fresh := newKey32()
	h.change(func() {
		n := h.nodes[mac]
		n.state = api.Revoked
		h.view.Revoked = append(h.view.Revoked, n.serial...)
		var peers []api.Peer
		for _, p := range h.view.Peers {
			if p.Node != n.id {
				peers = append(peers, p)
			}
		}
		h.view.Peers = peers
		h.view.GossipKeys = [][]byte{h.view.GossipKeys[0], fresh}
	})
	h.settle()
	h.change(func() { h.view.GossipKeys = [][]byte{fresh, h.view.GossipKeys[0]} })
	h.settle()
	h.change(func() { h.view.GossipKeys = [][]byte{fresh} })
}

// settle gives agents the time to take a view; the real head waits for their
// next poll.
func (h *testHead) settle() { time.Sleep(300 * time.Millisecond) }

func (h *testHead) enrol(w http.ResponseWriter, r *http.Request) {
	var req api.EnrolRequest
	if err := unixhttp.ReadJSON(w, r, &req); err != nil {
		unixhttp.Fail(w, err)
		return
	}
	csr, err := identity.ParseCSR(req.CSR)
	if err != nil {
		unixhttp.Fail(w, fault.New(fault.Untrusted, "enrol", req.MAC, err, ""))
		return
	}
	deadline := time.After(time.Duration(req.WaitMillis) * time.Millisecond)
	for {
		h.mu.Lock()
		h.enrols++
		n := h.nodes[req.MAC]
		if n == nil {
			n = &testNode{id: api.NodeID(len(h.nodes) + 1), state: api.Pending}
			if h.approve {
				n.state = api.Approved
			}
			h.nodes[req.MAC] = n
		}
		reply := &api.EnrolReply{State: n.state, Node: n.id, Name: fmt.Sprintf("node%d", n.id), HeadTime: time.Now().Add(h.skew)}
		if n.state == api.Approved {
			h.letIn(n, &req, csr, reply)
		} else if n.state != api.Pending {
			reply.Reason = "an operator said no"
		}
		changed := h.changed
		h.mu.Unlock()
		if reply.State != api.Pending {
			unixhttp.Reply(w, reply)
			return
		}
		select {
		case <-changed:
		case <-deadline:
			unixhttp.Reply(w, reply)
			return
		case <-r.Context().Done():
			return
		}
	}
}

// letIn fills an approval; h.mu is held.
func (h *testHead) letIn(n *testNode, req *api.EnrolRequest, csr *x509.CertificateRequest, reply *api.EnrolReply) {
	n.key = csr.PublicKey
	cert, err := h.ca.IssueNode(csr.PublicKey, n.id, net.ParseIP(req.Address), time.Now().Add(h.skew-h.issued))
	if err != nil {
		h.t.Error(err)
		return
	}
	n.serial = append(n.serial, identity.Serial(cert))
	peer := api.Peer{Node: n.id, Name: reply.Name, Address: req.Address, MAC: req.MAC}
	known := false
	for i, p := range h.view.Peers {
		if p.Node == n.id {
			known = true
			if p != peer {
				h.view.Peers[i] = peer
				known = false
			}
		}
	}
	if !known {
		peers := []api.Peer{peer}
		for _, p := range h.view.Peers {
			if p.Node != n.id {
				peers = append(peers, p)
			}
		}
		h.view.Peers = peers
		h.view.Generation++
		close(h.changed)
		h.changed = make(chan struct{})
	}
	view := h.view
	reply.Certificate, reply.CA, reply.Cluster = cert.Raw, h.ca.Cert.Raw, &view
}

// member wraps a handler that only approved nodes may call.
func (h *testHead) member(next func(http.ResponseWriter, *http.Request, *testNode)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if len(r.TLS.PeerCertificates) == 0 {
			unixhttp.Fail(w, fault.New(fault.Refused, "talk to the head", "", "no certificate", ""))
			return
		}
		id, err := identity.NodeOf(r.TLS.PeerCertificates[0])
		h.mu.Lock()
		var who *testNode
		for _, n := range h.nodes {
			if err == nil && n.id == id && n.state == api.Approved {
				who = n
			}
		}
		h.mu.Unlock()
		if who == nil {
			unixhttp.Fail(w, fault.New(fault.Refused, "talk to the head", "", "not a member", ""))
			return
		}
		next(w, r, who)
	}
}

func (h *testHead) renew(w http.ResponseWriter, r *http.Request, n *testNode) {
	var req api.RenewRequest
	if err := unixhttp.ReadJSON(w, r, &req); err != nil {
		unixhttp.Fail(w, err)
		return
	}
	csr, err := identity.ParseCSR(req.CSR)
	if err != nil {
		unixhttp.Fail(w, err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.renews++
	cert, err := h.ca.IssueNode(csr.PublicKey, n.id, nil, time.Now().Add(h.skew))
	if err != nil {
		unixhttp.Fail(w, err)
		return
	}
	n.serial = append(n.serial, identity.Serial(cert))
	unixhttp.Reply(w, api.RenewReply{Certificate: cert.Raw})
}

func (h *testHead) cluster(w http.ResponseWriter, r *http.Request, _ *testNode) {
	have, _ := strconv.ParseUint(r.URL.Query().Get("have"), 10, 64)
	ctx, cancel := context.WithTimeout(r.Context(), 20*time.Second)
	defer cancel()
	for {
		h.mu.Lock()
		v, changed := h.view, h.changed
		h.mu.Unlock()
		if v.Generation != have || ctx.Err() != nil {
			var b bytes.Buffer
			json.NewEncoder(&b).Encode(v)
			w.Write(b.Bytes())
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}
