package decision

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDecide(t *testing.T) {
	const url, script = "http://10.77.0.1", "http://10.77.0.1/ipxe/52:54:00:00:00:01"
	full := map[string]bool{undionly: true, ipxePXE: true, snponly: true, ipxeEFI: true}
	allFeatures := []byte{FeatureHTTP, FeatureBzImage, FeatureEFI}
	toScript := Answer{Kind: Script, File: script, NoProxy: true}
	for _, tt := range []struct {
		name  string
		facts Facts
		boot  map[string]bool
		want  Answer
	}{
		{"a laptop that only wants an address", Facts{}, full, Answer{}},
		{"dhclient with a vendor class", Facts{Vendor: "MSFT 5.0"}, full, Answer{}},
		{"BIOS ROM", Facts{Arch: []uint16{0}, Vendor: "PXEClient:Arch:00000:UNDI:002001"}, full, Answer{Kind: TFTP, File: undionly}},
		{"BIOS ROM without option 93", Facts{Vendor: "PXEClient"}, full, Answer{Kind: TFTP, File: undionly}},
		{"BIOS ROM, set without undionly", Facts{Arch: []uint16{0}, Vendor: "PXEClient"}, map[string]bool{ipxePXE: true}, Answer{Kind: TFTP, File: ipxePXE}},
		{"UEFI x64", Facts{Arch: []uint16{7}, Vendor: "PXEClient:Arch:00007:UNDI:003016"}, full, Answer{Kind: TFTP, File: snponly}},
		{"UEFI x64 as EBC", Facts{Arch: []uint16{9}, Vendor: "PXEClient"}, full, Answer{Kind: TFTP, File: snponly}},
		{"UEFI with several codes, one known", Facts{Arch: []uint16{99, 7}, Vendor: "PXEClient"}, full, Answer{Kind: TFTP, File: snponly}},
		{"UEFI, set without snponly", Facts{Arch: []uint16{7}, Vendor: "PXEClient"}, map[string]bool{ipxeEFI: true}, Answer{Kind: TFTP, File: ipxeEFI}},
		{"UEFI HTTP boot", Facts{Arch: []uint16{16}, Vendor: "HTTPClient:Arch:00016:UNDI:003001"}, full, Answer{Kind: HTTP, File: url + "/boot/snponly.efi", Vendor: "HTTPClient"}},
		{"iPXE by user class", Facts{Arch: []uint16{0}, Vendor: "PXEClient", UserClass: "iPXE"}, full, toScript},
		{"iPXE by option 175 only (FlexBoot)", Facts{Arch: []uint16{0}, Vendor: "PXEClient", IPXE: true, Features: allFeatures}, full, toScript},
		{"iPXE on UEFI without bzImage", Facts{Arch: []uint16{7}, UserClass: "iPXE", IPXE: true, Features: []byte{FeatureHTTP, FeatureEFI}}, full, toScript},
		{"iPXE after UEFI HTTP boot", Facts{Arch: []uint16{16}, Vendor: "PXEClient", UserClass: "iPXE", IPXE: true}, full, toScript},
		{"iPXE ROM without HTTP", Facts{Arch: []uint16{0}, UserClass: "iPXE", IPXE: true, Features: []byte{FeatureBzImage}}, full, Answer{Kind: TFTP, File: ipxePXE, NoProxy: true}},
		{"iPXE ROM without bzImage", Facts{Arch: []uint16{0}, UserClass: "iPXE", IPXE: true, Features: []byte{FeatureHTTP}}, full, Answer{Kind: TFTP, File: ipxePXE, NoProxy: true}},
		{"iPXE on UEFI without HTTP", Facts{Arch: []uint16{7}, UserClass: "iPXE", IPXE: true, Features: []byte{FeatureEFI}}, full, Answer{Kind: TFTP, File: snponly, NoProxy: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := Decide(tt.facts, Server{Boot: tt.boot, URL: url, Script: script})
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("Decide (-want +got):\n%s", d)
			}
		})
	}
}

// A machine that cannot be booted must say why in the head's log, not hang.
func TestDecideRefuses(t *testing.T) {
	full := map[string]bool{undionly: true, ipxePXE: true, snponly: true, ipxeEFI: true}
	for _, tt := range []struct {
		name  string
		facts Facts
		boot  map[string]bool
		want  string
	}{
		{"32-bit UEFI", Facts{Arch: []uint16{6}, Vendor: "PXEClient"}, full, "32-bit UEFI"},
		{"arm64", Facts{Arch: []uint16{11}, Vendor: "PXEClient"}, full, "64-bit ARM"},
		{"arm64 iPXE", Facts{Arch: []uint16{11}, UserClass: "iPXE"}, full, "64-bit ARM"},
		{"arm64 HTTP", Facts{Arch: []uint16{19}, Vendor: "HTTPClient"}, full, "64-bit ARM"},
		{"HTTP boot with a PXE code", Facts{Arch: []uint16{7}, Vendor: "HTTPClient"}, full, "architecture"},
		{"HTTP boot without a code", Facts{Vendor: "HTTPClient"}, full, "architecture"},
		{"a code from the future", Facts{Arch: []uint16{4711}, Vendor: "PXEClient"}, full, "4711"},
		{"an i386 set has no UEFI loader", Facts{Arch: []uint16{7}, Vendor: "PXEClient"}, map[string]bool{undionly: true}, "snponly.efi"},
		{"old iPXE and no ipxe.pxe", Facts{Arch: []uint16{0}, UserClass: "iPXE", Features: []byte{1}}, map[string]bool{undionly: true}, "no HTTP"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := Decide(tt.facts, Server{Boot: tt.boot, URL: "http://h"})
			if got.Kind != Refused || got.File != "" || !strings.Contains(got.Reason, tt.want) {
				t.Errorf("Decide = %+v; want a refusal that says %q", got, tt.want)
			}
		})
	}
}
