package vswitch

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var (
	macA = MAC{0x52, 0x54, 0, 0x77, 0, 1}
	macB = MAC{0x52, 0x54, 0, 0x77, 0, 2}
	macC = MAC{0x52, 0x54, 0, 0x77, 0, 3}
	bc   = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// packet is a frame with a payload that a test can tell from others.
func packet(dst, src MAC, payload string) []byte {
	f := append(append(append([]byte{}, dst[:]...), src[:]...), 0x88, 0xb5)
	return append(f, payload...)
}

func newSwitch(t *testing.T, c Config) *Switch {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func attach(t *testing.T, s *Switch, name string, l Link) *Endpoint {
	t.Helper()
	e, err := s.Attach(name, l)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func send(t *testing.T, e *Endpoint, f []byte) {
	t.Helper()
	if err := e.Send(f); err != nil {
		t.Fatal(err)
	}
}

// heard is everything an endpoint received once the switch is at rest.
func heard(e *Endpoint) []string {
	synctest.Wait()
	var got []string
	for {
		select {
		case f := <-e.recv:
			got = append(got, string(f.data()[minFrame:]))
		default:
			return got
		}
	}
}

func TestLearnsAndFloods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSwitch(t, Config{})
		a, b, c := attach(t, s, "a", Link{}), attach(t, s, "b", Link{}), attach(t, s, "c", Link{})
		send(t, a, packet(macB, macA, "unknown"))
		check := func(what string, e *Endpoint, want ...string) {
			t.Helper()
			if d := cmp.Diff(want, heard(e)); d != "" {
				t.Errorf("%s (-want +got):\n%s", what, d)
			}
		}
		check("flooded to b", b, "unknown")
		check("flooded to c", c, "unknown")
		check("not back to a", a)
		send(t, b, packet(macA, macB, "reply"))
		check("reply reaches a", a, "reply")
		check("reply spares c", c)
		send(t, a, packet(macB, macA, "known"))
		check("known reaches b", b, "known")
		check("known spares c", c)
		send(t, c, packet(bc, macC, "all"))
		check("broadcast to a", a, "all")
		check("broadcast to b", b, "all")
		// The machine moves to another port: its old one must not keep it.
		send(t, c, packet(bc, macA, "moved"))
		heard(a)
		heard(b)
		send(t, b, packet(macA, macB, "follow"))
		check("frames follow the machine", c, "follow")
		check("not to its old port", a)
	})
}

func TestPartitionAndCable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSwitch(t, Config{})
		a, b, c := attach(t, s, "a", Link{}), attach(t, s, "b", Link{}), attach(t, s, "c", Link{})
		for _, e := range []struct {
			e   *Endpoint
			mac MAC
		}{{a, macA}, {b, macB}, {c, macC}} {
			send(t, e.e, packet(bc, e.mac, "hello"))
		}
		heard(a)
		heard(b)
		heard(c)
		if err := s.Partition([]string{"a", "b"}); err != nil {
			t.Fatal(err)
		}
		send(t, a, packet(macC, macA, "cut"))
		send(t, a, packet(bc, macA, "near"))
		if got := heard(c); len(got) != 0 {
			t.Errorf("c heard %q across the partition", got)
		}
		if d := cmp.Diff([]string{"cut", "near"}, heard(b)); d != "" {
			t.Errorf("b (-want +got):\n%s", d)
		}
		s.Partition()
		send(t, a, packet(macC, macA, "healed"))
		if d := cmp.Diff([]string{"healed"}, heard(c)); d != "" {
			t.Errorf("c after healing (-want +got):\n%s", d)
		}
		heard(b)
		b.Port().Unplug()
		send(t, a, packet(bc, macA, "x"))
		send(t, b, packet(bc, macB, "y"))
		if got := heard(b); len(got) != 0 {
			t.Errorf("unplugged b heard %q", got)
		}
		heard(c)
		if got := heard(a); len(got) != 0 {
			t.Errorf("a heard %q of an unplugged machine", got)
		}
		b.Port().Plug()
		send(t, a, packet(bc, macA, "z"))
		if d := cmp.Diff([]string{"z"}, heard(b)); d != "" {
			t.Errorf("b plugged again (-want +got):\n%s", d)
		}
		if err := s.Partition([]string{"nobody"}); err == nil {
			t.Error("Partition of an unknown port succeeded")
		}
	})
}

// A machine that stopped reading must not hold up the others, nor eat memory.
func TestSlowPortBlocksNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSwitch(t, Config{})
		a, stuck, c := attach(t, s, "a", Link{}), attach(t, s, "stuck", Link{}), attach(t, s, "c", Link{})
		n := 0
		for range 3 * queueFrames {
			send(t, a, packet(bc, macA, "x"))
			n += len(heard(c))
		}
		if n != 3*queueFrames {
			t.Errorf("c heard %d frames; want %d", n, 3*queueFrames)
		}
		if d := stuck.Port().counters().Dropped; d == 0 {
			t.Error("nothing was dropped at the stuck port")
		}
	})
}

func TestLinkSpeedDelayAndLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSwitch(t, Config{})
		a := attach(t, s, "a", Link{Bandwidth: 10e6, Delay: 5 * time.Millisecond})
		b := attach(t, s, "b", Link{})
		start := time.Now()
		const frames, size = 1000, 1500
		go func() {
			for range frames {
				a.Send(packet(macB, macA, strings.Repeat("x", size-minFrame)))
			}
		}()
		for range frames {
			if _, err := b.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		want := time.Duration(frames*(size+wireOverhead)*8)*100 + 5*time.Millisecond
		if got := time.Since(start); got < want-time.Millisecond || got > want+time.Millisecond {
			t.Errorf("%d frames took %v over 10mbit; want %v", frames, got, want)
		}
		b.Port().SetLink(Link{Loss: 1})
		a.Port().SetLink(Link{})
		send(t, a, packet(macB, macA, "lost"))
		if got := heard(b); len(got) != 0 {
			t.Errorf("b heard %q over a link that loses all", got)
		}
		if got := b.Port().counters().Lost; got != 1 {
			t.Errorf("Lost = %d; want 1", got)
		}
	})
}

func TestAwaitFirstPacket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSwitch(t, Config{})
		a := attach(t, s, "a", Link{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		time.AfterFunc(3*time.Second, func() { a.Send(packet(bc, macA, "x")) })
		start := time.Now()
		at, err := s.AwaitFirstPacket(ctx, macA)
		if err != nil || at.Sub(start) != 3*time.Second {
			t.Errorf("AwaitFirstPacket = %v, %v; want after 3s", at.Sub(start), err)
		}
		if again, err := s.AwaitFirstPacket(ctx, macA); err != nil || again != at {
			t.Errorf("second AwaitFirstPacket = %v, %v; want %v", again, err, at)
		}
		s.ForgetFirst(macA)
		if _, err := s.AwaitFirstPacket(ctx, macA); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("AwaitFirstPacket of a silent machine = %v; want a deadline", err)
		}
	})
}

func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vsw")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// QEMU's framing on the socket, and a machine that is started again.
func TestUnixPort(t *testing.T) {
	s := newSwitch(t, Config{})
	path := filepath.Join(socketDir(t), "a.sock")
	if _, err := s.Listen("a", path, Link{}); err != nil {
		t.Fatal(err)
	}
	b := attach(t, s, "b", Link{})
	for range 2 {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		f := packet(macB, macA, "over the socket")
		conn.Write(binary.BigEndian.AppendUint32(nil, uint32(len(f))))
		conn.Write(f)
		got, err := b.Recv()
		if err != nil || !bytes.Equal(got, f) {
			t.Fatalf("Recv = %q, %v; want %q", got, err, f)
		}
		reply := packet(macA, macB, "and back")
		send(t, b, reply)
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		back, err := readFrame(bufio.NewReader(conn))
		if err != nil || !bytes.Equal(back.data(), reply) {
			t.Fatalf("the machine read %q, %v; want %q", back, err, reply)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

// A stream that lost its framing is given up, others go on.
func TestGarbageOnASocketClosesIt(t *testing.T) {
	s := newSwitch(t, Config{})
	path := filepath.Join(socketDir(t), "a.sock")
	if _, err := s.Listen("a", path, Link{}); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read = %v; want a closed connection", err)
	}
}

func TestListenRefusesLongPaths(t *testing.T) {
	s := newSwitch(t, Config{})
	_, err := s.Listen("a", "/tmp/"+strings.Repeat("x", MaxSocketPath), Link{})
	if err == nil || !strings.Contains(err.Error(), "103 are possible") {
		t.Errorf("Listen = %v; want an error that names the limit", err)
	}
}

func TestPcapKeepsTheLastFrames(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lab.pcap")
	s := newSwitch(t, Config{Pcap: name, PcapCap: 4 << 10})
	a := attach(t, s, "a", Link{})
	var want []string
	for i := range 100 {
		p := strings.Repeat(string(rune('a'+i%26)), 60+i)
		want = append(want, p)
		send(t, a, packet(bc, macA, p))
	}
	for a.Port().counters().Rx < 100 {
		time.Sleep(time.Millisecond)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	got := append(readPcap(t, name+".old"), readPcap(t, name)...)
	if len(got) < 20 || len(got) > 99 {
		t.Fatalf("the two files hold %d frames; want the last ones", len(got))
	}
	if d := cmp.Diff(want[100-len(got):], got); d != "" {
		t.Errorf("frames (-want +got):\n%s", d)
	}
}

func readPcap(t *testing.T, name string) (payloads []string) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(b, pcapHeader()) {
		t.Fatalf("%s has no pcap header", name)
	}
	for b = b[pcapHeaderLen:]; len(b) > 0; {
		n := binary.LittleEndian.Uint32(b[8:])
		payloads = append(payloads, string(b[pcapRecordLen+minFrame:pcapRecordLen+n]))
		b = b[pcapRecordLen+n:]
	}
	return payloads
}

func TestParseLink(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Link
		text string
	}{
		{"", Link{}, "unlimited"},
		{"10mbit", Link{Bandwidth: 10e6}, "10mbit"},
		{"100mbit", Link{Bandwidth: 100e6}, "100mbit"},
		{"1gbit", Link{Bandwidth: 1e9}, "1gbit"},
		{"2.5gbit", Link{Bandwidth: 2.5e9}, "2500mbit"},
		{"56.6kbit,delay=80ms,loss=0.5%", Link{Bandwidth: 56600, Delay: 80 * time.Millisecond, Loss: 0.005}, "56.6kbit,delay=80ms,loss=0.5%"},
		{"unlimited,loss=100%", Link{Loss: 1}, "unlimited,loss=100%"},
	} {
		got, err := ParseLink(c.in)
		if err != nil || got != c.want || got.String() != c.text {
			t.Errorf("ParseLink(%q) = %+v (%q), %v; want %+v (%q)", c.in, got, got.String(), err, c.want, c.text)
		}
		if again, err := ParseLink(got.String()); err != nil || again != got {
			t.Errorf("ParseLink(%q) = %+v, %v; want %+v", got.String(), again, err, got)
		}
	}
	for _, bad := range []string{"10", "fast", "0mbit", "-1mbit", "NaNmbit", "1e30gbit", "10mbit,", "10mbit,delay=5", "10mbit,delay=-1s", "10mbit,loss=2", "10mbit,loss=101%", "10mbit,colour=red"} {
		if l, err := ParseLink(bad); err == nil || !strings.Contains(err.Error(), "100mbit") {
			t.Errorf("ParseLink(%q) = %+v, %v; want an error with an example", bad, l, err)
		}
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 14, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14})
	f.Add([]byte{0, 0, 0, 0})
	f.Add([]byte{255, 255, 255, 255, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		fr, err := readFrame(r)
		if err != nil {
			return
		}
		if want := data[:len(data)-r.Len()]; !bytes.Equal(fr, want) {
			t.Errorf("readFrame = %x; want the bytes it consumed %x", []byte(fr), want)
		}
	})
}

func FuzzParseLink(f *testing.F) {
	f.Add("10mbit,delay=5ms,loss=1%")
	f.Fuzz(func(t *testing.T, s string) {
		l, err := ParseLink(s)
		if err == nil && (l.Bandwidth < 0 || l.Delay < 0 || !(l.Loss >= 0 && l.Loss <= 1)) {
			t.Errorf("ParseLink(%q) = %+v", s, l)
		}
	})
}

var _ io.Closer = (*Endpoint)(nil)
