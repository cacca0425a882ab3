package enrol

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strconv"
	"time"

	"mosimg/internal/api"
	"mosimg/pxe/registry"
)

// probeBudget is how long an old member may take to show that it is alive. A
// machine that boots waits for it, so it is short; on a LAN that drops a third
// of all packets a handshake takes under a second.
const probeBudget = 1500 * time.Millisecond

// Prober asks whether a member still runs with the key that it enrolled.
type Prober interface {
	// Alive connects to the agent at addr and reports whether it proved to
	// hold the private key of spki.
	Alive(ctx context.Context, addr string, spki []byte) bool
}

// AgentProber asks the agent API.
type AgentProber struct {
	// Port is api.AgentPort when zero.
	Port int
}

// Alive makes half a TLS handshake: the server proves its key before it asks
// for ours, which we have none of.
func (p AgentProber) Alive(ctx context.Context, addr string, spki []byte) bool {
	port := p.Port
	if port == 0 {
		port = api.AgentPort
	}
	proved := false
	d := tls.Dialer{Config: &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The key is what is asked for, not a name; the handshake proves it.
		InsecureSkipVerify: true,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			if len(raw) > 0 {
				if c, err := x509.ParseCertificate(raw[0]); err == nil && bytes.Equal(c.RawSubjectPublicKeyInfo, spki) {
					proved = true
					return nil
				}
			}
			return errors.New("another key")
		},
	}}
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(addr, strconv.Itoa(port)))
	if err != nil {
		return false
	}
	conn.Close()
	return proved
}

func (s *Service) probe(ctx context.Context, n *registry.Node) probe {
	if s.Prober == nil || n.Address == "" {
		return dead
	}
	ctx, cancel := context.WithTimeout(ctx, probeBudget)
	defer cancel()
	if s.Prober.Alive(ctx, n.Address, n.Key) {
		return alive
	}
	return dead
}
