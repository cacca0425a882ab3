package vswitch

import (
	"fmt"
	"net"
	"sync"
)

// Endpoint is an in-process machine on a port: it sends and receives whole
// frames. It may be used concurrently.
type Endpoint struct {
	port *Port
	recv chan frame
	done chan struct{}
	once sync.Once
}

// Attach adds an in-process port.
func (s *Switch) Attach(name string, l Link) (*Endpoint, error) {
	p, err := s.newPort(name, nil, l)
	if err != nil {
		return nil, err
	}
	e := &Endpoint{port: p, recv: make(chan frame, 64), done: make(chan struct{})}
	p.connect(e)
	return e, nil
}

// Port is the endpoint's port, to unplug or slow down.
func (e *Endpoint) Port() *Port { return e.port }

// Send sends one frame, with its Ethernet header and without a checksum. It
// waits when the link is slow.
func (e *Endpoint) Send(data []byte) error {
	if len(data) < minFrame || len(data) > maxFrame {
		return fmt.Errorf("send frame: %d bytes, want %d to %d", len(data), minFrame, maxFrame)
	}
	select {
	case <-e.done:
		return net.ErrClosed
	default:
	}
	if !e.port.receive(newFrame(data)) {
		return net.ErrClosed
	}
	return nil
}

// Recv is the next frame for this endpoint, or net.ErrClosed. The caller must
// not change it: others may hold the same bytes.
func (e *Endpoint) Recv() ([]byte, error) {
	select {
	case f := <-e.recv:
		return f.data(), nil
	case <-e.done:
		return nil, net.ErrClosed
	}
}

// Close takes the endpoint and its port away.
func (e *Endpoint) Close() error {
	e.once.Do(func() { close(e.done) })
	e.port.Close() // which closes its peer, this endpoint, again
	return nil
}

func (e *Endpoint) writeFrame(f frame) error {
	select {
	case e.recv <- f:
		return nil
	case <-e.done:
		return net.ErrClosed
	}
}
