package wire

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

// The kernel's sizes, from include/uapi/linux/fuse.h: a field too few here
// would shift everything behind it.
func TestStructuresHaveTheKernelsSizes(t *testing.T) {
	for _, tc := range []struct {
		name      string
		got, want uintptr
	}{
		{"in_header", unsafe.Sizeof(InHeader{}), 40},
		{"out_header", unsafe.Sizeof(OutHeader{}), 16},
		{"attr", unsafe.Sizeof(Attr{}), 88},
		{"entry_out", unsafe.Sizeof(EntryOut{}), 128},
		{"attr_out", unsafe.Sizeof(AttrOut{}), 104},
		{"init_in", unsafe.Sizeof(InitIn{}) + unsafe.Sizeof(InitExtIn{}), 64},
		{"init_out", unsafe.Sizeof(InitOut{}), 64},
		{"getattr_in", unsafe.Sizeof(GetattrIn{}), 16},
		{"setattr_in", unsafe.Sizeof(SetattrIn{}), 88},
		{"mknod_in", unsafe.Sizeof(MknodIn{}), 16},
		{"rename2_in", unsafe.Sizeof(Rename2In{}), 16},
		{"create_in", unsafe.Sizeof(CreateIn{}), 16},
		{"open_out", unsafe.Sizeof(OpenOut{}), 16},
		{"release_in", unsafe.Sizeof(ReleaseIn{}), 24},
		{"flush_in", unsafe.Sizeof(FlushIn{}), 24},
		{"read_in", unsafe.Sizeof(ReadIn{}), 40},
		{"write_in", unsafe.Sizeof(WriteIn{}), 40},
		{"statfs_out", unsafe.Sizeof(StatfsOut{}), 80},
		{"fsync_in", unsafe.Sizeof(FsyncIn{}), 16},
		{"lk_in", unsafe.Sizeof(LkIn{}), 48},
		{"fallocate_in", unsafe.Sizeof(FallocateIn{}), 32},
		{"lseek_in", unsafe.Sizeof(LseekIn{}), 24},
		{"copy_file_range_in", unsafe.Sizeof(CopyFileRangeIn{}), 56},
		{"dirent", unsafe.Sizeof(Dirent{}), 24},
	} {
		if tc.got != tc.want {
			t.Errorf("fuse_%s has %d bytes here; want %d", tc.name, tc.got, tc.want)
		}
	}
}

func TestGreetingsSurviveTheWire(t *testing.T) {
	want := Hello{Capsule: "job-7", Session: SessionID{1, 2, 3}, Epoch: 1 << 40}
	frame := AppendFrame(nil, KindHello, 99, want.Append(nil))
	h, body, err := ReadFrame(bytes.NewReader(frame), MaxGreeting)
	if err != nil || h.Kind != KindHello || h.Ack != 99 {
		t.Fatalf("ReadFrame = %+v, %v", h, err)
	}
	got, err := ParseHello(body)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	no := Refused{RefuseLost, strings.Repeat("x", 5000)}
	parsed, err := ParseRefused(no.Append(nil))
	if err != nil || parsed.Reason != RefuseLost || len(parsed.Text) != MaxGreeting-4 {
		t.Errorf("refusal: %v %d %v", parsed.Reason, len(parsed.Text), err)
	}
}

func TestBadGreetingsAreRefused(t *testing.T) {
	good := Hello{Capsule: "j", Epoch: 1}.Append(nil)
	with := func(at int, b byte) []byte { c := bytes.Clone(good); c[at] = b; return c }
	for _, tc := range []struct {
		name string
		body []byte
	}{
		{"empty", nil},
		{"short", good[:20]},
		{"not ours", with(0, 'X')},
		{"another version", with(3, Version+1)},
		{"name longer than the body", with(4, 2)},
		{"no name", Hello{}.Append(nil)},
		{"long name", Hello{Capsule: strings.Repeat("n", MaxCapsule+1)}.Append(nil)},
	} {
		if h, err := ParseHello(tc.body); err == nil {
			t.Errorf("%s: ParseHello = %+v; want an error", tc.name, h)
		}
	}
	if _, err := ParseHello(with(3, 9)); !errors.Is(err, ErrVersion) {
		t.Errorf("another version: %v; want ErrVersion", err)
	}
}

func TestBadHeadersAreRefused(t *testing.T) {
	for _, tc := range []struct {
		name string
		h    Header
	}{
		{"too long", Header{Length: MaxBody + 1, Kind: KindRequest, Seq: 1}},
		{"kind 0", Header{}},
		{"unknown kind", Header{Kind: KindGone + 1}},
		{"request without a number", Header{Kind: KindRequest}},
		{"numbered ack", Header{Kind: KindAck, Seq: 1}},
	} {
		var b [HeaderSize]byte
		tc.h.Put(b[:])
		if _, err := ParseHeader(b[:]); err == nil {
			t.Errorf("%s is accepted", tc.name)
		}
	}
}

func FuzzHeader(f *testing.F) {
	var b [HeaderSize]byte
	Header{Length: 5, Kind: KindReply, Flags: 1, Seq: 7, Ack: 9}.Put(b[:])
	f.Add(b[:])
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			return
		}
		var again [HeaderSize]byte
		h.Put(again[:])
		if !bytes.Equal(again[:], b[:HeaderSize]) {
			t.Errorf("%x is read as %+v, which is written as %x", b[:HeaderSize], h, again)
		}
	})
}

func FuzzHello(f *testing.F) {
	f.Add(Hello{Capsule: "job", Epoch: 3}.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := ParseHello(b); err == nil && !bytes.Equal(h.Append(nil), b) {
			t.Errorf("%x is not what %+v is written as", b, h)
		}
		_, _ = ParseRefused(b)
	})
}

func FuzzMessages(f *testing.F) {
	f.Add(Reply(7, 2, []byte("body")))
	f.Add(NotifyEntry(1, "name"))
	h := InHeader{Len: 44, Opcode: OpLookup, Unique: 2, NodeID: 1}
	f.Add(append(bytes.Clone(Bytes(&h)), "abc\x00"...))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, body, err := ParseRequest(b); err == nil {
			if len(body)+InHeaderSize != len(b) {
				t.Errorf("body of %d in %d bytes, %+v", len(body), len(b), h)
			}
			if n, rest, ok := Name(body); ok && len(n)+1+len(rest) != len(body) {
				t.Errorf("name %q and %d bytes of %d", n, len(rest), len(body))
			}
			if _, rest, ok := As[SetattrIn](body); ok && len(rest) > len(body) {
				t.Error("As gives more than there was")
			}
		}
		_, _, _ = ParseReply(b)
		if len(b) > 3 { // not aligned
			_, _, _ = As[WriteIn](b[3:])
		}
	})
}
