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
			got := Decide(tt.facts, Head{Boot: tt.boot, URL: url, Script: script})
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
		{"ia32 HTTP", Facts{Arch: []uint16{15}, Vendor: "HTTPClient"}, full, "32-bit UEFI"},
		{"Raspberry Pi's ROM, which says BIOS", Facts{MAC: "dc:a6:32:01:02:03", Arch: []uint16{0}, Vendor: "PXEClient:Arch:00000:UNDI:002001"}, full, "Raspberry Pi"},
		{"Raspberry Pi by its own code", Facts{Arch: []uint16{41}, Vendor: "PXEClient"}, full, "Raspberry Pi"},
		{"U-Boot", Facts{Arch: []uint16{0x16}, Vendor: "U-Boot.armv8"}, full, "U-Boot"},
		{"U-Boot that says PXEClient", Facts{Arch: []uint16{0x16}, Vendor: "PXEClient"}, full, "64-bit ARM U-Boot"},
		{"old iPXE and no ipxe.pxe", Facts{Arch: []uint16{0}, UserClass: "iPXE", Features: []byte{1}}, map[string]bool{undionly: true}, "no HTTP"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, mode := range []Mode{Server, Proxy} {
				got := Decide(tt.facts, Head{Mode: mode, Boot: tt.boot, URL: "http://h"})
				if got.Kind != Refused || got.File != "" || !strings.Contains(got.Reason, tt.want) {
					t.Errorf("%v: Decide = %+v; want a refusal that says %q", mode, got, tt.want)
				}
			}
		})
	}
}

// In somebody else's network the firmware wants other words for the same file.
func TestDecideProxy(t *testing.T) {
	const url, script = "http://10.77.0.1", "http://10.77.0.1/ipxe/52:54:00:00:00:01"
	full := map[string]bool{undionly: true, ipxePXE: true, snponly: true, ipxeEFI: true}
	old := []byte{FeatureEFI}
	for _, tt := range []struct {
		name     string
		facts    Facts
		stranger bool
		want     Answer
	}{
		{"a laptop that only wants an address", Facts{}, false, Answer{}},
		{"BIOS: no discovery, boot the file", Facts{Arch: []uint16{0}, Vendor: "PXEClient:Arch:00000:UNDI:002001"}, false,
			Answer{Kind: TFTP, File: undionly, Vendor: "PXEClient", Direct: true}},
		{"UEFI: no option 43", Facts{Arch: []uint16{7}, Vendor: "PXEClient:Arch:00007:UNDI:003016"}, false,
			Answer{Kind: TFTP, File: snponly, Vendor: "PXEClient"}},
		{"UEFI HTTP boot", Facts{Arch: []uint16{16}, Vendor: "HTTPClient:Arch:00016:UNDI:003001"}, false,
			Answer{Kind: HTTP, File: url + "/boot/snponly.efi", Vendor: "HTTPClient"}},
		{"iPXE that was asked to join", Facts{Arch: []uint16{0}, Vendor: "PXEClient", UserClass: "iPXE"}, false,
			Answer{Kind: Script, File: script, Vendor: "PXEClient"}},
		{"iPXE of a stranger", Facts{Arch: []uint16{0}, Vendor: "PXEClient", UserClass: "iPXE"}, true,
			Answer{Kind: Local, File: script, Vendor: "PXEClient"}},
		{"a stranger's ROM gets iPXE, which can wait 3 s and leave", Facts{Arch: []uint16{0}, Vendor: "PXEClient"}, true,
			Answer{Kind: TFTP, File: undionly, Vendor: "PXEClient", Direct: true}},
		{"iPXE ROM without HTTP, BIOS", Facts{Arch: []uint16{0}, UserClass: "iPXE", Features: []byte{FeatureBzImage}}, false,
			Answer{Kind: TFTP, File: ipxePXE, Vendor: "PXEClient", Direct: true}},
		{"iPXE ROM without HTTP, UEFI", Facts{Arch: []uint16{7}, UserClass: "iPXE", Features: old}, false,
			Answer{Kind: TFTP, File: snponly, Vendor: "PXEClient"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := Decide(tt.facts, Head{Mode: Proxy, Stranger: tt.stranger, Boot: full, URL: url, Script: script})
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("Decide (-want +got):\n%s", d)
			}
		})
	}
}

// A machine that follows every answer gets to its script: nothing is handed
// out twice. Debian's iPXE has HTTP and bzImage.
func TestNoLoop(t *testing.T) {
	full := map[string]bool{undionly: true, ipxePXE: true, snponly: true, ipxeEFI: true}
	for _, mode := range []Mode{Server, Proxy} {
		for _, first := range []Facts{
			{Vendor: "PXEClient"},
			{Vendor: "PXEClient", Arch: []uint16{0}},
			{Vendor: "PXEClient", Arch: []uint16{7}},
			{Vendor: "PXEClient", Arch: []uint16{9}},
			{Vendor: "HTTPClient", Arch: []uint16{16}},
			{Vendor: "PXEClient", Arch: []uint16{0}, IPXE: true, Features: []byte{FeatureBzImage}},
			{Vendor: "PXEClient", Arch: []uint16{7}, IPXE: true, Features: []byte{FeatureEFI}},
		} {
			f := first
			given := map[string]bool{}
			for step := 0; ; step++ {
				a := Decide(f, Head{Mode: mode, Boot: full, URL: "http://h", Script: "http://h/ipxe/m"})
				if a.Kind == Script {
					break
				}
				if a.File == "" || given[a.File] || step > 2 {
					t.Errorf("%v mode, %+v: step %d is %+v after %v", mode, first, step, a, given)
					break
				}
				given[a.File] = true
				f.IPXE, f.UserClass, f.Vendor = true, "iPXE", "PXEClient"
				f.Features = []byte{FeatureHTTP, FeatureBzImage, FeatureEFI}
			}
		}
	}
}
