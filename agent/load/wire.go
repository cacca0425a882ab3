package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"mosimg/internal/api"
)

// A load message is one encrypted UDP packet of the membership layer, sent by
// each node once a second. Integers are big endian.
//
//	0  1  kind: 'L'
//	1  1  version: 2; a receiver drops any other
//	2  -  entries of 55 bytes, the sender's own first:
//	      0  4  node number, from 1
//	      4  8  sequence number
//	     12  4  age in milliseconds when the message was sent
//	     16  4  load, IEEE 754 single
//	     20  2  utilisation, 0..65535 for 0..1
//	     22  4  CPUs
//	     26  8  memory in bytes
//	     34  8  free memory in bytes
//	     42  4  guests
//	     46  4  uptime in seconds
//	     50  4  speed of one CPU
//	     54  1  flags: 1 takes no guests, 2 sends its jobs away
const (
	Kind      = 'L'
	version   = 2
	headerLen = 2
	entryLen  = 55

	flagBlocked = 1
	flagLeaving = 2
)

// MaxMessage bounds a message, so that with the encryption's 29 bytes and
// IP's and UDP's headers it fits one Ethernet frame with room for a tunnel.
const MaxMessage = 1300

const maxEntries = (MaxMessage - headerLen) / entryLen

// Aged is a vector and the time since it was measured.
type Aged struct {
	api.LoadVector
	Age time.Duration
}

// ErrVersion is why a message of another version is dropped.
var ErrVersion = errors.New("load message of another version")

// encode makes a message of as many of the vectors as fit.
func encode(list []Aged) []byte {
	list = list[:min(len(list), maxEntries)]
	b := make([]byte, 0, headerLen+len(list)*entryLen)
	b = append(b, Kind, version)
	be := binary.BigEndian
	for _, v := range list {
		b = be.AppendUint32(b, uint32(v.Node))
		b = be.AppendUint64(b, v.Seq)
		b = be.AppendUint32(b, uint32(min(max(v.Age.Milliseconds(), 0), math.MaxUint32)))
		b = be.AppendUint32(b, math.Float32bits(float32(v.Load)))
		b = be.AppendUint16(b, uint16(math.Round(min(max(v.Utilisation, 0), 1)*math.MaxUint16)))
		b = be.AppendUint32(b, uint32(v.CPUs))
		b = be.AppendUint64(b, uint64(v.MemTotal))
		b = be.AppendUint64(b, uint64(v.MemFree))
		b = be.AppendUint32(b, uint32(v.Guests))
		b = be.AppendUint32(b, uint32(v.UptimeSec))
		b = be.AppendUint32(b, uint32(v.Speed))
		var flags byte
		if v.Blocked {
			flags |= flagBlocked
		}
		if v.Leaving {
			flags |= flagLeaving
		}
		b = append(b, flags)
	}
	return b
}

// decode reads a message. Members are authenticated, but one with a bad
// memory must not poison the others' decisions: what cannot be is refused.
func decode(b []byte) ([]Aged, error) {
	if len(b) < headerLen || b[0] != Kind {
		return nil, errors.New("not a load message")
	}
	if b[1] != version {
		return nil, fmt.Errorf("%w: %d, want %d", ErrVersion, b[1], version)
	}
	b = b[headerLen:]
	if len(b)%entryLen != 0 || len(b) > MaxMessage {
		return nil, fmt.Errorf("load message with %d bytes of entries", len(b))
	}
	be := binary.BigEndian
	var list []Aged
	for ; len(b) > 0; b = b[entryLen:] {
		v := Aged{
			LoadVector: api.LoadVector{
				Node:        api.NodeID(int32(be.Uint32(b))),
				Seq:         be.Uint64(b[4:]),
				Load:        float64(math.Float32frombits(be.Uint32(b[16:]))),
				Utilisation: float64(be.Uint16(b[20:])) / math.MaxUint16,
				CPUs:        int(int32(be.Uint32(b[22:]))),
				MemTotal:    int64(be.Uint64(b[26:])),
				MemFree:     int64(be.Uint64(b[34:])),
				Guests:      int(int32(be.Uint32(b[42:]))),
				UptimeSec:   int64(be.Uint32(b[46:])),
				Speed:       int(int32(be.Uint32(b[50:]))),
				Blocked:     b[54]&flagBlocked != 0,
				Leaving:     b[54]&flagLeaving != 0,
			},
			Age: time.Duration(be.Uint32(b[12:])) * time.Millisecond,
		}
		// !(>= 0) is true for NaN too.
		if v.Node < 1 || !(v.Load >= 0) || math.IsInf(v.Load, 0) || v.CPUs < 0 || v.MemTotal < 0 || v.MemFree < 0 || v.MemFree > v.MemTotal || v.Guests < 0 || v.Speed < 0 {
			return nil, fmt.Errorf("load message with an impossible entry for node %d", v.Node)
		}
		list = append(list, v)
	}
	return list, nil
}
