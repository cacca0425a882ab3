package bootbench

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/net/ipv4"

	"mosimg/internal/slowlink"
)

// What clients ask for: windows of no client but our own (1), of EDK2 (4), and
// of u-root (64); blocks as UEFI asks for them.
var windows = []int{1, 4, 64}

const (
	blockSize = 1468
	linkSpeed = 1e9 // bits a second
)

func measureTFTP(ctx context.Context, conf Config, emit func(any) error) error {
	boot, err := makeSet(conf.Dir, conf.KiB<<10)
	if err != nil {
		return err
	}
	want, err := os.ReadFile(filepath.Join(boot, fileName))
	if err != nil {
		return err
	}
	servers, err := startTFTP(ctx, conf.Dir, boot)
	if err != nil {
		return err
	}
	for _, s := range servers {
		err := s.await(ctx, func(context.Context) error {
			_, _, err := fetchTFTP(s.addr, s.path, 64, want, time.Second)
			return err
		})
		if err != nil {
			return err
		}
	}
	for _, l := range conf.Links {
		addrs := make([]string, len(servers))
		for i, s := range servers {
			if addrs[i] = s.addr; l == 0 {
				continue
			}
			isRequest := func(p []byte) bool { return len(p) > 1 && p[0] == 0 && p[1] == 1 }
			if addrs[i], err = slowlink.UDP(ctx, s.addr, l, linkSpeed, isRequest); err != nil {
				return err
			}
		}
		for range conf.Runs {
			if err := tftpRound(servers, addrs, want, linkName(l), emit); err != nil {
				return err
			}
		}
	}
	return nil
}

// tftpRound fetches the file from each server with each window, and compares
// window by window, and our best with the best of each peer.
func tftpRound(servers []*server, addrs []string, want []byte, link string, emit func(any) error) error {
	best := make([]float64, len(servers))
	granted := make([]int, len(servers))
	for _, window := range windows {
		speeds := make([]float64, len(servers))
		for i, s := range servers {
			speed, got, err := fetchTFTP(addrs[i], s.path, window, want, patience)
			if err != nil {
				return fmt.Errorf("%s, link %s, window %d: %w", s.name, link, window, err)
			}
			speeds[i], granted[i] = speed, got
			best[i] = max(best[i], speed)
		}
		for i := 1; i < len(servers); i++ {
			err := emit(Sample{Name: fmt.Sprintf("tftp-%s-window%d", link, window), Unit: "MB/s",
				Peer: fmt.Sprintf("%s (grants %d)", servers[i].name, granted[i]), Ours: speeds[0], That: speeds[i]})
			if err != nil {
				return err
			}
		}
	}
	for i := 1; i < len(servers); i++ {
		err := emit(Sample{Name: fmt.Sprintf("tftp-%s-best", link), Unit: "MB/s", Peer: servers[i].name, Ours: best[0], That: best[i]})
		if err != nil {
			return err
		}
	}
	return nil
}

// fetchTFTP fetches a file as the windows of RFC 7440 want it, and says how
// many MB/s that were and what window was granted.
func fetchTFTP(addr, name string, window int, want []byte, patience time.Duration) (speed float64, granted int, err error) {
	server, err := net.ResolveUDPAddr("udp4", addr)
	if err != nil {
		return 0, 0, err
	}
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	_ = conn.SetReadBuffer(1 << 20) // a smaller one works, too
	c := &tftpClient{conn: conn, batch: ipv4.NewPacketConn(conn), window: 1, block: 512, got: make([]byte, 0, len(want))}
	for range min(window, 32) {
		c.messages = append(c.messages, ipv4.Message{Buffers: [][]byte{make([]byte, blockSize+64)}})
	}
	request := []byte{0, 1}
	words := []string{name, "octet", "blksize", strconv.Itoa(blockSize)}
	if window > 1 {
		words = append(words, "windowsize", strconv.Itoa(window))
	}
	for _, w := range words {
		request = append(append(request, w...), 0)
	}
	began := time.Now()
	if _, err := conn.WriteToUDP(request, server); err != nil {
		return 0, 0, err
	}
	for !c.done {
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			return 0, 0, err
		}
		if err := c.receive(); err != nil {
			return 0, 0, err
		}
	}
	took := time.Since(began)
	if !bytes.Equal(c.got, want) {
		return 0, 0, fmt.Errorf("%d bytes came, and not those of the file of %d", len(c.got), len(want))
	}
	return float64(len(want)) / 1e6 / took.Seconds(), c.window, nil
}

// tftpClient is one transfer's client.
type tftpClient struct {
	conn     *net.UDPConn
	batch    *ipv4.PacketConn
	messages []ipv4.Message
	from     net.Addr // the server's port of this transfer

	window, block int // as granted
	last          uint16
	sinceAck      int
	got           []byte
	done          bool
}

// patience is how long the client waits for a packet. It repeats nothing: what
// is lost the servers send again, after a second.
const patience = 10 * time.Second

func (c *tftpClient) receive() error {
	n, err := c.batch.ReadBatch(c.messages, 0)
	if err != nil {
		return err
	}
	for _, m := range c.messages[:n] {
		c.from = m.Addr
		if err := c.packet(m.Buffers[0][:m.N]); err != nil || c.done {
			return err
		}
	}
	return nil
}

func (c *tftpClient) packet(p []byte) error {
	if len(p) < 4 {
		return errors.New("a packet of less than 4 bytes")
	}
	switch binary.BigEndian.Uint16(p) {
	case 6: // OACK
		words := bytes.Split(p[2:], []byte{0})
		for i := 0; i+1 < len(words); i += 2 {
			n, err := strconv.Atoi(string(words[i+1]))
			if err != nil {
				return err
			}
			switch string(words[i]) {
			case "blksize":
				c.block = n
			case "windowsize":
				c.window = n
			}
		}
		return c.ack()
	case 3: // DATA
		if binary.BigEndian.Uint16(p[2:]) != c.last+1 {
			return c.ack()
		}
		c.last++
		c.sinceAck++
		c.got = append(c.got, p[4:]...)
		c.done = len(p)-4 < c.block
		if c.done || c.sinceAck == c.window {
			return c.ack()
		}
		return nil
	case 5:
		return fmt.Errorf("the server refused: %q", slices.Clip(p[4:]))
	}
	return fmt.Errorf("a packet of kind %d", p[1])
}

func (c *tftpClient) ack() error {
	c.sinceAck = 0
	_, err := c.conn.WriteTo([]byte{0, 4, byte(c.last >> 8), byte(c.last)}, c.from)
	return err
}
