package tftpd

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"
)

// Whatever comes to the server's port is read or dropped.
func FuzzParseRequest(f *testing.F) {
	f.Add(rrq("snponly.efi", "tsize", "0", "blksize", "1468", "windowsize", "4"))
	f.Add([]byte("\x00\x02f\x00octet\x00"))
	f.Add([]byte("\x00\x01f\x00octet\x00blksize"))
	f.Add([]byte("\x00\x01\x00\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		r, ok := parseRequest(p)
		if !ok {
			return
		}
		if r.name == "" || len(r.name) > len(p) {
			t.Errorf("name %q of %q", r.name, p)
		}
		terms := negotiate(r.opts, 1000, maxBlock)
		if terms.block < minBlock || terms.block > maxBlock || terms.window < 1 || terms.window > maxWindow || terms.timeout < time.Second || terms.timeout > maxTimeout*time.Second {
			t.Errorf("%q is granted %+v", p, terms)
		}
		if n := len(oackPacket(terms.answer)); n > 128 {
			t.Errorf("the answer to %q has %d bytes", p, n)
		}
		// What was read and is written again is read the same.
		again := []byte{0, opRRQ}
		for _, s := range []string{r.name, r.mode} {
			again = append(append(again, s...), 0)
		}
		for _, o := range r.opts {
			again = append(append(append(append(again, o.name...), 0), o.value...), 0)
		}
		if r2, ok := parseRequest(again); !ok || r2.name != r.name || r2.mode != r.mode || len(r2.opts) != len(r.opts) {
			t.Errorf("%q is read as %+v, and that as %+v", p, r, r2)
		}
	})
}

// A client may send anything at any time: the server never sends what is not
// in the file or more than the window, and does not claim success before all
// was acknowledged.
func FuzzTransfer(f *testing.F) {
	f.Add(uint16(5000), uint8(4), []byte{0, 0, 0, 10, 4, 0, 10, 4, 0, 1, 0xff, 0xff})
	f.Add(uint16(0), uint8(1), []byte{5, 1, 0, 200, 0, 0})
	f.Fuzz(func(t *testing.T, size uint16, window uint8, script []byte) {
		data := pattern(int(size))
		tm := negotiate([]option{{"blksize", "64"}, {"windowsize", string(rune('0' + window%10))}}, int64(size), maxBlock)
		if window&1 == 1 {
			tm.answer = nil
		}
		x := newTransfer(data, tm)
		now := time.Unix(0, 0)
		check := func(do step) {
			t.Helper()
			ps := packets(x, do)
			if len(ps) > x.window+1 {
				t.Fatalf("%d packets at once with a window of %d", len(ps), x.window)
			}
			for i, p := range ps {
				if opcode(p) == opData && !bytes.Equal(p[headerSize:], x.payload(do.from+uint64(i))) {
					t.Fatalf("packet %d is not block %d", i, do.from)
				}
			}
			if x.acked > x.sent || x.sent > x.blocks || x.sent-x.acked > uint64(x.window) {
				t.Fatalf("acked %d, sent %d, window %d, of %d blocks", x.acked, x.sent, x.window, x.blocks)
			}
			if do.outcome == finished && x.acked != x.blocks {
				t.Fatalf("finished with %d of %d blocks", x.acked, x.blocks)
			}
			if !x.due.After(now) && do.outcome == running {
				t.Fatal("the time for the next step has passed already")
			}
		}
		do := x.start(now)
		check(do)
		for ; len(script) >= 3 && do.outcome == running; script = script[3:] {
			switch script[0] % 8 {
			case 0:
				now = x.due
				do = x.expire(now)
			case 1:
				do = x.again(now)
			case 2:
				do = x.packet(now, script[1:])
			case 3:
				now = now.Add(time.Duration(script[1]) * time.Millisecond)
				do = step{}
				if !now.Before(x.due) {
					do = x.expire(now)
				}
			default:
				p := binary.BigEndian.AppendUint16([]byte{0, opAck}, binary.BigEndian.Uint16(script[1:])%512)
				do = x.packet(now, p)
			}
			check(do)
		}
	})
}
