package agent

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
)

// Files in the state folder. A restart of the agent finds its identity again
// and needs no new approval; a reboot of a diskless node does not.
const (
	keyFile    = "key.pem"
	memberFile = "member.json"
)

// credentials are what the head gave to this node. They are not changed: a
// renewal or a new view makes new ones.
type credentials struct {
	node    api.NodeID
	name    string
	cert    *x509.Certificate
	ca      *x509.Certificate
	view    api.ClusterView
	revoked map[string]bool
	place   place // for which they were given; the nonce is not kept
}

// saved is memberFile. It holds gossip keys: mode 0600.
type saved struct {
	Node    api.NodeID      `json:"node"`
	Name    string          `json:"name"`
	Cert    []byte          `json:"cert"`
	CA      []byte          `json:"ca"`
	View    api.ClusterView `json:"view"`
	Head    string          `json:"head"`
	MAC     string          `json:"mac"`
	Address string          `json:"address"`
}

func loadKey(dir string) (identity.Key, error) {
	path := filepath.Join(dir, keyFile)
	data, err := os.ReadFile(path)
	if err == nil {
		key, err := identity.ParseKey(data)
		if err != nil {
			return nil, fault.New(fault.Environment, "read key", path, err, "remove it to begin with a new one; the head will ask for approval")
		}
		return key, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Environment, "read key", path, err, "")
	}
	key, err := identity.NewKey()
	if err != nil {
		return nil, fault.New(fault.Internal, "make key", path, err, "")
	}
	if data, err = identity.MarshalKey(key); err != nil {
		return nil, fault.New(fault.Internal, "make key", path, err, "")
	}
	if err := atomicfile.Write(path, data, 0o600); err != nil {
		return nil, fault.New(fault.Environment, "write key", path, err, "")
	}
	return key, nil
}

// newCredentials checks what a head's approval brought: nothing of it is
// believed because it came from the right address.
func newCredentials(certDER, caDER []byte, p place, key identity.Key, node api.NodeID, name string, view api.ClusterView, now time.Time) (*credentials, error) {
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		return nil, fmt.Errorf("the CA's certificate: %w", err)
	}
	if got := identity.Pin(ca); got != p.ca {
		return nil, fmt.Errorf("%w: it sent %s, want %s", identity.ErrPin, got, p.ca)
	}
	cert, err := checkCert(certDER, ca, key, node, now)
	if err != nil {
		return nil, err
	}
	c := &credentials{node: node, name: name, cert: cert, ca: ca, place: p}
	c.place.nonce = ""
	return c.withView(view), nil
}

func checkCert(der []byte, ca *x509.Certificate, key identity.Key, node api.NodeID, now time.Time) (*x509.Certificate, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	if !identity.SameKey(cert.PublicKey, key.Public()) {
		return nil, errors.New("the certificate is for another key")
	}
	if n, err := identity.NodeOf(cert); err != nil || n != node {
		return nil, fmt.Errorf("the certificate is for node %d, the reply for node %d", n, node)
	}
	return cert, nil
}

// withView is c with another view of the cluster.
func (c credentials) withView(v api.ClusterView) *credentials {
	c.view = v
	c.revoked = make(map[string]bool, len(v.Revoked))
	for _, s := range v.Revoked {
		c.revoked[s] = true
	}
	for _, p := range v.Peers {
		if p.Node == c.node && p.Name != "" {
			c.name = p.Name // an operator may have renamed us
		}
	}
	return &c
}

// withCert is c with a renewed certificate.
func (c credentials) withCert(cert *x509.Certificate) *credentials {
	c.cert = cert
	return &c
}

// selfRevoked reports whether the head has declared our own certificate void.
func (c *credentials) selfRevoked() bool { return c.revoked[identity.Serial(c.cert)] }

func (c *credentials) tls(key identity.Key) *tls.Certificate {
	return identity.TLSCertificate(c.cert, c.ca, key)
}

// renewAt is when the certificate has lived for half of its time.
func (c *credentials) renewAt() time.Time {
	return c.cert.NotBefore.Add(c.cert.NotAfter.Sub(c.cert.NotBefore) / 2)
}

func (c *credentials) save(dir string) error {
	data, err := json.Marshal(saved{
		Node: c.node, Name: c.name, Cert: c.cert.Raw, CA: c.ca.Raw, View: c.view,
		Head: c.place.head, MAC: c.place.mac, Address: c.place.address,
	})
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, memberFile), data, 0o600)
}

// loadCredentials finds what an earlier run of the agent was given, if it is
// still good for this place: same cluster, card and address, not expired.
func loadCredentials(dir string, p place, key identity.Key, now time.Time) (*credentials, error) {
	data, err := os.ReadFile(filepath.Join(dir, memberFile))
	if err != nil {
		return nil, err
	}
	var s saved
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, err
	}
	if s.MAC != p.mac || s.Address != p.address {
		return nil, fmt.Errorf("they are for %s %s", s.MAC, s.Address)
	}
	return newCredentials(s.Cert, s.CA, p, key, s.Node, s.Name, s.View, now)
}

func dropCredentials(dir string) { os.Remove(filepath.Join(dir, memberFile)) }
