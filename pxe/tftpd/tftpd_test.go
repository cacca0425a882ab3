package tftpd

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pin/tftp/v3"

	"mosimg/pxe/images"
	"mosimg/pxe/imagetest"
)

// syncBuffer is a log that may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// start serves a set whose snponly.efi has several blocks.
func start(t *testing.T) (addr string, log *syncBuffer, loader string, stop func()) {
	t.Helper()
	loader = strings.Repeat("0123456789abcdef", 1000)
	files := imagetest.Files("one")
	files["boot/snponly.efi"] = loader
	dir := t.TempDir()
	imagetest.Make(t, dir, "amd64", files)
	store, err := images.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	log = new(syncBuffer)
	s := &Server{Loader: store.Loader, MAC: func(netip.Addr) string { return "52:54:00:00:00:01" }, Log: slog.New(slog.NewTextHandler(log, nil))}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	addr = conn.LocalAddr().String()
	go func() { done <- s.Serve(ctx, conn) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					t.Errorf("Serve = %v", err)
				}
			case <-time.After(grace + 5*time.Second):
				t.Error("the server does not stop")
			}
		})
	}
	t.Cleanup(stop)
	return addr, log, loader, stop
}

func fetch(t *testing.T, addr, name string, blksize int) (string, error) {
	t.Helper()
	c, err := tftp.NewClient(addr)
	if err != nil {
		t.Fatal(err)
	}
	c.SetTimeout(2 * time.Second)
	c.RequestTSize(true)
	if blksize > 0 {
		c.SetBlockSize(blksize)
	}
	wt, err := c.Receive(name, "octet")
	if err != nil {
		return "", err
	}
	size, ok := wt.(tftp.IncomingTransfer).Size()
	var b bytes.Buffer
	_, err = wt.WriteTo(&b)
	if err == nil && (!ok || size != int64(b.Len())) {
		t.Errorf("%s: told size %d, %t; got %d bytes", name, size, ok, b.Len())
	}
	return b.String(), err
}

func TestFetch(t *testing.T) {
	addr, log, loader, stop := start(t)
	for _, name := range []string{"snponly.efi", "/snponly.efi", `\snponly.efi`, "snponly.efi.0"} {
		for _, block := range []int{0, 512, 1024, 1432, 1468, 65464} {
			if got, err := fetch(t, addr, name, block); err != nil || got != loader {
				t.Errorf("%s with blocks of %d: %d bytes, %v", name, block, len(got), err)
			}
		}
	}
	stop()
	if !strings.Contains(log.String(), "stage=tftp mac=52:54:00:00:00:01") {
		t.Errorf("no line in the boot trace:\n%s", log.String())
	}
}

// What is not a boot loader is not there, and the text tells nothing of ours.
func TestNotFound(t *testing.T) {
	addr, log, _, stop := start(t)
	for _, name := range []string{"autoexec.ipxe", "nothing", "../vmlinuz", "boot/snponly.efi", "vmlinuz", "/etc/passwd", "../../../../etc/passwd", "manifest.json", ".", strings.Repeat("x", 400)} {
		start := time.Now()
		_, err := fetch(t, addr, name, 0)
		if err == nil || !strings.Contains(err.Error(), "file not found") || strings.Contains(err.Error(), "/tmp") {
			t.Errorf("%.40s: %v; want \"file not found\" and no path", name, err)
		}
		if d := time.Since(start); d > time.Second {
			t.Errorf("%.40s: answered after %v; iPXE waits for it", name, d)
		}
	}
	stop()
	if strings.Contains(log.String(), "autoexec") {
		t.Errorf("iPXE's look in passing is in the log:\n%s", log.String())
	}
}

func TestNoWriting(t *testing.T) {
	addr, _, _, _ := start(t)
	c, err := tftp.NewClient(addr)
	if err != nil {
		t.Fatal(err)
	}
	rf, err := c.Send("snponly.efi", "octet")
	if err == nil {
		_, err = rf.ReadFrom(strings.NewReader("evil"))
	}
	if err == nil {
		t.Error("a file could be written")
	}
}

// rrq is a read request with options, as UEFI sends it.
func rrq(name string, opts ...string) []byte {
	b := []byte{0, 1}
	for _, s := range append([]string{name, "octet"}, opts...) {
		b = append(append(b, s...), 0)
	}
	return b
}

// UEFI asks for the size, breaks off with an error packet, and asks again.
// That is no failure, and must not fill the log.
func TestSizeProbe(t *testing.T) {
	addr, log, loader, stop := start(t)
	c, err := net.Dial("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	to, _ := net.ResolveUDPAddr("udp4", addr)
	if _, err := u.WriteTo(rrq("snponly.efi", "tsize", "0", "blksize", "1468"), to); err != nil {
		t.Fatal(err)
	}
	u.SetReadDeadline(time.Now().Add(5 * time.Second))
	buf := make([]byte, 2048)
	n, from, err := u.ReadFrom(buf)
	if err != nil {
		t.Fatal(err)
	}
	if op := binary.BigEndian.Uint16(buf); op != 6 || !strings.Contains(string(buf[:n]), "16000") {
		t.Fatalf("reply %q; want an OACK with the size", buf[:n])
	}
	u.WriteTo(append([]byte{0, 5, 0, 8}, "User aborted the transfer\x00"...), from)
	if got, err := fetch(t, addr, "snponly.efi", 1468); err != nil || got != loader {
		t.Errorf("after the probe: %d bytes, %v", len(got), err)
	}
	stop()
	if strings.Contains(log.String(), "failed") {
		t.Errorf("the probe was logged as a failure:\n%s", log.String())
	}
}

// A machine that is switched off in the middle costs neither the others nor
// the stop of the head.
func TestClientVanishes(t *testing.T) {
	addr, _, loader, stop := start(t)
	u, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	to, _ := net.ResolveUDPAddr("udp4", addr)
	u.WriteTo(rrq("snponly.efi"), to)
	u.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, _, err := u.ReadFrom(make([]byte, 2048)); err != nil {
		t.Fatal(err)
	}
	u.Close()
	if got, err := fetch(t, addr, "snponly.efi", 1468); err != nil || got != loader {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	start := time.Now()
	stop()
	if d := time.Since(start); d > grace+time.Second {
		t.Errorf("the stop took %v", d)
	}
}

func TestGarbage(t *testing.T) {
	addr, _, loader, _ := start(t)
	u, err := net.ListenUDP("udp4", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	to, _ := net.ResolveUDPAddr("udp4", addr)
	for _, p := range [][]byte{{}, {0}, {0, 1}, {0, 1, 0}, {0, 9, 1}, {0, 1, 'a', 0}, bytes.Repeat([]byte{0xff}, 1400), rrq("snponly.efi", "blksize"), rrq("snponly.efi", "blksize", "x"), rrq("snponly.efi", "blksize", "-1")} {
		u.WriteTo(p, to)
	}
	if got, err := fetch(t, addr, "snponly.efi", 1468); err != nil || got != loader {
		t.Errorf("after garbage: %d bytes, %v", len(got), err)
	}
}
