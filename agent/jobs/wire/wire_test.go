package wire

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// What one side says the other side must hear, however the bytes are cut.
func TestMessages(t *testing.T) {
	var b bytes.Buffer
	hello := Hello{Stdout: 1 << 40, Stderr: 7}
	piece := bytes.Repeat([]byte("\x00\xff"), MaxData/2)
	for _, err := range []error{
		WriteJSON(&b, KindHello, hello),
		WriteData(&b, KindStdin, 5, piece),
		WriteData(&b, KindStdout, 9, nil),
		WriteAck(&b, KindStderr, Closed),
		WriteOffset(&b, KindStdinTaken, 1<<63),
		Write(&b, KindStop, nil),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	r := iotest.OneByteReader(&b)
	next := func(kind Kind) Message {
		t.Helper()
		m, err := Read(r)
		if err != nil || m.Kind != kind {
			t.Fatalf("Read = kind %d, %v; want kind %d", m.Kind, err, kind)
		}
		return m
	}
	var gotHello Hello
	if err := next(KindHello).JSON(&gotHello); err != nil || gotHello != hello {
		t.Errorf("hello = %+v, %v; want %+v", gotHello, err, hello)
	}
	if at, data, err := next(KindStdin).Data(); at != 5 || !bytes.Equal(data, piece) || err != nil {
		t.Errorf("Data = %d, %d bytes, %v; want 5 and %d bytes", at, len(data), err, len(piece))
	}
	if at, data, err := next(KindStdout).Data(); at != 9 || len(data) != 0 || err != nil {
		t.Errorf("end of stdout = %d, %q, %v; want 9 and nothing", at, data, err)
	}
	if stream, at, err := next(KindAck).Ack(); stream != KindStderr || at != Closed || err != nil {
		t.Errorf("Ack = %d, %d, %v; want stderr and Closed", stream, at, err)
	}
	if at, err := next(KindStdinTaken).Offset(); at != 1<<63 || err != nil {
		t.Errorf("Offset = %d, %v; want 2^63", at, err)
	}
	if m := next(KindStop); len(m.Body) != 0 {
		t.Errorf("stop has a body: %q", m.Body)
	}
	if _, err := Read(r); !errors.Is(err, io.EOF) {
		t.Errorf("Read at the end = %v; want EOF", err)
	}
}

// A peer of another version or a broken one is refused; it neither crashes us
// nor makes us allocate what it says.
func TestBadMessages(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{
		{"endless", "\x10\xff\xff\xff\xff", "is the most"},
		{"cut in the head", "\x10\x00\x00", "unexpected EOF"},
		{"cut after the head", "\x10\x00\x00\x00\x01", "unexpected EOF"},
		{"cut in the body", "\x10\x00\x00\x00\x02a", "unexpected EOF"},
	} {
		if _, err := Read(strings.NewReader(tc.in)); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v; want an error with %q", tc.name, err, tc.want)
		}
	}
	short := Message{Kind: KindAck, Body: []byte{1, 2}}
	_, _, e1 := short.Data()
	_, _, e2 := short.Ack()
	_, e3 := short.Offset()
	e4 := short.JSON(&Hello{})
	for i, err := range []error{e1, e2, e3, e4} {
		if err == nil {
			t.Errorf("reading %d of a short body gives no error", i)
		}
	}
	if err := Write(io.Discard, KindStdin, make([]byte, MaxBody+1)); err == nil {
		t.Error("Write takes a body that Read refuses")
	}
}

// FuzzRead: whatever arrives is refused, or is a message that is written as it came.
func FuzzRead(f *testing.F) {
	var b bytes.Buffer
	_ = WriteJSON(&b, KindEnded, End{Exit: 3, Signal: 9, Lost: "x"})
	f.Add(b.Bytes())
	f.Add([]byte("\x10\x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00\x01a"))
	f.Add([]byte("\x03\x00\x00\x00\x09\x10\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		for {
			before := len(in) - r.Len()
			m, err := Read(r)
			if err != nil {
				if errors.Is(err, io.EOF) && r.Len() != 0 {
					t.Fatalf("EOF with %d bytes left", r.Len())
				}
				return
			}
			var out bytes.Buffer
			if err := Write(&out, m.Kind, m.Body); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(in[before:len(in)-r.Len()], out.Bytes()); d != "" {
				t.Fatalf("read and written is another message (-want +got):\n%s", d)
			}
			_, data, err := m.Data()
			if err == nil && len(data)+8 != len(m.Body) {
				t.Fatalf("Data of %d bytes gives %d", len(m.Body), len(data))
			}
			_, _, _ = m.Ack()
			_, _ = m.Offset()
			var h Hello
			var s Signal
			var e End
			_, _, _ = m.JSON(&h), m.JSON(&s), m.JSON(&e)
		}
	})
}
