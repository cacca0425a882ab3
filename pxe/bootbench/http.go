package bootbench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/slowlink"
)

// Clients at a time, and how many files each fetches over loopback: a boot
// chain's files are few and large, so each has a connection of its own.
var storms = []int{1, 8}

func measureHTTP(ctx context.Context, conf Config, emit func(any) error) error {
	boot, err := makeSet(conf.Dir, conf.KiB<<10)
	if err != nil {
		return err
	}
	servers, err := startHTTP(ctx, conf.Dir, boot)
	if err != nil {
		return err
	}
	for _, s := range servers {
		if err := s.await(ctx, func(ctx context.Context) error { return fetchHTTP(ctx, s.addr, s.path, conf.KiB<<10) }); err != nil {
			return err
		}
	}
	for _, l := range conf.Links {
		addrs := make([]string, len(servers))
		for i, s := range servers {
			if addrs[i] = s.addr; l > 0 {
				if addrs[i], err = slowlink.TCP(ctx, s.addr, l); err != nil {
					return err
				}
			}
		}
		for range conf.Runs {
			for _, clients := range storms {
				if err := httpRound(ctx, conf, servers, addrs, linkName(l), clients, emit); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// httpRound lets clients fetch the file from each server by turns: MB/s of all
// of them together, and the server's CPU seconds for a GB.
func httpRound(ctx context.Context, conf Config, servers []*server, addrs []string, link string, clients int, emit func(any) error) error {
	speed, cost := make([]float64, len(servers)), make([]float64, len(servers))
	size := conf.KiB << 10
	// The clock of CPU time has steps of 10 ms.
	times := int(max(1, enough/(int64(size)*int64(clients))))
	if link != linkName(0) {
		times = 1
	}
	for i, s := range servers {
		before, err := s.cpu()
		if err != nil {
			return err
		}
		began := time.Now()
		errs := make([]error, clients)
		var wg sync.WaitGroup
		for c := range clients {
			wg.Go(func() {
				for n := 0; n < times && errs[c] == nil; n++ {
					errs[c] = fetchHTTP(ctx, addrs[i], s.path, size)
				}
			})
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			return fmt.Errorf("%s, link %s, %d clients: %w", s.name, link, clients, err)
		}
		bytes := float64(size) * float64(times) * float64(clients)
		speed[i] = bytes / 1e6 / time.Since(began).Seconds()
		after, err := s.cpu()
		if err != nil {
			return err
		}
		cost[i] = (after - before).Seconds() / (bytes / 1e9)
	}
	name := fmt.Sprintf("http-%s-%dclients", link, clients)
	if err := emit(Sample{Name: name, Unit: "MB/s", Peer: servers[1].name, Ours: speed[0], That: speed[1]}); err != nil {
		return err
	}
	if link != linkName(0) || cost[0] == 0 || cost[1] == 0 {
		return nil // too few bytes for that clock
	}
	return emit(Sample{Name: name + "-cpu", Unit: "s/GB", Peer: servers[1].name, Ours: cost[0], That: cost[1]})
}

// enough bytes for one measurement over loopback.
const enough int64 = 8 << 30

// fetchHTTP gets a file and throws it away in the kernel, so that it is the
// server that is measured and not the client.
func fetchHTTP(ctx context.Context, addr, path string, size int) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp4", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: head\r\nConnection: close\r\n\r\n", path); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n := 0
	for !bytes.Contains(buf[:n], []byte("\r\n\r\n")) {
		m, err := conn.Read(buf[n:])
		if err != nil {
			return fmt.Errorf("read the reply's head: %w", err)
		}
		n += m
	}
	head, body, _ := strings.Cut(string(buf[:n]), "\r\n\r\n")
	status, _, _ := strings.Cut(head, "\r\n")
	_, length, _ := strings.Cut(head, "Content-Length: ")
	length, _, _ = strings.Cut(length, "\r\n")
	if want, err := strconv.Atoi(length); err != nil || want != size || !strings.Contains(status, " 200 ") {
		return fmt.Errorf("the reply is %q with %q bytes", status, length)
	}
	return discard(conn.(*net.TCPConn), size-len(body))
}

// discard reads a number of bytes without having them copied: MSG_TRUNC of tcp(7).
func discard(conn *net.TCPConn, left int) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	buf := make([]byte, 1<<20) // says how many bytes at most; nothing is written to it
	for left > 0 && failed == nil {
		err := raw.Read(func(fd uintptr) bool {
			n, _, err := unix.Recvfrom(int(fd), buf[:min(left, len(buf))], unix.MSG_TRUNC)
			switch {
			case errors.Is(err, unix.EAGAIN):
				return false
			case errors.Is(err, unix.EINTR):
			case err != nil:
				failed = err
			case n == 0:
				failed = io.ErrUnexpectedEOF
			}
			left -= max(n, 0)
			return true
		})
		if err != nil {
			return err
		}
	}
	return failed
}
