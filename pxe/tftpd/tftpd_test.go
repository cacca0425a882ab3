package tftpd

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
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

// start serves a set whose snponly.efi has several blocks and all bytes.
func start(t *testing.T, options ...func(*Server)) (addr string, log *syncBuffer, loader string, stop func()) {
	t.Helper()
	loader = string(pattern(300_000))
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
	for _, o := range options {
		o(s)
	}
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
	if op := binary.BigEndian.Uint16(buf); op != 6 || !strings.Contains(string(buf[:n]), "300000") {
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

// raw is a client whose every packet the test writes.
type raw struct {
	t *testing.T
	*net.UDPConn
	server *net.UDPAddr
}

func newRaw(t *testing.T, addr string) *raw {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	to, err := net.ResolveUDPAddr("udp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	return &raw{t, c, to}
}

// ask sends a request to the server's port.
func (r *raw) ask(p []byte) {
	r.t.Helper()
	if _, err := r.WriteTo(p, r.server); err != nil {
		r.t.Fatal(err)
	}
}

// next is the next packet from the server.
func (r *raw) next() ([]byte, *net.UDPAddr) {
	r.t.Helper()
	r.SetReadDeadline(time.Now().Add(20 * time.Second))
	buf := make([]byte, 2048)
	n, from, err := r.ReadFromUDP(buf)
	if err != nil {
		r.t.Fatal(err)
	}
	return buf[:n], from
}

// A slow ROM sends its request twice: both are the same transfer, from one
// port, and the reply that was lost comes at once.
func TestRepeatedRequestJoins(t *testing.T) {
	for _, ports := range []Ports{{}, {Single: true}} {
		addr, _, loader, stop := start(t, func(s *Server) { s.Ports = ports })
		c := newRaw(t, addr)
		asked := rrq("snponly.efi", "blksize", "1468", "windowsize", "8", "timeout", "5")
		c.ask(asked)
		oack, from := c.next()
		began := time.Now()
		c.ask(asked)
		again, from2 := c.next()
		if !bytes.Equal(oack, again) || from.String() != from2.String() {
			t.Errorf("%+v: the reply to the repetition is %q from %v; the first was %q from %v", ports, again, from2, oack, from)
		}
		if d := time.Since(began); d > 4*time.Second {
			t.Errorf("%+v: the repetition was answered after %v", ports, d)
		}
		// The client begins; late duplicates of its request disturb nothing.
		c.WriteTo(ackPacket(0), from)
		var got []byte
		for n := 1; len(got) < len(loader); n++ {
			p, f := c.next()
			if f.String() != from.String() || opcode(p) != opData || int(binary.BigEndian.Uint16(p[2:])) != n {
				t.Fatalf("%+v: block %d is wanted, %q comes from %v", ports, n, p[:4], f)
			}
			got = append(got, p[4:]...)
			if n%8 == 0 || len(got) == len(loader) {
				c.ask(asked)
				c.WriteTo(ackPacket(n), from)
			}
		}
		if string(got) != loader {
			t.Errorf("%+v: other bytes", ports)
		}
		c.Close()
		stop()
	}
}

// BIOS ROMs use the same port in each boot: a machine that is switched off in
// the middle and on again gets its loader from the beginning, also another one.
func TestSamePortAnotherRequest(t *testing.T) {
	addr, _, _, _ := start(t)
	c := newRaw(t, addr)
	c.ask(rrq("snponly.efi"))
	if p, _ := c.next(); opcode(p) != opData || len(p) != 516 {
		t.Fatalf("first reply %q", p)
	}
	c.ask(rrq("undionly.kpxe"))
	for {
		p, _ := c.next()
		if opcode(p) == opData && string(p[4:]) == "undionly.kpxe one" {
			return // repetitions of the old block may come before it
		}
	}
}

// A ROM that always uses one port asks for its next file as soon as it has the
// last block of the one before, while the server is still tidying up after it.
func TestSamePortInARow(t *testing.T) {
	addr, _, _, _ := start(t)
	c := newRaw(t, addr)
	began := time.Now()
	for n := range 300 {
		name := []string{"undionly.kpxe", "ipxe.efi"}[n%2]
		c.ask(rrq(name))
		for {
			p, from := c.next()
			if string(p[4:]) == name+" one" {
				c.WriteTo(ackPacket(1), from)
				break
			}
		}
	}
	if d := time.Since(began); d > 100*time.Second {
		t.Errorf("300 small files took %v: requests are lost", d)
	}
}

// With a range of ports files come from it alone; with more clients than
// ports the rest wait for their turn and are served.
func TestPortRange(t *testing.T) {
	const first, last = 21100, 21101
	addr, _, loader, _ := start(t, func(s *Server) { s.Ports = Ports{First: first, Last: last} })
	c := newRaw(t, addr)
	c.ask(rrq("snponly.efi"))
	if _, from := c.next(); from.Port < first || from.Port > last {
		t.Errorf("a block comes from port %d", from.Port)
	}
	storm(t, addr, loader, 6)
}

// More machines are switched on at once than are served at a time: all of them
// get their loader.
func TestBootStorm(t *testing.T) {
	addr, _, loader, _ := start(t)
	storm(t, addr, loader, maxTransfers+100)
}

// storm fetches with many clients at once.
func storm(t *testing.T, addr, want string, clients int) {
	t.Helper()
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			c, err := tftp.NewClient(addr)
			if err != nil {
				t.Error(err)
				return
			}
			c.SetBlockSize(1468)
			c.SetTimeout(2 * time.Second)
			c.SetRetries(30)
			wt, err := c.Receive("snponly.efi", "octet")
			if err != nil {
				t.Error(err)
				return
			}
			var b bytes.Buffer
			if _, err := wt.WriteTo(&b); err != nil || b.String() != want {
				t.Errorf("%d bytes, %v", b.Len(), err)
			}
		})
	}
	wg.Wait()
}

// A million packets of junk, requests with invented senders among them, cost
// bounded memory, and a machine that boots then is served.
func TestJunkFlood(t *testing.T) {
	packets := 1_000_000
	if testing.Short() {
		packets = 50_000
	}
	addr, _, loader, _ := start(t)
	var junk [][]byte
	r := rand.New(rand.NewPCG(1, 2))
	for n := range 100 {
		p := pattern(r.IntN(1400))
		if len(p) > 2 {
			p[0], p[1] = 0, byte(n%8)
		}
		junk = append(junk, p)
	}
	junk = append(junk, rrq("snponly.efi", "blksize", "1468"), rrq("nothing"), []byte("\x00\x01snponly.efi\x00octet"))
	var flooders []net.Conn
	for range 50 {
		c, err := net.Dial("udp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		flooders = append(flooders, c)
	}
	before := heap()
	goroutines := runtime.NumGoroutine()
	for n := range packets {
		flooders[n%len(flooders)].Write(junk[r.IntN(len(junk))]) // refused ones count, too
	}
	if grown := heap() - before; grown > 32<<20 {
		t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
	if n := runtime.NumGoroutine() - goroutines; n > maxTransfers+10 {
		t.Errorf("%d goroutines more", n)
	}
	if got, err := fetch(t, addr, "snponly.efi", 1468); err != nil || got != loader {
		t.Errorf("after the flood: %d bytes, %v", len(got), err)
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// The file is replaced while a machine has half of it: it gets the rest of
// what it began with.
func TestReplacedInTheMiddle(t *testing.T) {
	dir := t.TempDir()
	files := imagetest.Files("one")
	old := string(pattern(30_000))
	files["boot/snponly.efi"] = old
	imagetest.Publish(t, dir, "amd64", files)
	store, err := images.Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	addr, _, _, _ := start(t, func(s *Server) { s.Loader = store.Loader })
	c := newRaw(t, addr)
	c.ask(rrq("snponly.efi"))
	var got []byte
	for n := 1; ; n++ {
		p, from := c.next()
		got = append(got, p[4:]...)
		if n == 10 {
			path := filepath.Join(dir, store.Pick().Manifest.ID, "boot", "snponly.efi")
			if err := os.WriteFile(path, []byte(strings.Repeat("x", 30_000)), 0o644); err != nil {
				t.Fatal(err)
			}
			imagetest.Publish(t, dir, "amd64", imagetest.Files("two"))
		}
		c.WriteTo(ackPacket(n), from)
		if len(p) < 516 {
			break
		}
	}
	if string(got) != old {
		t.Errorf("%d bytes, and not those of the file that was asked for", len(got))
	}
	if fresh, err := fetch(t, addr, "snponly.efi", 1468); err != nil || fresh != "snponly.efi two" {
		t.Errorf("the next one gets %.20q, %v; want the new file", fresh, err)
	}
}
