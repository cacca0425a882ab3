package tftpd

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// pattern is n bytes in which no two blocks are alike.
func pattern(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// packets are a step's, as they go out.
func packets(t *transfer, do step) (out [][]byte) {
	if do.oack {
		out = append(out, oackPacket(t.answer))
	}
	for n := do.from; n != 0 && n <= do.to; n++ {
		out = append(out, append(appendDataHeader(nil, n), t.payload(n)...))
	}
	return out
}

func ackPacket(n int) []byte { return []byte{0, opAck, byte(n >> 8), byte(n)} }

// The bytes of whole transfers, as RFC 1350, 2347 and 7440 have them: a client
// that was written after those must be able to read them.
func TestGoldenTransfers(t *testing.T) {
	for _, tt := range []struct {
		name    string
		data    string
		request string
		acks    []int
		want    []string // packets in hex, "|" between the steps
	}{
		{"no options: blocks of 512 in lock-step", strings.Repeat("a", 513), "f\x00octet\x00", []int{1, 2},
			[]string{"00030001" + strings.Repeat("61", 512), "|", "0003000261", "|"}},
		{"a file of whole blocks ends with an empty one", "12345678", "f\x00octet\x00blksize\x008\x00", []int{0, 1, 2},
			[]string{"0006" + text("blksize", "8"), "|", "00030001" + text2("12345678"), "|", "00030002", "|"}},
		{"an empty file is one empty block", "", "f\x00octet\x00", []int{1}, []string{"00030001", "|"}},
		{"windows: 3 blocks for each ACK, the last window is short", "aaaaaaaabbbbbbbbccccccccdddddddd", "f\x00OCTET\x00BlkSize\x008\x00windowsize\x003\x00tsize\x000\x00timeout\x002\x00", []int{0, 3, 5},
			[]string{"0006" + text("blksize", "8", "windowsize", "3", "tsize", "32", "timeout", "2"), "|",
				"00030001" + text2("aaaaaaaa"), "00030002" + text2("bbbbbbbb"), "00030003" + text2("cccccccc"), "|",
				"00030004" + text2("dddddddd"), "00030005", "|"}},
		{"a client that misses block 2 of the window gets it and what follows", "aaaaaaaabbbbbbbbccccccccdddd", "f\x00octet\x00blksize\x008\x00windowsize\x003\x00", []int{0, 1, 4},
			[]string{"0006" + text("blksize", "8", "windowsize", "3"), "|",
				"00030001" + text2("aaaaaaaa"), "00030002" + text2("bbbbbbbb"), "00030003" + text2("cccccccc"), "|",
				"00030004" + text2("dddd"), "gap",
				"00030002" + text2("bbbbbbbb"), "00030003" + text2("cccccccc"), "00030004" + text2("dddd"), "|"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, ok := parseRequest([]byte("\x00\x01" + tt.request))
			if !ok {
				t.Fatal("the request is not read")
			}
			now := time.Unix(0, 0)
			x := newTransfer([]byte(tt.data), negotiate(r.opts, int64(len(tt.data)), maxBlock))
			do := x.start(now)
			var got []string
			for _, ack := range tt.acks {
				for _, p := range packets(x, do) {
					got = append(got, hex.EncodeToString(p))
				}
				got = append(got, "|")
				now = now.Add(time.Millisecond)
				do = x.packet(now, ackPacket(ack))
				if x.gap {
					for _, p := range packets(x, do) {
						got = append(got, hex.EncodeToString(p))
					}
					got = append(got, "gap")
					do = x.expire(x.due)
				}
			}
			if do.outcome != finished {
				t.Errorf("after the last ACK the outcome is %d; want finished", do.outcome)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("packets (-want +got):\n%s", d)
			}
		})
	}
}

// text is option names and values in hex, each with its NUL.
func text(words ...string) string { return text2(strings.Join(words, "\x00") + "\x00") }

func text2(s string) string { return hex.EncodeToString([]byte(s)) }

// What a client asks for is granted within its and our bounds, or left out of
// the answer; never is the transfer refused for it.
func TestNegotiate(t *testing.T) {
	for _, tt := range []struct {
		asked  string
		want   terms
		answer string
	}{
		{"", terms{block: 512, window: 1, timeout: time.Second}, ""},
		{"blksize 1468 tsize 0 windowsize 4", terms{block: 1468, window: 4, timeout: time.Second}, "blksize 1468 tsize 7000 windowsize 4"},
		{"blksize 65464 windowsize 65535", terms{block: 1468, window: 64, timeout: time.Second}, "blksize 1468 windowsize 64"},
		{"blksize 8 timeout 5", terms{block: 8, window: 1, timeout: 5 * time.Second}, "blksize 8 timeout 5"},
		{"blksize 7 windowsize 0 timeout 0", terms{block: 512, window: 1, timeout: time.Second}, ""},
		{"timeout 255 windowsize -1 blksize x", terms{block: 512, window: 1, timeout: time.Second}, ""},
		{"blksize 65465 windowsize 65536", terms{block: 512, window: 1, timeout: time.Second}, ""},
		{"blksize 99999999999999999999 multicast 1", terms{block: 512, window: 1, timeout: time.Second}, ""},
		{"blksize 512 blksize 1024", terms{block: 512, window: 1, timeout: time.Second}, "blksize 512"},
	} {
		t.Run(tt.asked, func(t *testing.T) {
			var asked []option
			words := strings.Fields(tt.asked)
			for i := 0; i+1 < len(words); i += 2 {
				asked = append(asked, option{words[i], words[i+1]})
			}
			got := negotiate(asked, 7000, maxBlock)
			var answer []string
			for _, o := range got.answer {
				answer = append(answer, o.name, o.value)
			}
			if a := strings.Join(answer, " "); a != tt.answer {
				t.Errorf("answer %q; want %q", a, tt.answer)
			}
			got.answer = nil
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(terms{})); d != "" {
				t.Errorf("terms (-want +got):\n%s", d)
			}
		})
	}
}

// A machine that was switched off is given up after half a minute, and the
// reason says how far it came.
func TestSilentClient(t *testing.T) {
	for _, tt := range []struct {
		name string
		acks []int
		want string
	}{
		{"from the beginning", nil, "never answered"},
		{"after the OACK", []int{0}, "blocks of 1468 bytes"},
		{"in the middle", []int{0, 4}, "after 4 of 8 blocks"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			now := time.Unix(0, 0)
			x := newTransfer(pattern(11000), terms{block: 1468, window: 4, timeout: time.Second, answer: []option{{"blksize", "1468"}}})
			do := x.start(now)
			for _, a := range tt.acks {
				do = x.packet(now, ackPacket(a))
			}
			var waits []int
			began := now
			for do.outcome == running {
				if len(packets(x, do)) == 0 {
					t.Fatal("it waits without having sent anything")
				}
				if early := x.expire(x.due.Add(-1)); early.outcome != running || early.oack || early.from != 0 {
					t.Fatal("it acts before the time is up")
				}
				waits = append(waits, int(x.due.Sub(now).Seconds()))
				now = x.due
				do = x.expire(now)
			}
			if d := cmp.Diff([]int{1, 2, 4, 8, 8, 8}, waits); d != "" {
				t.Errorf("waits in seconds (-want +got):\n%s", d)
			}
			if do.outcome != silent || !strings.Contains(do.err.Error(), tt.want) {
				t.Errorf("outcome %d, %v after %v; want silent and %q", do.outcome, do.err, now.Sub(began), tt.want)
			}
		})
	}
}

// One packet that the network doubles must not double all that follow it (the
// sorcerer's apprentice).
func TestDoubledAckIsNotAnswered(t *testing.T) {
	for _, window := range []int{1, 4} {
		now := time.Unix(0, 0)
		x := newTransfer(pattern(512*100), terms{block: 512, window: window, timeout: time.Second})
		x.start(now)
		for n := min(window, 1); n < 90; n = int(x.sent) {
			now = now.Add(10 * time.Millisecond)
			x.packet(now, ackPacket(n))
			if do := x.packet(now.Add(time.Millisecond), ackPacket(n)); do.from != 0 {
				t.Fatalf("window %d: the second ACK of block %d is answered with blocks %d to %d", window, n, do.from, do.to)
			}
		}
		if x.resent != 0 {
			t.Errorf("window %d: %d blocks were sent twice", window, x.resent)
		}
	}
}

// The request comes again: at once when the reply was lost, late as a
// duplicate, or because the machine was switched off and on.
func TestRequestAgain(t *testing.T) {
	now := time.Unix(0, 0)
	x := newTransfer(pattern(512*100), terms{block: 512, window: 4, timeout: time.Second, answer: []option{{"windowsize", "4"}}})
	x.start(now)
	if do := x.again(now.Add(100 * time.Millisecond)); !do.oack {
		t.Errorf("nothing was acknowledged yet: %+v; want the OACK again", do)
	}
	x.packet(now, ackPacket(0))
	now = now.Add(time.Millisecond)
	x.packet(now, ackPacket(4))
	if do := x.again(now.Add(10 * time.Millisecond)); do.oack || do.from != 0 || x.acked != 4 {
		t.Errorf("a late duplicate: %+v, %d blocks acknowledged; want nothing done", do, x.acked)
	}
	if do := x.again(now.Add(2 * time.Second)); !do.oack || x.acked != 0 || x.sent != 0 {
		t.Errorf("two seconds after the last ACK: %+v, %d acknowledged; want a new beginning", do, x.acked)
	}
}

// link is a network between a transfer and a client, in time of its own, that
// loses, doubles and reorders packets.
type link struct {
	rand                *rand.Rand
	now                 time.Time
	lose, double, delay float64 // probabilities
	flight              []flying
}

type flying struct {
	at       time.Time
	toServer bool
	p        []byte
}

func (l *link) send(toServer bool, p []byte) {
	if l.rand.Float64() < l.lose {
		return
	}
	for n := 0; n == 0 || n < 4 && l.rand.Float64() < l.double; n++ {
		late := time.Millisecond
		if l.rand.Float64() < l.delay {
			late += time.Duration(l.rand.IntN(20)) * time.Millisecond
		}
		at := len(l.flight)
		for at > 0 && l.flight[at-1].at.After(l.now.Add(late)) {
			at--
		}
		l.flight = append(l.flight[:at], append([]flying{{l.now.Add(late), toServer, bytes.Clone(p)}}, l.flight[at:]...)...)
	}
}

// client receives as RFC 7440 section 4 says: it acknowledges each window, and
// at once what comes out of order.
type client struct {
	link   *link
	terms  terms
	got    []byte
	last   uint16 // in order
	count  int    // since the last ACK
	done   bool
	silent time.Time // when it will repeat its last ACK
	oack   bool      // has come, or was not asked for
}

func (c *client) packet(p []byte) {
	switch opcode(p) {
	case opOACK:
		if len(c.got) == 0 && c.last == 0 {
			c.oack = true
			c.ack()
		}
	case opData:
		if !c.oack {
			return
		}
		n := uint16(p[2])<<8 | uint16(p[3])
		if n != c.last+1 {
			c.ack()
			return
		}
		c.last, c.count = n, c.count+1
		if !c.done {
			c.got = append(c.got, p[headerSize:]...)
		}
		c.done = c.done || len(p) < headerSize+c.terms.block
		if c.done || c.count == c.terms.window {
			c.ack()
		}
	}
}

func (c *client) ack() {
	c.count = 0
	c.silent = c.link.now.Add(1300 * time.Millisecond)
	c.link.send(true, ackPacket(int(c.last)))
}

// simulate carries a file over a link. It returns what the client got, the
// step that the server ended with, and the number of packets it sent.
func simulate(l *link, data []byte, tm terms) (c *client, last step, sent int) {
	x := newTransfer(data, tm)
	c = &client{link: l, terms: tm, oack: len(tm.answer) == 0, silent: l.now.Add(time.Hour)}
	do := x.start(l.now)
	for do.outcome == running {
		for _, p := range packets(x, do) {
			sent++
			l.send(false, p)
		}
		// What comes next: a packet, the server's time or the client's.
		next := x.due
		if c.silent.Before(next) && !c.done {
			next = c.silent
		}
		do = step{}
		switch {
		case len(l.flight) > 0 && !l.flight[0].at.After(next):
			f := l.flight[0]
			l.flight = l.flight[1:]
			l.now = f.at
			if f.toServer {
				do = x.packet(l.now, f.p)
			} else {
				c.packet(f.p)
			}
		case next.Equal(x.due):
			l.now = next
			do = x.expire(l.now)
		default:
			l.now = next
			c.ack()
		}
	}
	return c, do, sent
}

// On any network that lets something through the client gets the file as it is.
func TestBadNetworks(t *testing.T) {
	for _, tt := range []struct {
		name                string
		lose, double, delay float64
	}{
		{"good", 0, 0, 0},
		{"loses 5 %", 0.05, 0, 0},
		{"doubles 30 %", 0, 0.3, 0},
		{"reorders half", 0, 0, 0.5},
		{"all of it", 0.1, 0.1, 0.2},
	} {
		for _, window := range []int{1, 2, 4, 16, 64} {
			for _, size := range []int{0, 1, 1467, 1468, 200_000} {
				for seed := range uint64(5) {
					l := &link{rand: rand.New(rand.NewPCG(seed, 7)), now: time.Unix(0, 0), lose: tt.lose, double: tt.double, delay: tt.delay}
					tm := terms{block: 1468, window: window, timeout: time.Second}
					if seed%2 == 0 {
						tm.answer = []option{{"windowsize", fmt.Sprint(window)}}
					}
					data := pattern(size)
					c, last, sent := simulate(l, data, tm)
					what := fmt.Sprintf("a network that %s, window %d, %d bytes, seed %d", tt.name, window, size, seed)
					if !c.done || !bytes.Equal(c.got, data) {
						t.Fatalf("%s: the client has %d bytes, done %t; server: %d, %v", what, len(c.got), c.done, last.outcome, last.err)
					}
					blocks := size/tm.block + 1
					// Where nothing is lost, next to nothing is sent again.
					most := blocks + 1
					if tt.double > 0 && window > 1 {
						most = 2 * blocks
					}
					if tt.lose+tt.delay == 0 && sent > max(most, 4) {
						t.Errorf("%s: %d packets for %d blocks", what, sent, blocks)
					}
					// A lost last ACK ends in silence, after half a minute.
					if tt.lose == 0 && last.outcome != finished {
						t.Errorf("%s: outcome %d, %v; want finished", what, last.outcome, last.err)
					}
				}
			}
		}
	}
}

// With 5 % of the packets lost a boot loader still comes in seconds: windows
// must not make a lossy network worse than lock-step does.
func TestLossCostsLittle(t *testing.T) {
	took := func(window int) time.Duration {
		var all time.Duration
		for seed := range uint64(20) {
			l := &link{rand: rand.New(rand.NewPCG(seed, 1)), now: time.Unix(0, 0), lose: 0.05}
			c, _, _ := simulate(l, pattern(300_000), terms{block: 1468, window: window, timeout: time.Second})
			if !c.done {
				t.Fatalf("window %d, seed %d: not done", window, seed)
			}
			all += c.silent.Sub(time.Unix(0, 0)) // a constant later than the last ACK
		}
		return all / 20
	}
	lockstep := took(1)
	for _, window := range []int{4, 16, 64} {
		if d := took(window); d > lockstep {
			t.Errorf("window %d: %v on average; lock-step takes %v", window, d, lockstep)
		}
	}
}

// Block numbers begin again after 65535: files above 32 MB in blocks of 512.
func TestRollover(t *testing.T) {
	for _, window := range []int{1, 64} {
		l := &link{rand: rand.New(rand.NewPCG(3, 3)), now: time.Unix(0, 0), lose: 0.0005}
		data := pattern(8*2*65536 + 4)
		c, last, _ := simulate(l, data, terms{block: 8, window: window, timeout: time.Second})
		if !bytes.Equal(c.got, data) || last.outcome != finished {
			t.Errorf("window %d: %d of %d bytes, outcome %d", window, len(c.got), len(data), last.outcome)
		}
	}
}

// What a client closes its port on, and when that is a failure.
func TestPortClosed(t *testing.T) {
	now := time.Unix(0, 0)
	x := newTransfer(pattern(1000), terms{block: 512, window: 1, timeout: time.Second})
	x.start(now)
	if do := x.gone(); do.outcome != aborted {
		t.Errorf("before anything was acknowledged: outcome %d; want aborted", do.outcome)
	}
	x.packet(now, ackPacket(1))
	if do := x.gone(); do.outcome != finished {
		t.Errorf("after the last block: outcome %d; want finished, only the ACK was lost", do.outcome)
	}
}
