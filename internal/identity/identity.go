// Package identity is the cluster's public-key layer: one certificate
// authority held by the head, a key that each machine makes for itself, and
// TLS 1.3 configurations that trust that authority and nothing else.
//
// A machine knows the authority only by its Pin, which came with the netboot;
// the head sends the whole certificate in its TLS chain and the machine
// compares. The trust is that of the netboot, see docs/threat-model.md.
package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"mosimg/internal/api"
)

// The authority is valid for this whole century, whatever the head's clock
// says on its first day: a head without a battery may begin in 1970, and once
// its clock is right that must not void every certificate.
var (
	caNotBefore = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	caNotAfter  = time.Date(2099, 12, 31, 0, 0, 0, 0, time.UTC)
)

const (
	// CertLifetime is how long a node's certificate is valid; agents renew
	// at half of it.
	CertLifetime = 24 * time.Hour
	// Backdate is subtracted from NotBefore, so that a clock that is a
	// little slow does not refuse a fresh certificate.
	Backdate = 5 * time.Minute
)

// HeadName is the DNS name in the head's server certificate. Clients check
// this name and not the address, so that the head may change its address.
const HeadName = "head.mosimg"

// Key is a private key of ours: ECDSA P-256.
type Key = *ecdsa.PrivateKey

// NewKey makes a key.
func NewKey() (Key, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// MarshalKey is the key as PEM (PKCS #8).
func MarshalKey(k Key) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// ParseKey reads what MarshalKey wrote.
func ParseKey(data []byte) (Key, error) {
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, errors.New("no PEM block in key")
	}
	k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	ec, ok := k.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("key is a %T, want ECDSA", k)
	}
	return ec, nil
}

// NewCSR is a certificate request for k, DER. Names and addresses in it are
// hints: the head decides what the certificate says.
func NewCSR(k Key) ([]byte, error) {
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "mosimg node"},
	}, k)
}

// ParseCSR reads a request and checks its signature, so the sender holds the
// private key. The size of der should be bounded by the caller.
func ParseCSR(der []byte) (*x509.CertificateRequest, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	if _, ok := csr.PublicKey.(*ecdsa.PublicKey); !ok {
		return nil, fmt.Errorf("certificate request has a %T, want ECDSA", csr.PublicKey)
	}
	return csr, nil
}

// Fingerprint is a short name for a public key that a person can compare on
// two screens: 4 groups of 4 hex digits (64 bits of SHA-256 of the SPKI).
func Fingerprint(pub crypto.PublicKey) string {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(der)
	h := hex.EncodeToString(sum[:8])
	return h[0:4] + "-" + h[4:8] + "-" + h[8:12] + "-" + h[12:16]
}

// CA is the cluster's certificate authority with its private key.
type CA struct {
	Cert *x509.Certificate
	Key  Key
}

// NewCA makes an authority for the cluster named.
func NewCA(cluster string) (*CA, error) {
	k, err := NewKey()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "mosimg cluster " + cluster},
		NotBefore:             caNotBefore,
		NotAfter:              caNotAfter,
		IsCA:                  true,
		BasicConstraintsValid: true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &CA{Cert: cert, Key: k}, nil
}

// Pin names a CA certificate: "sha256:" and the hex SHA-256 of its DER.
func Pin(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// IssueNode signs a certificate for a node's key, valid for CertLifetime. It
// may be used as client and server; addr is the node's address (may be nil).
func (ca *CA) IssueNode(pub crypto.PublicKey, node api.NodeID, addr net.IP, now time.Time) (*x509.Certificate, error) {
	return ca.issue(pub, &url.URL{Scheme: "mosimg", Host: "node", Path: "/" + strconv.Itoa(int(node))}, nodeName(node), addr, now)
}

// IssueHead signs the head API's server certificate.
func (ca *CA) IssueHead(pub crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	return ca.issue(pub, &url.URL{Scheme: "mosimg", Host: "head"}, HeadName, nil, now)
}

func (ca *CA) issue(pub crypto.PublicKey, id *url.URL, dns string, addr net.IP, now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: dns},
		NotBefore:    now.Add(-Backdate),
		NotAfter:     now.Add(CertLifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		DNSNames:     []string{dns},
		URIs:         []*url.URL{id},
	}
	if addr != nil {
		tmpl.IPAddresses = []net.IP{addr}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Cert, pub, ca.Key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// Serial is a certificate's serial number as revocation lists spell it.
func Serial(cert *x509.Certificate) string { return cert.SerialNumber.Text(16) }

func nodeName(n api.NodeID) string { return fmt.Sprintf("node%d.mosimg", n) }

// NodeOf is the node number in a certificate, or an error when it is not a
// node's.
func NodeOf(cert *x509.Certificate) (api.NodeID, error) {
	for _, u := range cert.URIs {
		if u.Scheme == "mosimg" && u.Host == "node" {
			n, err := strconv.Atoi(strings.TrimPrefix(u.Path, "/"))
			if err == nil && n > 0 {
				return api.NodeID(n), nil
			}
		}
	}
	return 0, errors.New("certificate does not name a node")
}

// Revocation tells whether the certificate with this serial is void. It is
// called for each handshake and must be quick and safe for concurrent use.
// nil means nothing is revoked.
type Revocation func(serial string) bool

// Source returns the certificate to present now: agents renew theirs while
// connections are served.
type Source func() (*tls.Certificate, error)

// ErrRevoked is why a handshake with a void certificate fails.
var ErrRevoked = errors.New("certificate is revoked")

// ServerConfig is for a server that only members of the cluster may talk to.
// With optionalClient a peer without a certificate gets through the handshake
// (enrolment); one with a bad certificate never does.
func ServerConfig(own Source, ca *x509.Certificate, revoked Revocation, optionalClient bool) *tls.Config {
	auth := tls.RequireAndVerifyClientCert
	if optionalClient {
		auth = tls.VerifyClientCertIfGiven
	}
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return own() },
		ClientAuth:     auth,
		ClientCAs:      poolOf(ca),
		// Session tickets would let a revoked peer resume without a check.
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return checkRevoked(cs, revoked)
		},
	}
}

// ClientToNode is for a member that calls another node's agent API. The
// server must prove to be that node.
func ClientToNode(own Source, ca *x509.Certificate, node api.NodeID, revoked Revocation) *tls.Config {
	return clientConfig(own, ca, nodeName(node), revoked)
}

// ClientToHead is for a member that calls the head API.
func ClientToHead(own Source, ca *x509.Certificate) *tls.Config {
	return clientConfig(own, ca, HeadName, nil)
}

func clientConfig(own Source, ca *x509.Certificate, name string, revoked Revocation) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		RootCAs:    poolOf(ca),
		ServerName: name,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return own()
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			return checkRevoked(cs, revoked)
		},
	}
}

func checkRevoked(cs tls.ConnectionState, revoked Revocation) error {
	if revoked == nil || len(cs.PeerCertificates) == 0 {
		return nil
	}
	if s := Serial(cs.PeerCertificates[0]); revoked(s) {
		return fmt.Errorf("%w: serial %s", ErrRevoked, s)
	}
	return nil
}

func poolOf(ca *x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(ca)
	return p
}

// ErrPin is why a head that presents another cluster's authority is refused.
var ErrPin = errors.New("the head's certificate authority is not the one this machine was booted with")

// PinnedClient is for a machine that knows the authority only by its pin and
// has no certificate yet. Validity dates are not checked: a diskless machine
// may have a wrong clock, learns the time from this very connection
// (EnrolReply.HeadTime) and must be able to. A past head certificate is thus
// accepted here and only here; its key still has to sign the handshake.
func PinnedClient(pin string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// Verification is done below, against the pin.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return verifyPinned(cs.PeerCertificates, pin)
		},
	}
}

func verifyPinned(chain []*x509.Certificate, pin string) error {
	if len(chain) < 2 {
		return fmt.Errorf("%w: it sent no authority", ErrPin)
	}
	leaf, ca := chain[0], chain[len(chain)-1]
	if Pin(ca) != pin {
		return fmt.Errorf("%w: it presents %s, want %s", ErrPin, Pin(ca), pin)
	}
	if leaf.VerifyHostname(HeadName) != nil {
		return fmt.Errorf("the server is %q, not a head", leaf.Subject.CommonName)
	}
	_, err := leaf.Verify(x509.VerifyOptions{
		Roots:       poolOf(ca),
		DNSName:     HeadName,
		CurrentTime: leaf.NotBefore.Add(Backdate),
		KeyUsages:   []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	return err
}

// TLSCertificate bundles a leaf, its authority and the key for a handshake.
func TLSCertificate(leaf, ca *x509.Certificate, k Key) *tls.Certificate {
	return &tls.Certificate{
		Certificate: [][]byte{leaf.Raw, ca.Raw},
		PrivateKey:  k,
		Leaf:        leaf,
	}
}

// SameKey reports whether two public keys are the same.
func SameKey(a, b crypto.PublicKey) bool {
	x, err1 := x509.MarshalPKIXPublicKey(a)
	y, err2 := x509.MarshalPKIXPublicKey(b)
	return err1 == nil && err2 == nil && bytes.Equal(x, y)
}
