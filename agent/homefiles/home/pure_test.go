package home

import (
	"encoding/binary"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// Some sequences of fcntl locks with what must be held afterwards.
func TestRangeSetReplacesAndMerges(t *testing.T) {
	for _, tc := range []struct {
		name string
		set  []lockRange
		want rangeSet
	}{
		{"one", []lockRange{{5, 9, writeLock}}, rangeSet{{5, 9, writeLock}}},
		{"beside", []lockRange{{5, 9, 1}, {10, 20, 1}, {0, 4, 1}}, rangeSet{{0, 20, 1}}},
		{"apart", []lockRange{{10, 20, 0}, {0, 3, 0}}, rangeSet{{0, 3, 0}, {10, 20, 0}}},
		{"hole", []lockRange{{0, 20, 1}, {5, 9, unlock}}, rangeSet{{0, 4, 1}, {10, 20, 1}}},
		{"downgrade of the middle", []lockRange{{0, 20, 1}, {5, 9, 0}}, rangeSet{{0, 4, 1}, {5, 9, 0}, {10, 20, 1}}},
		{"cover several", []lockRange{{0, 1, 1}, {4, 5, 0}, {8, 9, 1}, {1, 8, 0}}, rangeSet{{0, 0, 1}, {1, 8, 0}, {9, 9, 1}}},
		{"to the end", []lockRange{{0, endOfFile, 1}, {100, endOfFile, unlock}}, rangeSet{{0, 99, 1}}},
		{"unlock all", []lockRange{{3, 5, 1}, {7, 9, 0}, {0, endOfFile, unlock}}, nil},
		{"unlock none", []lockRange{{3, 5, unlock}}, nil},
	} {
		var got rangeSet
		for _, r := range tc.set {
			got = got.set(r)
		}
		if diff := cmp.Diff(tc.want, got, cmp.AllowUnexported(lockRange{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tc.name, diff)
		}
	}
}

// Any sequence: compared byte by byte with the plainest model.
func FuzzRangeSet(f *testing.F) {
	f.Add([]byte{0, 9, 1, 3, 5, 2, 4, 8, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var model [256]byte // 0 nothing, else type+1
		var got rangeSet
		for ; len(b) >= 3; b = b[3:] {
			r := lockRange{uint64(min(b[0], b[1])), uint64(max(b[0], b[1])), uint32(b[2] % 3)}
			got = got.set(r)
			for i := r.start; i <= r.end; i++ {
				model[i] = byte(r.typ+1) % 3
			}
		}
		var held [256]byte
		for i, r := range got {
			if r.start > r.end || i > 0 && got[i-1].end >= r.start {
				t.Fatalf("ranges out of order: %v", got)
			}
			for j := r.start; j <= r.end; j++ {
				held[j] = byte(r.typ + 1)
			}
		}
		if held != model {
			t.Errorf("%v is not what was set", got)
		}
	})
}

func FuzzDirent(f *testing.F) {
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err == nil {
		b := make([]byte, 4096)
		if n, err := unix.Getdents(fd, b); err == nil {
			f.Add(b[:n])
		}
		unix.Close(fd)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			e, rest, err := parseDirent(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) || len(e.name) > len(b) {
				t.Fatal("no progress")
			}
			b = rest
		}
	})
}

func FuzzEvent(f *testing.F) {
	ev := make([]byte, 24+4+8+8+8+8)
	binary.NativeEndian.PutUint32(ev, uint32(len(ev)))
	binary.NativeEndian.PutUint16(ev[6:], 24)
	ev[24] = infoDFIDName
	binary.NativeEndian.PutUint16(ev[26:], uint16(len(ev)-24))
	binary.NativeEndian.PutUint32(ev[36:], 8)
	copy(ev[52:], "name")
	f.Add(ev)
	f.Fuzz(func(t *testing.T, b []byte) {
		for len(b) > 0 {
			_, rest, err := parseEvent(b)
			if err != nil {
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("no progress")
			}
			b = rest
		}
	})
}

func TestCallerIsOneOfTheCapsules(t *testing.T) {
	c := &capsule{Capsule: Capsule{Users: []Cred{{UID: 1000, GID: 100, Groups: []uint32{7}}, {UID: 5, GID: 5}}}, users: map[uint32]*Cred{}}
	for i := range c.Users {
		c.users[c.Users[i].UID] = &c.Users[i]
	}
	for _, tc := range []struct {
		uid, gid uint32
		wantUID  uint32
		refused  bool
	}{
		{1000, 100, 1000, false},
		{1000, 7, 1000, false},
		{1000, 0, 0, true},
		{5, 5, 5, false},
		{6, 5, 0, true},
		{0, 0, 1000, false}, // the node's root is the owner
		{^uint32(0), ^uint32(0), 1000, false},
	} {
		got, err := c.caller(tc.uid, tc.gid)
		if (err != nil) != tc.refused || err == nil && got.uid != tc.wantUID {
			t.Errorf("caller(%d, %d) = %+v, %v; want uid %d, refused %v", tc.uid, tc.gid, got, err, tc.wantUID, tc.refused)
		}
	}
}

func TestNamesThatLeadOutAreRefused(t *testing.T) {
	for _, n := range []string{"", ".", "..", "/", "a/b", "../x", "x/"} {
		if validName(n) == nil {
			t.Errorf("name %q is accepted", n)
		}
	}
	for _, n := range []string{"a", "...", "..a", " ", "a\nb", string(os.PathListSeparator)} {
		if err := validName(n); err != nil {
			t.Errorf("name %q: %v", n, err)
		}
	}
}
