package lab

import (
	"encoding/binary"
	"fmt"

	"mosimg/internal/api"
)

// Stage is how far a machine came on its way from the power button into the
// cluster, as its frames on the wire show it.
type Stage int32

// Stages, in order.
const (
	Off Stage = iota
	Silent
	Talking
	AskedDHCP
	AskedTFTP
	AskedHTTP
	Enrolling
	Gossiping
)

var stageNames = [...]string{
	Off:       "off",
	Silent:    "on, but never sent a packet",
	Talking:   "sends packets, but never asked for an address",
	AskedDHCP: "asked for an address by DHCP",
	AskedTFTP: "asked for its boot loader by TFTP",
	AskedHTTP: "asked for its image by HTTP",
	Enrolling: "talks to the head's API",
	Gossiping: "gossips",
}

func (s Stage) String() string {
	if s < 0 || int(s) >= len(stageNames) {
		return fmt.Sprintf("Stage(%d)", int32(s))
	}
	return stageNames[s]
}

const (
	etherTypeIPv4 = 0x0800
	protoTCP      = 6
	protoUDP      = 17
)

// stageOf is the stage that one frame from a machine shows.
func stageOf(frame []byte) Stage {
	if len(frame) < 14+20 || binary.BigEndian.Uint16(frame[12:]) != etherTypeIPv4 {
		return Talking
	}
	ip := frame[14:]
	headerLen := int(ip[0]&0xf) * 4
	fragmentOffset := binary.BigEndian.Uint16(ip[6:]) & 0x1fff
	if ip[0]>>4 != 4 || headerLen < 20 || len(ip) < headerLen+4 || fragmentOffset != 0 {
		return Talking
	}
	port := binary.BigEndian.Uint16(ip[headerLen+2:])
	switch ip[9] {
	case protoUDP:
		switch port {
		case 67:
			return AskedDHCP
		case 69:
			return AskedTFTP
		case api.GossipPort:
			return Gossiping
		}
	case protoTCP:
		switch port {
		case 80:
			return AskedHTTP
		case api.HeadPort:
			return Enrolling
		case api.GossipPort:
			return Gossiping
		}
	}
	return Talking
}
