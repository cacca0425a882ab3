package debian

import (
	"os/exec"
	"strings"
	"testing"
)

// A wrong order here makes the builder ship an old kernel, or refuse one that
// satisfies a dependency.
func TestCompareVersions(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want int
	}{
		{"1", "1", 0},
		{"1", "2", -1},
		{"6.12.107-1", "6.12.96-1", 1},
		{"6.12.115-2", "6.12.115-1", 1},
		{"6.12.9", "6.12.10", -1},
		{"1:1", "2", 1},
		{"0:1", "1", 0},
		{"1.0~rc1", "1.0", -1},
		{"1.0~~", "1.0~", -1},
		{"1.0~", "1.0", -1},
		{"3.13.5-1~", "3.13.5-1", -1},
		{"1.0+b1", "1.0", 1},
		{"1.0a", "1.0+", -1},
		{"1.0a", "1.0b", -1},
		{"1.0Z", "1.0a", -1},
		{"1.0-1", "1.0-1.1", -1},
		{"1.0", "1.0-0", 0},
		{"1.0", "1.0-1", -1},
		{"1.01", "1.1", 0},
		{"1-2-3", "1-2-4", -1},
		{"20250501123456789012345", "20250501123456789012344", 1},
		{"2.41-12+deb13u1", "2.41-12", 1},
		{"1.21.1+git20250501.dad20602+dfsg-1", "1.21.1+git20250501.dad20602-1", 1},
		{"", "", 0},
		{"", "1", -1},
	} {
		if got := CompareVersions(tc.a, tc.b); got != tc.want {
			t.Errorf("CompareVersions(%q, %q) = %d; want %d", tc.a, tc.b, got, tc.want)
		}
		if got := CompareVersions(tc.b, tc.a); got != -tc.want {
			t.Errorf("CompareVersions(%q, %q) = %d; want %d", tc.b, tc.a, got, -tc.want)
		}
	}
}

// dpkg is the oracle: whatever it thinks of two versions, we think too.
func TestCompareVersionsAgreesWithDpkg(t *testing.T) {
	dpkg, err := exec.LookPath("dpkg")
	if err != nil {
		t.Skip("dpkg is not installed")
	}
	versions := strings.Fields("1 1.0 1.0-1 1.0~rc1-1 1:0.1 1.0+dfsg-1 1.0a 1.00 2~ 2~~a 2~~ 6.12.117+deb13 0.9.9-1+b2 1.0-1~bpo12+1")
	for _, a := range versions {
		for _, b := range versions {
			got := CompareVersions(a, b)
			op := map[int]string{-1: "lt", 0: "eq", 1: "gt"}[got]
			if exec.Command(dpkg, "--compare-versions", a, op, b).Run() != nil {
				t.Errorf("CompareVersions(%q, %q) = %d; dpkg disagrees", a, b, got)
			}
		}
	}
}

func FuzzCompareVersions(f *testing.F) {
	f.Add("1:1.0-1", "1.0~rc1")
	f.Add("~", "")
	f.Add(":::---", "0")
	f.Fuzz(func(t *testing.T, a, b string) {
		if x, y := CompareVersions(a, b), CompareVersions(b, a); x != -y {
			t.Errorf("CompareVersions(%q, %q) = %d, swapped %d", a, b, x, y)
		}
		if CompareVersions(a, a) != 0 {
			t.Errorf("CompareVersions(%q, itself) is not 0", a)
		}
	})
}
