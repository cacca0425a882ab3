package registry

import (
	"time"

	"mosimg/internal/api"
)

// Node is a machine's record: what the API shows and what only the head
// needs. The MAC is its key.
type Node struct {
	api.NodeRecord
	// Key is the public key (SPKI, DER) that enrolled last.
	Key []byte `json:"key,omitempty"`
	// Nonce is the boot nonce that Key is bound to. It stays good for that
	// key for as long as the record names it.
	Nonce string `json:"nonce,omitempty"`
	// Cert is the last certificate issued, DER.
	Cert []byte `json:"cert,omitempty"`
	// Certs are all that were issued and neither expired nor became void.
	Certs []Cert `json:"certs,omitempty"`
}

// Cert names an issued certificate.
type Cert struct {
	Serial  string    `json:"serial"`
	Expires time.Time `json:"expires"`
}

// Revoked is a void certificate; it is dropped when it would have expired.
type Revoked struct {
	Cert
	// Node was its owner. The number is given to no other machine while
	// the certificate could be mistaken for good.
	Node api.NodeID `json:"node"`
}

// Lease is a machine's address. It outlives its expiry: the machine gets the
// same address again while nobody else needs it.
type Lease struct {
	MAC     string    `json:"mac"`
	Address string    `json:"address"`
	Expires time.Time `json:"expires"`
}

// Nonce is a boot nonce. Its value came to one machine in its boot script (or
// to root of the head's machine in a local ticket).
type Nonce struct {
	Value string `json:"value"`
	MAC   string `json:"mac"`
	// Source is the address that fetched it; "" binds it to none.
	Source string `json:"source,omitempty"`
	// Local nonces come from a ticket: their bearer is role "head" and
	// approved. They do not expire.
	Local   bool      `json:"local,omitempty"`
	Expires time.Time `json:"expires"`
	// Key is the public key (SPKI, DER) that used it first, nil before.
	Key []byte `json:"key,omitempty"`
}

// Rotation is the state of the gossip keys. Phases are those of
// api.ClusterView.GossipKeys.
type Rotation struct {
	Phase int    `json:"phase"` // Steady, Announced, Switched
	Old   []byte `json:"old,omitempty"`
	New   []byte `json:"new"` // the only key in phase Steady
	// Again asks for one more rotation after this one: a node was revoked
	// that had heard of New.
	Again bool `json:"again,omitempty"`
}

// Phases of a rotation.
const (
	Steady    = iota // [new]
	Announced        // [old, new]
	Switched         // [new, old]
)

// Keys are the keys as members see them.
func (r Rotation) Keys() [][]byte {
	switch r.Phase {
	case Announced:
		return [][]byte{r.Old, r.New}
	case Switched:
		return [][]byte{r.New, r.Old}
	}
	return [][]byte{r.New}
}

// Adoption is the window in which unknown machines are approved.
type Adoption struct {
	From    time.Time `json:"from"`
	Until   time.Time `json:"until"`
	Limited bool      `json:"limited,omitempty"`
	Left    int       `json:"left,omitempty"` // when Limited
}

// Open reports whether the window lets one more machine in. A clock that was
// set back closes it: a window of an hour must not become one of years.
func (a Adoption) Open(now time.Time) bool {
	return !now.Before(a.From) && now.Before(a.Until) && (!a.Limited || a.Left > 0)
}
