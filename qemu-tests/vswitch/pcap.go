package vswitch

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"
)

// The classic capture format with nanoseconds:
// https://www.ietf.org/archive/id/draft-ietf-opsawg-pcap-04.html
const (
	pcapMagicNanos  = 0xa1b23c4d
	pcapLinkEther   = 1
	pcapSnapLen     = 256 << 10
	pcapHeaderLen   = 24
	pcapRecordLen   = 16
	pcapDefaultCap  = 64 << 20
	pcapQueueFrames = 4096
	pcapFlushEvery  = time.Second
)

func pcapHeader() []byte {
	b := make([]byte, pcapHeaderLen)
	le := binary.LittleEndian
	le.PutUint32(b[0:], pcapMagicNanos)
	le.PutUint16(b[4:], 2)
	le.PutUint16(b[6:], 4)
	le.PutUint32(b[16:], pcapSnapLen)
	le.PutUint32(b[20:], pcapLinkEther)
	return b
}

func pcapRecord(at time.Time, n int) [pcapRecordLen]byte {
	var b [pcapRecordLen]byte
	le := binary.LittleEndian
	le.PutUint32(b[0:], uint32(at.Unix()))
	le.PutUint32(b[4:], uint32(at.Nanosecond()))
	le.PutUint32(b[8:], uint32(n))
	le.PutUint32(b[12:], uint32(n))
	return b
}

// capture writes frames to a file without ever making the switch wait: when
// the disk is too slow frames are left out and counted.
type capture struct {
	name   string
	limit  int64
	queue  chan captured
	done   chan error
	missed atomic.Uint64
}

type captured struct {
	at   time.Time
	data []byte
}

func newCapture(name string, limit int64) (*capture, error) {
	if limit <= 0 {
		limit = pcapDefaultCap
	}
	f, err := os.Create(name)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	c := &capture{name: name, limit: limit, queue: make(chan captured, pcapQueueFrames), done: make(chan error, 1)}
	go func() { c.done <- c.run(f) }()
	return c, nil
}

// add queues one frame.
func (c *capture) add(at time.Time, data []byte) {
	select {
	case c.queue <- captured{at, data}:
	default:
		c.missed.Add(1)
	}
}

// close writes what is queued. No add may follow.
func (c *capture) close() error {
	close(c.queue)
	return <-c.done
}

func (c *capture) run(f *os.File) error {
	err := c.write(f)
	for range c.queue { // after an error: the switch goes on without a capture
		c.missed.Add(1)
	}
	if err != nil {
		return fmt.Errorf("capture %s: %w", c.name, err)
	}
	if n := c.missed.Load(); n > 0 {
		return fmt.Errorf("capture %s: %d frames left out, the disk was too slow", c.name, n)
	}
	return nil
}

func (c *capture) write(f *os.File) error {
	defer func() { f.Close() }()
	w := bufio.NewWriterSize(f, 256<<10)
	if _, err := w.Write(pcapHeader()); err != nil {
		return err
	}
	size := int64(pcapHeaderLen)
	flush := time.NewTicker(pcapFlushEvery)
	defer flush.Stop()
	for {
		select {
		case p, ok := <-c.queue:
			if !ok {
				return w.Flush()
			}
			if size >= c.limit {
				if err := w.Flush(); err != nil {
					return err
				}
				f.Close()
				if err := os.Rename(c.name, c.name+".old"); err != nil {
					return err
				}
				next, err := os.Create(c.name)
				if err != nil {
					return err
				}
				f = next
				w.Reset(f)
				if _, err := w.Write(pcapHeader()); err != nil {
					return err
				}
				size = pcapHeaderLen
			}
			if err := writeRecord(w, p); err != nil {
				return err
			}
			size += int64(pcapRecordLen + len(p.data))
		case <-flush.C:
			if w.Buffered() > 0 {
				if err := w.Flush(); err != nil {
					return err
				}
			}
		}
	}
}

func writeRecord(w io.Writer, p captured) error {
	head := pcapRecord(p.at, len(p.data))
	if _, err := w.Write(head[:]); err != nil {
		return err
	}
	_, err := w.Write(p.data)
	return err
}
