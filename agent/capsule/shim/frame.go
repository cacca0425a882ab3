package shim

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"
)

// maxFrame bounds a frame of stdin.
const maxFrame = 1 << 20

func writeFrame(w io.Writer, data []byte) error {
	bufs := net.Buffers{binary.BigEndian.AppendUint32(nil, uint32(len(data))), data}
	_, err := bufs.WriteTo(w)
	return err
}

func readFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxFrame {
		return nil, fmt.Errorf("frame of %d bytes; %d is the most", n, maxFrame)
	}
	data := make([]byte, n)
	_, err := io.ReadFull(r, data)
	return data, err
}

var (
	deadlineNone time.Time
	deadlinePast = time.Unix(1, 0)
)

// deadlineNow makes what cannot be done at once fail within a second.
func deadlineNow() time.Time { return time.Now().Add(time.Second) }
