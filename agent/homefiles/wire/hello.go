package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// MaxGreeting bounds the body of a greeting.
const MaxGreeting = 1024

// MaxCapsule is the longest name of a capsule in a HELLO, in bytes.
const MaxCapsule = 128

// SessionID names a session. The forwarder draws it at random once, so that
// the home can tell a resumed session from a new one.
type SessionID [16]byte

// Hello is how a forwarder opens each connection:
//
//	node -> home  Hello{version, session, epoch, capsule}  (header's ack: rx)
//	home -> node  Welcome                                  (header's ack: rx)
//	both          resend what the other has not received, then go on
//
// or Refused, after which the home closes. The body:
//
//	 0  4 bytes  "MHF" and Version
//	 4  u32      length of the capsule's name
//	 8  16 bytes session
//	24  u64      epoch
//	32  ...      capsule's name
type Hello struct {
	Capsule string
	Session SessionID
	Epoch   uint64
}

const helloSize = 32

// ErrVersion is a HELLO of another version of this protocol.
var ErrVersion = errors.New("home files protocol of another version")

// Append appends the body.
func (h Hello) Append(dst []byte) []byte {
	dst = append(dst, 'M', 'H', 'F', Version)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(h.Capsule)))
	dst = append(dst, h.Session[:]...)
	dst = binary.LittleEndian.AppendUint64(dst, h.Epoch)
	return append(dst, h.Capsule...)
}

// ParseHello reads a body.
func ParseHello(b []byte) (Hello, error) {
	if len(b) < helloSize || string(b[:3]) != "MHF" {
		return Hello{}, errors.New("not a home files greeting")
	}
	if b[3] != Version {
		return Hello{}, fmt.Errorf("%w: %d, want %d", ErrVersion, b[3], Version)
	}
	n := binary.LittleEndian.Uint32(b[4:])
	if n == 0 || n > MaxCapsule || int(n) != len(b)-helloSize {
		return Hello{}, fmt.Errorf("capsule name of %d bytes in a greeting of %d", n, len(b))
	}
	h := Hello{Epoch: binary.LittleEndian.Uint64(b[24:]), Capsule: string(b[helloSize:])}
	copy(h.Session[:], b[8:24])
	return h, nil
}

// Refusal says why a home turns a connection down.
type Refusal uint32

const (
	// RefuseVersion: another version of this protocol.
	RefuseVersion Refusal = 1
	// RefuseFenced: the epoch is over. Never try again.
	RefuseFenced Refusal = 2
	// RefuseUnknown: no such capsule here, or not for this node. Never again.
	RefuseUnknown Refusal = 3
	// RefuseLost: the home has lost the session that is to be resumed (its
	// handler was restarted). Never again: open files are gone.
	RefuseLost Refusal = 4
	// RefuseBusy: not now, try again (the handler is starting or ending).
	RefuseBusy Refusal = 5
)

// Final tells whether trying again is of no use.
func (r Refusal) Final() bool { return r != RefuseBusy }

func (r Refusal) String() string {
	switch r {
	case RefuseVersion:
		return "other protocol version"
	case RefuseFenced:
		return "fenced: the capsule has a newer epoch"
	case RefuseUnknown:
		return "no such capsule for this node"
	case RefuseLost:
		return "the home has lost the session"
	case RefuseBusy:
		return "not now"
	}
	return fmt.Sprintf("refusal %d", uint32(r))
}

// Refused is the body of KindRefused: u32 reason, then words for people.
type Refused struct {
	Reason Refusal
	Text   string
}

// Append appends the body; long texts are cut.
func (r Refused) Append(dst []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, uint32(r.Reason))
	return append(dst, r.Text[:min(len(r.Text), MaxGreeting-4)]...)
}

// ParseRefused reads a body.
func ParseRefused(b []byte) (Refused, error) {
	if len(b) < 4 {
		return Refused{}, errors.New("refusal without a reason")
	}
	return Refused{Reason: Refusal(binary.LittleEndian.Uint32(b)), Text: string(b[4:])}, nil
}
