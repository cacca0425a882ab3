package registry

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"time"

	bolt "go.etcd.io/bbolt"

	"mosimg/internal/api"
)

// Tx is a transaction. A fault of the store sticks to it and ends the
// transaction, so its methods return values and no errors.
type Tx struct {
	tx  *bolt.Tx
	now time.Time
	err error
	// dirty: something was written; view: the cluster view changed; notify:
	// someone may wait for this.
	dirty, view, notify bool
}

// Now is the time of the transaction.
func (tx *Tx) Now() time.Time { return tx.now }

func (tx *Tx) put(bucket []byte, key string, v any) {
	if tx.err != nil {
		return
	}
	tx.dirty = true
	b, err := json.Marshal(v)
	if err == nil {
		err = tx.tx.Bucket(bucket).Put([]byte(key), b)
	}
	if err != nil {
		tx.err = fmt.Errorf("%s %s: %w", bucket, key, err)
	}
}

func (tx *Tx) delete(bucket []byte, key string) {
	if tx.err == nil {
		tx.dirty = true
		tx.err = tx.tx.Bucket(bucket).Delete([]byte(key))
	}
}

// get is the record at key, or nil.
func get[T any](tx *Tx, bucket []byte, key string) *T {
	b := tx.tx.Bucket(bucket).Get([]byte(key))
	if b == nil || tx.err != nil {
		return nil
	}
	return decode[T](tx, bucket, []byte(key), b)
}

func all[T any](tx *Tx, bucket []byte) []*T {
	var out []*T
	err := tx.tx.Bucket(bucket).ForEach(func(k, b []byte) error {
		if v := decode[T](tx, bucket, k, b); v != nil {
			out = append(out, v)
		}
		return tx.err
	})
	if tx.err == nil {
		tx.err = err
	}
	return out
}

func decode[T any](tx *Tx, bucket, key, b []byte) *T {
	v := new(T)
	if err := json.Unmarshal(b, v); err != nil {
		tx.err = fmt.Errorf("record %s %s: %w", bucket, key, err)
		return nil
	}
	return v
}

// finish completes an update: a changed view gets the next generation.
func (tx *Tx) finish() error {
	if tx.err == nil && tx.view {
		tx.putMeta(metaGeneration, strconv.FormatUint(tx.Generation()+1, 10))
	}
	return tx.err
}

// Node is the record of a MAC, or nil.
func (tx *Tx) Node(mac string) *Node { return get[Node](tx, bucketNodes, mac) }

// NodeByID is the record with a number, or nil.
func (tx *Tx) NodeByID(id api.NodeID) *Node {
	if mac := get[string](tx, bucketIDs, idKey(id)); mac != nil {
		if n := tx.Node(*mac); n != nil && n.Node == id {
			return n
		}
	}
	return nil
}

func idKey(id api.NodeID) string { return strconv.Itoa(int(id)) }

// Nodes are all records: by number, those without one last, by first sight.
func (tx *Tx) Nodes() []*Node {
	ns := all[Node](tx, bucketNodes)
	slices.SortStableFunc(ns, func(a, b *Node) int {
		switch {
		case (a.Node == 0) != (b.Node == 0):
			return int(b.Node) - int(a.Node)
		case a.Node != b.Node:
			return int(a.Node) - int(b.Node)
		}
		return a.FirstSeen.Compare(b.FirstSeen)
	})
	return ns
}

// PutNode stores a record.
func (tx *Tx) PutNode(n *Node) {
	old := tx.Node(n.MAC)
	if peerOf(old) != peerOf(n) {
		tx.view = true
	}
	tx.notify = true
	tx.put(bucketNodes, n.MAC, n)
	if n.Node != 0 {
		tx.put(bucketIDs, idKey(n.Node), n.MAC)
	}
}

// DeleteNode forgets a machine and its nonces.
func (tx *Tx) DeleteNode(mac string) {
	old := tx.Node(mac)
	if old == nil {
		return
	}
	if peerOf(old) != (api.Peer{}) {
		tx.view = true
	}
	tx.notify = true
	tx.delete(bucketNodes, mac)
	tx.delete(bucketIDs, idKey(old.Node))
	for _, n := range tx.Nonces() {
		if n.MAC == mac {
			tx.DeleteNonce(n.Value)
		}
	}
}

// peerOf is a record as members see it; the zero Peer when they do not.
func peerOf(n *Node) api.Peer {
	if n == nil || n.State != api.Approved || n.Address == "" {
		return api.Peer{}
	}
	return api.Peer{Node: n.Node, Name: n.Name, Address: n.Address, MAC: n.MAC, Drain: n.Drain}
}

// FreeID is the smallest number that no machine has and that no certificate
// of a removed machine still names.
func (tx *Tx) FreeID() api.NodeID {
	used := map[api.NodeID]bool{}
	for _, n := range tx.Nodes() {
		used[n.Node] = true
	}
	for _, r := range tx.Revoked() {
		used[r.Node] = true
	}
	id := api.NodeID(1)
	for used[id] {
		id++
	}
	return id
}

// Revoke makes all certificates of a node void.
func (tx *Tx) Revoke(n *Node) {
	for _, c := range n.Certs {
		if tx.now.Before(c.Expires) {
			tx.put(bucketRevoked, c.Serial, Revoked{Cert: c, Node: n.Node})
			tx.view, tx.notify = true, true
		}
	}
	n.Certs, n.Cert = nil, nil
}

// Revoked are the void certificates that have not expired.
func (tx *Tx) Revoked() []*Revoked {
	return slices.DeleteFunc(all[Revoked](tx, bucketRevoked), func(r *Revoked) bool {
		return !tx.now.Before(r.Expires)
	})
}

// IsRevoked tells whether the certificate with this serial is void.
func (tx *Tx) IsRevoked(serial string) bool {
	return get[Revoked](tx, bucketRevoked, serial) != nil
}

// Nonce is the nonce of that value, or nil.
func (tx *Tx) Nonce(value string) *Nonce { return get[Nonce](tx, bucketNonces, value) }

// Nonces are all nonces.
func (tx *Tx) Nonces() []*Nonce { return all[Nonce](tx, bucketNonces) }

// PutNonce stores a nonce.
func (tx *Tx) PutNonce(n *Nonce) { tx.put(bucketNonces, n.Value, n) }

// DeleteNonce forgets a nonce.
func (tx *Tx) DeleteNonce(value string) { tx.delete(bucketNonces, value) }

// Leases are all leases, expired ones too.
func (tx *Tx) Leases() []*Lease { return all[Lease](tx, bucketLeases) }

// Prune drops what time has made meaningless: void certificates that would
// have expired, and old nonces that no record is bound to.
func (tx *Tx) Prune() {
	for _, r := range all[Revoked](tx, bucketRevoked) {
		if !tx.now.Before(r.Expires) {
			tx.delete(bucketRevoked, r.Serial)
			tx.view, tx.notify = true, true
		}
	}
	bound := map[string]bool{}
	for _, n := range tx.Nodes() {
		bound[n.Nonce] = true
	}
	for _, n := range tx.Nonces() {
		if !n.Local && !bound[n.Value] && !tx.now.Before(n.Expires) {
			tx.DeleteNonce(n.Value)
		}
	}
}

// Rotation is the state of the gossip keys.
func (tx *Tx) Rotation() Rotation {
	var r Rotation
	tx.getMetaJSON(metaRotation, &r)
	return r
}

// Rotate begins a change of the gossip key, since a node that knows it is no
// longer trusted.
func (tx *Tx) Rotate() {
	r := tx.Rotation()
	switch r.Phase {
	case Steady:
		r = Rotation{Phase: Announced, Old: r.New, New: newGossipKey()}
	case Announced:
		// Nobody encrypts with New yet, so it can be replaced by one
		// that the node just revoked has not seen.
		r.New = newGossipKey()
	case Switched:
		r.Again = true
	}
	tx.putRotation(r)
}

// AdvanceRotation goes to the next phase, if there is one.
func (tx *Tx) AdvanceRotation() {
	r := tx.Rotation()
	switch r.Phase {
	case Steady:
		return
	case Announced:
		r.Phase = Switched
	case Switched:
		if r.Again {
			r = Rotation{Phase: Announced, Old: r.New, New: newGossipKey()}
		} else {
			r = Rotation{Phase: Steady, New: r.New}
		}
	}
	tx.putRotation(r)
}

func (tx *Tx) putRotation(r Rotation) {
	tx.view, tx.notify = true, true
	tx.putMetaJSON(metaRotation, r)
}

// newGossipKey makes an AES-256 key. crypto/rand does not fail on Linux.
func newGossipKey() []byte {
	k := make([]byte, 32)
	rand.Read(k)
	return k
}

// Adoption is the adoption window.
func (tx *Tx) Adoption() Adoption {
	var a Adoption
	tx.getMetaJSON(metaAdoption, &a)
	return a
}

// PutAdoption opens or closes the adoption window.
func (tx *Tx) PutAdoption(a Adoption) {
	tx.notify = true
	tx.putMetaJSON(metaAdoption, a)
}

// Generation is the number of the cluster view.
func (tx *Tx) Generation() uint64 {
	g, _ := strconv.ParseUint(tx.meta(metaGeneration), 10, 64)
	return g
}

// View is what members are told.
func (tx *Tx) View() *api.ClusterView {
	v := &api.ClusterView{
		Generation: tx.Generation(),
		Name:       tx.meta(metaCluster),
		GossipKeys: tx.Rotation().Keys(),
		Peers:      []api.Peer{},
	}
	for _, n := range tx.Nodes() {
		if p := peerOf(n); p != (api.Peer{}) {
			v.Peers = append(v.Peers, p)
		}
	}
	for _, r := range tx.Revoked() {
		v.Revoked = append(v.Revoked, r.Serial)
	}
	if tx.view {
		v.Generation++ // this transaction's own change
	}
	return v
}

// TouchNode stores a record in which only LastSeen changed: nobody waits for
// that.
func (tx *Tx) TouchNode(n *Node) { tx.put(bucketNodes, n.MAC, n) }
