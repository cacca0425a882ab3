package radv

import (
	"strings"
	"testing"
)

func TestSolicitor(t *testing.T) {
	ipxe := []byte{133, 0, 0x12, 0x34, 0, 0, 0, 0, 1, 1, 0x52, 0x54, 0, 0x77, 1, 1}
	for _, tc := range []struct {
		name string
		msg  []byte
		hops int
		want string
		err  string
	}{
		{"as iPXE sends it", ipxe, 255, "52:54:00:77:01:01", ""},
		{"after another option", append([]byte{133, 0, 0, 0, 0, 0, 0, 0, 14, 1, 1, 2, 3, 4, 5, 6}, ipxe[8:]...), 255, "52:54:00:77:01:01", ""},
		{"from behind a router", ipxe, 64, "", "hop limit"},
		{"without a MAC", ipxe[:8], 255, "", "MAC"},
		{"an advertisement", append([]byte{134}, ipxe[1:]...), 255, "", "not a router solicitation"},
		{"cut off", ipxe[:12], 255, "", "broken option"},
		{"option of length zero", append(append([]byte{}, ipxe[:8]...), 1, 0, 1, 2, 3, 4, 5, 6), 255, "", "broken option"},
		{"empty", nil, 255, "", "not a router solicitation"},
	} {
		got, err := solicitor(tc.msg, tc.hops)
		if got != tc.want || (tc.err == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: solicitor = %q, %v; want %q, %q", tc.name, got, err, tc.want, tc.err)
		}
	}
}

func FuzzSolicitor(f *testing.F) {
	f.Add([]byte{133, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0x52, 0x54, 0, 0x77, 1, 1}, 255)
	f.Fuzz(func(_ *testing.T, b []byte, hops int) { solicitor(b, hops) })
}
