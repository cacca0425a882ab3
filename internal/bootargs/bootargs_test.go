package bootargs

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		name, line string
		want       Args
	}{
		{"nothing of ours", "quiet console=ttyS0 root=/dev/sda1", Args{Role: "node"}},
		{"a node", "quiet mosimg.head=https://10.77.0.1:4660 mosimg.ca=sha256:ab mosimg.nonce=n BOOTIF=01-52-54-00-AB-00-01\n",
			Args{Role: "node", Head: "https://10.77.0.1:4660", CA: "sha256:ab", Nonce: "n", BootMAC: "52:54:00:ab:00:01"}},
		{"a head", "mosimg.role=head mosimg.address=10.77.0.1/24 mosimg.state=/dev/vda mosimg.interface=eth0 mosimg.debug",
			Args{Role: "head", Address: "10.77.0.1/24", State: "/dev/vda", Interface: "eth0", Debug: true}},
		{"the last word wins", "mosimg.nonce=a mosimg.nonce=b", Args{Role: "node", Nonce: "b"}},
		{"debug turned off again", "mosimg.debug mosimg.debug=0", Args{Role: "node"}},
		{"BOOTIF without hardware type", "BOOTIF=52-54-00-ab-00-01", Args{Role: "node", BootMAC: "52:54:00:ab:00:01"}},
		{"broken BOOTIF", "BOOTIF=01-52-54", Args{Role: "node"}},
		{"words that only look like ours", "xmosimg.head=a mosimg.headx=b", Args{Role: "node"}},
	} {
		if diff := cmp.Diff(tc.want, Parse(tc.line)); diff != "" {
			t.Errorf("%s: Parse (-want +got):\n%s", tc.name, diff)
		}
	}
}

func TestWordsAreReadBackByParse(t *testing.T) {
	a := Args{Head: "https://10.77.0.1:4660", CA: "sha256:00", Nonce: "x", Image: "id", BootMAC: "52:54:00:00:00:01",
		Role: "head", Interface: "eth1", Address: "10.0.0.1/8", State: "/dev/vda", Debug: true}
	if diff := cmp.Diff(a, Parse(strings.Join(a.Words(), " "))); diff != "" {
		t.Errorf("Parse(Words) (-want +got):\n%s", diff)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("mosimg.head=a BOOTIF=01-52-54-00-00-00-01 mosimg.debug")
	f.Fuzz(func(t *testing.T, s string) {
		a := Parse(s)
		if b := Parse(strings.Join(a.Words(), " ")); a.BootMAC != b.BootMAC {
			t.Errorf("BOOTIF of %q: %q, read back %q", s, a.BootMAC, b.BootMAC)
		}
	})
}
