// Package vswitch is an Ethernet switch in user space. Virtual machines join
// by QEMU's stream netdev over unix sockets, programs of ours by in-process
// ports, and nobody needs root for either.
//
// It does what a cheap desktop switch does (it learns addresses, floods what
// it does not know, drops at a full queue) and what a test bench wants
// besides: links of a given speed, delay and loss, cables that can be pulled,
// partitions, a capture of every frame, and word of each machine's first
// frame, which tells "it never booted" from "it booted and failed".
//
// Limits: no VLANs (tagged frames pass untouched), no spanning tree, no flow
// control. It exists because a stream netdev is a point-to-point pipe, and
// because bridges and taps need root.
package vswitch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"
)

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// ParseMAC reads an address in any of the usual spellings.
func ParseMAC(s string) (MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return MAC{}, fmt.Errorf("%q is not an Ethernet address", s)
	}
	return MAC(hw), nil
}

// Config is a switch. The zero value is a plain switch with no capture.
type Config struct {
	// Pcap is a file for a capture of all frames, "" for none. At PcapCap
	// bytes it is renamed to Pcap+".old" and begun again, so the last
	// PcapCap bytes at least are kept in no more than twice that.
	Pcap    string
	PcapCap int64 // bytes, 0 is 64 MiB
	// Tap sees every frame that enters the switch, with the name of its
	// port. It must be quick and must not change or keep the frame.
	Tap func(port string, frame []byte)
	Log *slog.Logger
}

// Switch is a running switch. Its methods may be used concurrently.
type Switch struct {
	tap  func(string, []byte)
	log  *slog.Logger
	pcap *capture // nil without a capture
	wait sync.WaitGroup

	mu     sync.Mutex // guards the following
	ports  map[string]*Port
	table  macTable
	first  map[MAC]time.Time     // when an address was first seen as a source
	await  map[MAC]chan struct{} // closed when it is; made by AwaitFirstPacket
	closed bool
}

// maxFirst bounds what a machine that forges source addresses can make us
// remember.
const maxFirst = 4096

// New makes a switch without ports.
func New(c Config) (*Switch, error) {
	s := &Switch{
		tap:   c.Tap,
		log:   c.Log,
		ports: make(map[string]*Port),
		table: macTable{},
		first: make(map[MAC]time.Time),
		await: make(map[MAC]chan struct{}),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if c.Pcap != "" {
		p, err := newCapture(c.Pcap, c.PcapCap)
		if err != nil {
			return nil, err
		}
		s.pcap = p
	}
	return s, nil
}

// Close takes every port away and ends the capture. It returns what went
// wrong with the capture, if anything did.
func (s *Switch) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	ports := s.ports
	s.ports = nil
	s.mu.Unlock()
	for _, p := range ports {
		p.shut()
	}
	s.wait.Wait()
	if s.pcap != nil {
		return s.pcap.close()
	}
	return nil
}

func (s *Switch) add(p *Port) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return errors.New("the switch is closed")
	case s.ports[p.name] != nil:
		return fmt.Errorf("the switch has a port %q already", p.name)
	}
	s.ports[p.name] = p
	return nil
}

func (s *Switch) remove(p *Port) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ports[p.name] == p {
		delete(s.ports, p.name)
	}
	s.table.forget(p)
}

// Port is the port of that name, or nil.
func (s *Switch) Port(name string) *Port {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ports[name]
}

// forward is the fabric: it takes a frame that came in at from and queues it
// wherever it must go out. It never blocks on a port.
func (s *Switch) forward(from *Port, f frame) {
	data := f.data()
	src, dst := MAC(data[6:12]), MAC(data[0:6])
	if s.tap != nil {
		s.tap(from.name, data)
	}
	if s.pcap != nil {
		s.pcap.add(time.Now(), data)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.note(src)
	s.table.learn(src, from)
	if to := s.table.lookup(dst); to != nil {
		if to != from && to.group == from.group {
			to.send(f)
		}
		return
	}
	for _, to := range s.ports {
		if to != from && to.group == from.group {
			to.send(f)
		}
	}
}

// note remembers that src was heard; s.mu is held.
func (s *Switch) note(src MAC) {
	if _, known := s.first[src]; known || src.group() || len(s.first) >= maxFirst {
		return
	}
	s.first[src] = time.Now()
	if ch := s.await[src]; ch != nil {
		close(ch)
		delete(s.await, src)
	}
}

// AwaitFirstPacket waits until a frame came from mac, and tells when that
// was. An address that was heard before counts until ForgetFirst.
func (s *Switch) AwaitFirstPacket(ctx context.Context, mac MAC) (time.Time, error) {
	s.mu.Lock()
	ch := s.await[mac]
	if ch == nil {
		ch = make(chan struct{})
		s.await[mac] = ch
	}
	if at, ok := s.first[mac]; ok {
		delete(s.await, mac)
		s.mu.Unlock()
		return at, nil
	}
	s.mu.Unlock()
	select {
	case <-ch:
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.first[mac], nil
	case <-ctx.Done():
		return time.Time{}, context.Cause(ctx)
	}
}

// ForgetFirst makes the next frame of mac its first again: its machine is
// about to be switched on anew.
func (s *Switch) ForgetFirst(mac MAC) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.first, mac)
}

// Partition splits the switch: ports in different groups do not hear each
// other. Ports that no group names form a group of their own. Partition
// without groups heals it.
func (s *Switch) Partition(groups ...[]string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	group := make(map[string]int)
	for i, g := range groups {
		for _, name := range g {
			if s.ports[name] == nil {
				return fmt.Errorf("the switch has no port %q", name)
			}
			if group[name] != 0 {
				return fmt.Errorf("port %q is in two groups", name)
			}
			group[name] = i + 1
		}
	}
	for _, p := range s.ports {
		p.group = group[p.name]
	}
	// What was learnt across the cut must not swallow frames after it heals.
	s.table = macTable{}
	return nil
}

// Counters are a port's frames and bytes, from the machine's point of view
// reversed: Rx is what the switch received from it.
type Counters struct {
	Name      string `json:"name"`
	Rx        uint64 `json:"rx"`
	RxBytes   uint64 `json:"rx_bytes"`
	Tx        uint64 `json:"tx"`
	TxBytes   uint64 `json:"tx_bytes"`
	Lost      uint64 `json:"lost"`    // by the link's loss rate
	Dropped   uint64 `json:"dropped"` // full queue, unplugged, nobody connected
	Bad       uint64 `json:"bad"`     // no valid Ethernet frames
	Connected bool   `json:"connected"`
}

// Counters are those of all ports, by name.
func (s *Switch) Counters() []Counters {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []Counters
	for _, p := range s.ports {
		all = append(all, p.counters())
	}
	slices.SortFunc(all, func(a, b Counters) int { return strings.Compare(a.Name, b.Name) })
	return all
}
