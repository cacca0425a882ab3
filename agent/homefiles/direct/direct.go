// Package direct joins the mount of a guest with the keeper at its home without
// an agent between them: two processes pass each of a job's requests on instead
// of four.
//
// The agents have the certificates of the cluster, so they make the connection:
// the node's agent opens a stream to the home's, over TLS on both sides'
// certificates, and asks there for the keeper's key (Ask, Answer). Then both take
// the TLS off and hand the bare connection to their process, which shakes hands
// on it again (Client, Server): TLS 1.3 as well, with certificates that the two
// processes have made for nothing else and whose hashes the agents exchanged.
// Who has the key is therefore who the agents have spoken for.
package direct

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"math/big"
	"net"
	"time"

	"mosimg/agent/homefiles/rootsock"
	"mosimg/internal/identity"
	"mosimg/internal/upgrade"
)

// Key names a process: the SHA-256 of its certificate, in hex.
type Key string

// Identity is what a process proves itself with. It is made once in each process
// and never leaves it.
type Identity struct {
	Key  Key
	cert tls.Certificate
}

// New makes an identity.
func New() (*Identity, error) {
	key, err := identity.NewKey()
	if err != nil {
		return nil, err
	}
	// Nobody reads more of it than its hash.
	template := x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &Identity{Key: keyOf(der), cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}}, nil
}

func keyOf(der []byte) Key {
	sum := sha256.Sum256(der)
	return Key(hex.EncodeToString(sum[:]))
}

// Client shakes hands as the mount with who has the peer's key, and owns raw.
func (i *Identity) Client(ctx context.Context, raw net.Conn, peer Key) (net.Conn, error) {
	return i.shake(ctx, newGather(raw, false), peer, tls.Client)
}

// Server shakes hands as the keeper with who has the peer's key, and owns raw.
func (i *Identity) Server(ctx context.Context, raw net.Conn, peer Key) (net.Conn, error) {
	return i.shake(ctx, newGather(raw, true), peer, tls.Server)
}

// shakeTime bounds a handshake, and what the agents say before.
const shakeTime = 10 * time.Second

func (i *Identity) shake(ctx context.Context, below *gather, peer Key, side func(net.Conn, *tls.Config) *tls.Conn) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, shakeTime)
	defer cancel()
	c := side(below, &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{i.cert},
		ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true,
		// The key is all that is known of the other side, and all that is needed.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 || keyOf(s.PeerCertificates[0].Raw) != peer {
				return errors.New("the other side of a home files connection has another key than its agent told")
			}
			return nil
		},
		// Small records first would be for those who wait to see a page.
		DynamicRecordSizingDisabled: true,
	})
	if err := c.HandshakeContext(ctx); err != nil {
		upgrade.HangUp(below.Conn) //nolint:errcheck // the handshake's error is the cause
		return nil, err
	}
	return &conn{Conn: c, below: below}, nil
}

// conn is TLS on a connection of which an agent may have a descriptor, too.
type conn struct {
	*tls.Conn
	below *gather
}

// Write writes p with few system calls, where TLS makes one for each 16 KiB.
func (c *conn) Write(p []byte) (int, error) {
	if len(p) <= maxRecord {
		return c.Conn.Write(p)
	}
	c.below.hold()
	n, err := c.Conn.Write(p)
	return n, errors.Join(err, c.below.release())
}

// Close ends the connection at once: frames have numbers, so nobody needs the
// word of farewell that TLS would wait to get rid of.
func (c *conn) Close() error { return upgrade.HangUp(c.below.Conn) }

// word is what the agents say to each other, a line each.
type word struct{ Key Key }

// Ask is the part of the node's agent on a stream to the home's agent: it tells
// the mount's key, and returns the keeper's and the connection on which the two
// can now shake hands. The stream is of no more use.
func Ask(stream net.Conn, mount Key) (keeper Key, bare upgrade.Bare, err error) {
	if err := stream.SetDeadline(time.Now().Add(shakeTime)); err != nil {
		return "", nil, err
	}
	if err := json.NewEncoder(stream).Encode(word{mount}); err != nil {
		return "", nil, err
	}
	var w word
	if err := rootsock.ReadLine(stream, &w); err != nil {
		return "", nil, err
	}
	bare, err = upgrade.BareOf(stream)
	return w.Key, bare, err
}

// Answer is the part of the home's agent: keeper is told the mount's key and
// returns its own.
func Answer(stream net.Conn, keeper func(mount Key) (Key, error)) (upgrade.Bare, error) {
	if err := stream.SetDeadline(time.Now().Add(shakeTime)); err != nil {
		return nil, err
	}
	var w word
	if err := rootsock.ReadLine(stream, &w); err != nil {
		return nil, err
	}
	bare, err := upgrade.BareOf(stream)
	if err != nil {
		return nil, err
	}
	key, err := keeper(w.Key)
	if err != nil {
		return nil, err
	}
	return bare, json.NewEncoder(stream).Encode(word{key})
}
