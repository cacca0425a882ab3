// Package decision answers one question: what should a machine that asks over
// DHCP boot next? It is a pure function from what the request says to a boot
// file name or URL, so that every firmware quirk is one row of its test.
//
// There are two tables. In server mode the head leases the address too, and
// EDK2 and BIOS ROMs boot straight from the offer only if it carries neither
// option 60 nor 43: with option 60 alone EDK2 asks port 4011 a second time and
// hangs when nobody answers. In proxy mode another server leases and we add
// boot data only: then an offer without option 60 is dropped, a BIOS ROM wants
// option 43 to say "no discovery, boot the file", and EDK2 must not see option
// 43 and asks port 4011, where it gets the same again (edk2 PxeBcDhcp4.c,
// PxeBcParseDhcp4Packet; dnsmasq rfc2131.c). UEFI HTTP boot ignores any offer
// without option 60 = "HTTPClient".
//
// No answer leads in a circle. iPXE is told by its user class or by option 175
// and gets its script; only a build without HTTP gets a loader once more, one
// that has it.
package decision

import (
	"fmt"
	"slices"
	"strings"
)

// Mode is who leases the addresses on a network.
type Mode int

const (
	// Server: the head does.
	Server Mode = iota
	// Proxy: another DHCP server does, and the head adds what to boot. It is
	// also how port 4011 is answered, whoever leases.
	Proxy
)

func (m Mode) String() string {
	if m == Proxy {
		return "proxy"
	}
	return "server"
}

// Facts are what a DHCP request says about the client. The zero value is a
// client that does not netboot.
type Facts struct {
	// MAC is the client's, lower case with colons.
	MAC string
	// Arch are the codes of option 93 (RFC 4578 and its registry), in
	// order; empty when the option is absent.
	Arch []uint16
	// Vendor is option 60 and UserClass option 77, both as text.
	Vendor, UserClass string
	// IPXE is set when option 175 is there: only iPXE sends it, also builds
	// that send no user class (FlexBoot).
	IPXE bool
	// Features are the sub-option codes inside option 175 that announce an
	// iPXE feature (ipxe/features.h); empty when the client names none.
	Features []byte
}

// Feature codes of iPXE (src/include/ipxe/features.h).
const (
	FeatureHTTP    = 0x13
	FeatureBzImage = 0x18
	FeatureEFI     = 0x24
)

// Head is what the head can offer to one machine.
type Head struct {
	Mode Mode
	// Stranger is a machine that nobody asked to join. In proxy mode, on
	// somebody else's network, it is sent to its own disk.
	Stranger bool
	// Boot are the bare names of the boot loaders that can be served.
	Boot map[string]bool
	// URL is the head's HTTP root with an IP literal and without a slash at
	// the end: firmware often has no resolver.
	URL string
	// Script is the URL of this machine's iPXE script.
	Script string
}

// Kind says what sort of answer it is.
type Kind int

const (
	// Plain is an address and nothing to boot: the client did not ask to.
	Plain Kind = iota
	// TFTP is a bare file name to fetch from this server.
	TFTP
	// HTTP is a URL for UEFI HTTP boot.
	HTTP
	// Script is the URL of an iPXE script.
	Script
	// Local is the URL of an iPXE script that goes on with the next boot
	// device after 3 s.
	Local
	// Refused is a client that wants to boot and cannot be helped.
	Refused
)

// Answer is what to put into the offer.
type Answer struct {
	Kind Kind
	// File is the boot file (option 67 and the header's file field).
	File string
	// Vendor is option 60 of the reply; "" leaves it out.
	Vendor string
	// Direct tells PXE to boot File without looking for boot servers or
	// showing a menu (option 43, sub-option 6 = 8).
	Direct bool
	// NoProxy tells iPXE not to wait 2 s for a proxy offer (option 175.176).
	NoProxy bool
	// Reason says why, for people: set for Refused.
	Reason string
}

// Boot loaders, as image sets name them.
const (
	undionly = "undionly.kpxe" // BIOS, on top of the ROM's own driver
	ipxePXE  = "ipxe.pxe"      // BIOS, with iPXE's own drivers
	snponly  = "snponly.efi"   // UEFI x64, on top of the firmware's driver
	ipxeEFI  = "ipxe.efi"      // UEFI x64, with iPXE's own drivers
)

// Client architectures (IANA "Processor Architecture Types").
const (
	archBIOS     = 0
	archIA32     = 6
	archX64      = 7
	archEBC      = 9 // x64 in practice: RFC 4578's table had 7 and 9 swapped
	archIA32HTTP = 15
	archX64HTTP  = 16
	archEBCHTTP  = 17
	archBIOSHTTP = 20
)

// unsupported names the architectures for which there is no image.
var unsupported = map[uint16]string{
	2: "Itanium", archIA32: "32-bit UEFI", 8: "XScale", 10: "32-bit ARM", 11: "64-bit ARM",
	archIA32HTTP: "32-bit UEFI", 18: "32-bit ARM", 19: "64-bit ARM", archBIOSHTTP: "BIOS HTTP boot",
	21: "32-bit ARM U-Boot", 22: "64-bit ARM U-Boot", 23: "32-bit ARM U-Boot", 24: "64-bit ARM U-Boot",
	25: "RISC-V", 26: "RISC-V", 27: "RISC-V", 28: "RISC-V", 29: "RISC-V", 30: "RISC-V",
	39: "LoongArch", 40: "LoongArch", 41: "Raspberry Pi",
}

// raspberryPi are the prefixes of the Raspberry Pi's MACs. Its boot ROM says
// that it is a PC's BIOS.
var raspberryPi = []string{"28:cd:c1", "2c:cf:67", "88:a2:9e", "b8:27:eb", "d8:3a:dd", "dc:a6:32", "e4:5f:01"}

// Decide is the boot decision.
func Decide(f Facts, h Head) Answer {
	a := decide(f, h)
	if a.File == "" || h.Mode == Server {
		return a
	}
	a.NoProxy = false // we are the proxy
	if a.Vendor == "" {
		a.Vendor = "PXEClient"
	}
	return a
}

func decide(f Facts, h Head) Answer {
	// HW-Client is Huawei's word for PXEClient.
	pxe := strings.HasPrefix(f.Vendor, "PXEClient") || strings.HasPrefix(f.Vendor, "HW-Client")
	http := strings.HasPrefix(f.Vendor, "HTTPClient")
	switch {
	// iPXE first: it also says "PXEClient" and, started by HTTP boot, runs
	// on firmware that said "HTTPClient" a moment ago.
	case f.IPXE || f.UserClass == "iPXE":
		return ipxe(f, h)
	case strings.HasPrefix(f.Vendor, "U-Boot"):
		// Its EFI loader says PXEClient and the EFI architecture instead.
		return Answer{Kind: Refused, Reason: "there is no boot loader for U-Boot (its EFI boot would do on x64)"}
	case !pxe && !http:
		return Answer{Kind: Plain}
	case slices.ContainsFunc(raspberryPi, func(p string) bool { return strings.HasPrefix(f.MAC, p) }):
		return Answer{Kind: Refused, Reason: "there is no boot loader for the Raspberry Pi (it says that it is a BIOS)"}
	}
	arch, known := pick(f, http)
	switch {
	case !known && len(f.Arch) == 0 && pxe, known && arch == archBIOS:
		// The first PXE ROMs have no option 93; all of them are BIOS.
		return bios(h, undionly, ipxePXE)
	case !known:
		return refuse(f)
	case http:
		a := file(h, snponly, ipxeEFI)
		if a.Kind == TFTP {
			a = Answer{Kind: HTTP, File: h.URL + "/boot/" + a.File, Vendor: "HTTPClient"}
		}
		return a
	}
	return file(h, snponly, ipxeEFI)
}

// pick is the first architecture in the list that can be booted.
func pick(f Facts, http bool) (uint16, bool) {
	for _, a := range f.Arch {
		switch a {
		case archBIOS, archX64, archEBC:
			if !http {
				return a, true
			}
		case archX64HTTP, archEBCHTTP:
			if http {
				return a, true
			}
		}
	}
	return 0, false
}

// ipxe answers a client that runs iPXE already: its script, unless this build
// of it could not follow one.
func ipxe(f Facts, h Head) Answer {
	efi := f.has(FeatureEFI)
	for _, a := range f.Arch {
		switch a {
		case archX64, archEBC, archX64HTTP, archEBCHTTP:
			efi = true
		case archBIOS:
		default:
			return refuse(f)
		}
	}
	lacks := ""
	switch {
	case len(f.Features) == 0:
		// It names none: a script is the best guess, and no worse.
	case !f.has(FeatureHTTP):
		lacks = "HTTP"
	case !efi && !f.has(FeatureBzImage):
		lacks = "bzImage"
	}
	switch {
	case lacks == "" && h.Mode == Proxy && h.Stranger:
		return Answer{Kind: Local, File: h.Script}
	case lacks == "":
		return Answer{Kind: Script, File: h.Script, NoProxy: true}
	}
	var a Answer
	if efi {
		a = file(h, snponly, ipxeEFI)
	} else {
		// Not undionly.kpxe: a ROM that is iPXE itself leaves no UNDI for it.
		a = bios(h, ipxePXE)
	}
	a.NoProxy = a.Kind == TFTP
	if a.Kind == Refused {
		a.Reason = fmt.Sprintf("its iPXE has no %s, and %s", lacks, a.Reason)
	}
	return a
}

func (f Facts) has(feature byte) bool {
	return slices.Contains(f.Features, feature)
}

// file offers the first of the loaders that the image set has.
func file(h Head, names ...string) Answer {
	for _, n := range names {
		if h.Boot[n] {
			return Answer{Kind: TFTP, File: n}
		}
	}
	return Answer{Kind: Refused, Reason: fmt.Sprintf("the image set has no boot/%s", names[0])}
}

// bios is file for a BIOS ROM.
func bios(h Head, names ...string) Answer {
	a := file(h, names...)
	a.Direct = a.Kind == TFTP && h.Mode == Proxy
	return a
}

func refuse(f Facts) Answer {
	for _, a := range f.Arch {
		if name, ok := unsupported[a]; ok {
			return Answer{Kind: Refused, Reason: fmt.Sprintf("there is no boot loader for %s (architecture %d)", name, a)}
		}
	}
	return Answer{Kind: Refused, Reason: fmt.Sprintf("unknown architecture %d", f.Arch)}
}
