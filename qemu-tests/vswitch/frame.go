package vswitch

import (
	"encoding/binary"
	"fmt"
	"io"
)

// QEMU's stream netdev: each frame is preceded by its length, 4 bytes, big
// endian (net/stream.c, NET_BUFSIZE bounds it). Frames carry no checksum.
const (
	headerLen = 4
	// minFrame is an Ethernet header. Shorter frames have no addresses;
	// frames below Ethernet's 60 bytes are common between virtual machines.
	minFrame = 14
	maxFrame = 4096 + 65536
)

// frame is one frame with its length header, as it goes over a stream. It is
// never changed once made, so all ports share one copy.
type frame []byte

func newFrame(data []byte) frame {
	f := make(frame, headerLen+len(data))
	binary.BigEndian.PutUint32(f, uint32(len(data)))
	copy(f[headerLen:], data)
	return f
}

// data is the Ethernet frame itself.
func (f frame) data() []byte { return f[headerLen:] }

// readFrame reads the next frame from a stream. A length that no frame has
// means that the two ends no longer agree on where frames begin: that is an
// error for good. A runt is returned as it is; the caller counts and drops it.
func readFrame(r io.Reader) (frame, error) {
	var head [headerLen]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > maxFrame {
		return nil, fmt.Errorf("frame of %d bytes on the stream, want 1 to %d", n, maxFrame)
	}
	f := make(frame, headerLen+n)
	copy(f, head[:])
	if _, err := io.ReadFull(r, f[headerLen:]); err != nil {
		return nil, fmt.Errorf("stream ended inside a frame: %w", io.ErrUnexpectedEOF)
	}
	return f, nil
}
