// Package leak searches an image set for anything that only the head may
// know. An image is the same for everyone who builds it and is handed out to
// whoever asks: one key, nonce or hash of a cluster in it would be everyone's.
package leak

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Secret is something to look for, in one of its spellings.
type Secret struct {
	Name  string // where in the store it is, and how it is spelled
	Bytes []byte
}

// minSecret is how long something must be to be a secret rather than a word:
// 64 bits.
const minSecret = 8

// public are fields of stored records that describe the image or the machine,
// or are words and addresses that any program may hold. All other fields are
// searched for, new ones too.
var public = []string{"image", "offered", "inventory", "name", "address", "source", "state", "role", "liveness",
	"first_seen", "last_seen", "since", "expires", "until", "alert"}

// publicMeta are values of the store that are no secrets by themselves.
var publicMeta = []string{"format", "cluster", "generation"}

// Secrets reads everything from a head's database that must not be in an
// image. It knows the database's form, not its meaning: every value counts,
// unless it is on a short list of exceptions.
func Secrets(database string) ([]Secret, error) {
	db, err := bolt.Open(database, 0o600, &bolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", database, err)
	}
	defer db.Close()
	var c collector
	err = db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				c.entry(string(name), k, v)
				return nil
			})
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", database, err)
	}
	if len(c.secrets) == 0 {
		return nil, fmt.Errorf("%s holds no secrets: is it a head's database?", database)
	}
	return c.secrets, nil
}

type collector struct{ secrets []Secret }

func (c *collector) add(name string, b []byte) {
	if len(b) < minSecret || slices.ContainsFunc(c.secrets, func(s Secret) bool { return string(s.Bytes) == string(b) }) {
		return
	}
	c.secrets = append(c.secrets, Secret{name, slices.Clone(b)})
}

// entry takes one key and value of a bucket.
func (c *collector) entry(bucket string, key, value []byte) {
	where := bucket + "/" + string(key)
	if bucket == "meta" {
		if slices.Contains(publicMeta, string(key)) {
			return
		}
	} else {
		c.text(bucket+" key", string(key))
	}
	var v any
	switch block, _ := pem.Decode(value); {
	case block != nil:
		c.text(where, strings.TrimSpace(string(value)))
		c.der(where, block.Bytes)
	case json.Unmarshal(value, &v) == nil:
		c.json(where, v)
	default:
		c.der(where, value)
	}
}

// json takes every string in a record that is not public.
func (c *collector) json(where string, v any) {
	switch v := v.(type) {
	case string:
		c.text(where, v)
	case []any:
		for _, x := range v {
			c.json(where, x)
		}
	case map[string]any:
		for k, x := range v {
			if !slices.Contains(public, k) {
				c.json(where+"."+k, x)
			}
		}
	}
}

// text takes a string as it is, and what it means as base64 or hex.
func (c *collector) text(where, s string) {
	c.add(where, []byte(s))
	if b, err := base64.StdEncoding.DecodeString(s); err == nil {
		c.der(where+" (decoded base64)", b)
	}
	if b, err := hex.DecodeString(s); err == nil {
		c.add(where+" (decoded hex)", b)
	}
}

// der takes bytes, and if they are a key or certificate the parts of it that
// identify it in any other encoding.
func (c *collector) der(where string, b []byte) {
	c.add(where, b)
	c.add(where+" (hex)", []byte(hex.EncodeToString(b)))
	c.add(where+" (base64)", []byte(base64.StdEncoding.EncodeToString(b)))
	if k, err := x509.ParsePKCS8PrivateKey(b); err == nil {
		if ec, ok := k.(*ecdsa.PrivateKey); ok {
			if scalar, err := ec.Bytes(); err == nil {
				c.add(where+" (private scalar)", scalar)
				c.add(where+" (private scalar, hex)", []byte(hex.EncodeToString(scalar)))
			}
			c.public(where, &ec.PublicKey)
		}
	}
	if k, err := x509.ParsePKIXPublicKey(b); err == nil {
		if ec, ok := k.(*ecdsa.PublicKey); ok {
			c.public(where, ec)
		}
	}
	if cert, err := x509.ParseCertificate(b); err == nil {
		sum := sha256.Sum256(cert.Raw)
		c.add(where+" (SHA-256)", sum[:])
		c.add(where+" (SHA-256, hex)", []byte(hex.EncodeToString(sum[:])))
		if ec, ok := cert.PublicKey.(*ecdsa.PublicKey); ok {
			c.public(where, ec)
		}
	}
}

func (c *collector) public(where string, k *ecdsa.PublicKey) {
	if point, err := k.Bytes(); err == nil {
		c.add(where+" (public point)", point)
	}
}
