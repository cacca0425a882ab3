package enrol

import (
	"bytes"
	"fmt"
	"time"

	"mosimg/internal/api"
	"mosimg/pxe/registry"
)

// facts are all that the decision on one enrolment depends on.
type facts struct {
	now    time.Time
	mac    string
	key    []byte // public key that signed the request, SPKI
	source string // address it came from

	nonce *registry.Nonce // by the value in the request; nil if unknown
	rec   *registry.Node  // by MAC; nil if the machine is new
	// checkSource is off when another server leases the addresses.
	checkSource bool

	// listed: the operator wrote this MAC into cluster.yaml.
	listed bool
	// window: an adoption window is open and has room.
	window bool
	// full: no more pending machines are kept.
	full bool
	// rival: the record's key was here a moment ago, but is not a member
	// that could be probed yet.
	rival bool
	// contested: this is the record's key, and another one asked meanwhile.
	contested bool
	// probed is what is known of the member that the record describes.
	probed probe
}

// probe tells whether a member still answers with its key.
type probe int

const (
	notProbed probe = iota
	dead
	alive
)

type action int

const (
	refuse   action = iota // a fault of the request: no reply but the reason
	turnAway               // the operator said no
	wait                   // pending
	admit                  // approved
	ask                    // probe the old member first, then decide again
)

// verdict is the decision on one enrolment.
type verdict struct {
	act    action
	reason string
	// alert is for the operator, written on the record.
	alert string
	// take makes the request's key and nonce the record's.
	take bool
	// reboot makes the certificates of the record's old key void.
	reboot bool
	// adopt counts the machine against the adoption window.
	adopt bool
	// busy marks a refusal that passes by itself.
	busy bool
}

// judge is the rule book of enrolment. It only looks at facts.
func judge(f facts) verdict {
	// 1. The nonce shows that this machine booted from us.
	if v, ok := judgeNonce(f); !ok {
		return v
	}
	rec := f.rec
	same := rec != nil && bytes.Equal(rec.Key, f.key)
	switch {
	// 2. What the operator said stands, whatever the key.
	case rec != nil && rec.State == api.Denied && !f.nonce.Local:
		return verdict{act: turnAway, reason: "an operator denied this machine; mosimg node approve lets it in"}
	case rec != nil && rec.State == api.Revoked && !f.nonce.Local:
		return verdict{act: turnAway, reason: "this machine was a member and was revoked; mosimg node approve lets it in again"}

	// 3. The head's own machine: root there owns the cluster anyway.
	case f.nonce.Local:
		return verdict{act: admit, take: true, reboot: rec != nil && !same}

	// 4. A machine that nobody decided on.
	case rec == nil && f.listed:
		return verdict{act: admit, take: true}
	case rec == nil && f.window:
		return verdict{act: admit, take: true, adopt: true}
	case rec == nil && f.full:
		return verdict{act: refuse, busy: true, reason: "too many machines wait for approval; approve or remove some with mosimg node"}
	case rec == nil:
		return verdict{act: wait, take: true}

	// 5. The key that came first keeps its place for as long as it asks. If
	// it was switched off and on, that is half a minute; if two machines
	// have this MAC, both ask on, and the operator must know.
	case !same && f.rival:
		return verdict{act: wait, reason: "another machine with this MAC was here a moment ago; waiting for it to go"}
	case rec.State == api.Pending && f.contested:
		return verdict{act: wait, take: true, alert: "two machines with this MAC ask to be let in: compare the fingerprints on their consoles"}
	case rec.State == api.Pending && f.listed:
		return verdict{act: admit, take: true}
	case rec.State == api.Pending && f.window && rec.Alert == "":
		return verdict{act: admit, take: true, adopt: true}
	case rec.State == api.Pending:
		return verdict{act: wait, take: true}

	// 6. A member asks again, with its key or, after a reboot, a new one.
	case same, len(rec.Key) == 0:
		return verdict{act: admit, take: true}
	case f.probed == notProbed:
		return verdict{act: ask}
	case f.probed == alive:
		return verdict{act: refuse,
			reason: fmt.Sprintf("node %d with this MAC is alive and has another key", rec.Node),
			alert:  "another machine with this MAC tried to enrol while this one was alive"}
	}
	return verdict{act: admit, take: true, reboot: true}
}

// judgeNonce checks the boot nonce; ok means that it is good for this key.
func judgeNonce(f facts) (verdict, bool) {
	no := func(reason, alert string) (verdict, bool) {
		return verdict{act: refuse, reason: reason, alert: alert}, false
	}
	n := f.nonce
	switch {
	case n == nil:
		return no("unknown boot nonce; boot this machine again from this head", "")
	case n.MAC != f.mac:
		return no("this boot nonce was given to another machine", "a boot nonce given to this machine was used for MAC "+f.mac)
	case n.Key != nil && !bytes.Equal(n.Key, f.key):
		return no("this boot nonce was used before, with another key", "a boot nonce of this machine was used again with another key")
	case f.checkSource && n.Source != "" && n.Source != f.source:
		return no("this boot nonce was given to another address", "a boot nonce of this machine came from "+f.source)
	case n.Key != nil && f.rec != nil && f.rec.Nonce == n.Value:
		return verdict{}, true // its record keeps it good
	case !n.Local && !f.now.Before(n.Expires):
		return no("this boot nonce has expired; boot this machine again", "")
	}
	return verdict{}, true
}
