package registry

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"

	"mosimg/internal/identity"

	bolt "go.etcd.io/bbolt"
)

// Keys of the meta bucket.
const (
	metaFormat     = "format"
	metaCluster    = "cluster"
	metaCAKey      = "ca-key"
	metaCACert     = "ca-cert"
	metaHeadKey    = "head-key"
	metaGeneration = "generation"
	metaRotation   = "gossip"
	metaAdoption   = "adoption"
)

const defaultCluster = "mosimg"

func (tx *Tx) meta(key string) string {
	return string(tx.tx.Bucket(bucketMeta).Get([]byte(key)))
}

func (tx *Tx) putMeta(key, value string) {
	if tx.err == nil {
		tx.dirty = true
		tx.err = tx.tx.Bucket(bucketMeta).Put([]byte(key), []byte(value))
	}
}

func (tx *Tx) getMetaJSON(key string, v any) {
	if s := tx.meta(key); s != "" && tx.err == nil {
		if err := json.Unmarshal([]byte(s), v); err != nil {
			tx.err = fmt.Errorf("record meta %s: %w", key, err)
		}
	}
}

func (tx *Tx) putMetaJSON(key string, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		tx.err = err
		return
	}
	tx.putMeta(key, string(b))
}

// load reads the authority, or makes it together with everything else that a
// new cluster has: one transaction, so there is no half-made cluster.
func (s *Store) load(opt Options) error {
	return s.db.Update(func(btx *bolt.Tx) error {
		tx := &Tx{tx: btx, now: s.now()}
		for _, b := range buckets {
			if _, err := btx.CreateBucketIfNotExists(b); err != nil {
				return err
			}
		}
		switch f := tx.meta(metaFormat); f {
		case "":
			if err := s.found(tx, opt); err != nil {
				return err
			}
		case Format:
		default:
			return fmt.Errorf("its format is %s, this mosimg reads %s", f, Format)
		}
		if opt.Cluster != "" && opt.Cluster != tx.meta(metaCluster) {
			tx.putMeta(metaCluster, opt.Cluster)
			tx.view = true
		}
		tx.Prune()
		if err := tx.finish(); err != nil {
			return err
		}
		return s.loadKeys(tx)
	})
}

// found makes a new cluster.
func (s *Store) found(tx *Tx, opt Options) error {
	name := opt.Cluster
	if name == "" {
		name = defaultCluster
	}
	ca, err := identity.NewCA(name)
	if err != nil {
		return err
	}
	headKey, err := identity.NewKey()
	if err != nil {
		return err
	}
	for key, k := range map[string]identity.Key{metaCAKey: ca.Key, metaHeadKey: headKey} {
		pem, err := identity.MarshalKey(k)
		if err != nil {
			return err
		}
		tx.putMeta(key, string(pem))
	}
	tx.putMeta(metaCACert, string(ca.Cert.Raw))
	tx.putMeta(metaCluster, name)
	tx.putMeta(metaFormat, Format)
	tx.putRotation(Rotation{Phase: Steady, New: newGossipKey()})
	opt.Log.Info("new cluster", slog.String("name", name), slog.String("ca", identity.Pin(ca.Cert)))
	return tx.err
}

func (s *Store) loadKeys(tx *Tx) error {
	caKey, err1 := identity.ParseKey([]byte(tx.meta(metaCAKey)))
	headKey, err2 := identity.ParseKey([]byte(tx.meta(metaHeadKey)))
	cert, err3 := x509.ParseCertificate([]byte(tx.meta(metaCACert)))
	if err := errors.Join(err1, err2, err3); err != nil {
		return fmt.Errorf("authority: %w", err)
	}
	if !identity.SameKey(cert.PublicKey, caKey.Public()) {
		return errors.New("authority: certificate and key do not belong together")
	}
	s.ca, s.headKey = &identity.CA{Cert: cert, Key: caKey}, headKey
	return nil
}

// ClusterName is the cluster's name.
func (tx *Tx) ClusterName() string { return tx.meta(metaCluster) }
