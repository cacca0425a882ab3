// Package decision answers one question: what should a machine that asks over
// DHCP boot next? It is a pure function from what the request says to a boot
// file name or URL, so that every firmware quirk is one row of its test.
//
// The answers are those of a head that also leases the addresses ("server
// mode"). EDK2 and BIOS ROMs then boot straight from the offer only if it
// carries neither option 60 nor 43: with option 60 alone EDK2 asks port 4011
// a second time and hangs when nobody answers (edk2 PxeBcDhcp4.c,
// PxeBcParseDhcp4Packet). UEFI HTTP boot is the opposite: without option 60 =
// "HTTPClient" it ignores the offer.
package decision

import (
	"fmt"
	"slices"
	"strings"
)

// Facts are what a DHCP request says about the client. The zero value is a
// client that does not netboot.
type Facts struct {
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

// Server is what the head can offer.
type Server struct {
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
	25: "RISC-V", 26: "RISC-V", 27: "RISC-V", 28: "RISC-V", 29: "RISC-V", 30: "RISC-V",
	39: "LoongArch", 40: "LoongArch", 41: "Raspberry Pi",
}

// Decide is the boot decision.
func Decide(f Facts, s Server) Answer {
	pxe := strings.HasPrefix(f.Vendor, "PXEClient")
	http := strings.HasPrefix(f.Vendor, "HTTPClient")
	// iPXE first: it also says "PXEClient" and, started by HTTP boot, runs
	// on firmware that said "HTTPClient" a moment ago.
	if f.IPXE || f.UserClass == "iPXE" {
		return ipxe(f, s)
	}
	if !pxe && !http {
		return Answer{Kind: Plain}
	}
	arch, known := pick(f, http)
	switch {
	case !known && len(f.Arch) == 0 && pxe:
		// The first PXE ROMs have no option 93; all of them are BIOS.
		return file(s, undionly, ipxePXE)
	case !known:
		return refuse(f)
	case arch == archBIOS:
		return file(s, undionly, ipxePXE)
	case http:
		a := file(s, snponly, ipxeEFI)
		if a.Kind == TFTP {
			a = Answer{Kind: HTTP, File: s.URL + "/boot/" + a.File, Vendor: "HTTPClient"}
		}
		return a
	}
	return file(s, snponly, ipxeEFI)
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
func ipxe(f Facts, s Server) Answer {
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
	if lacks == "" {
		return Answer{Kind: Script, File: s.Script, NoProxy: true}
	}
	var a Answer
	if efi {
		a = file(s, snponly, ipxeEFI)
	} else {
		// Not undionly.kpxe: a ROM that is iPXE itself leaves no UNDI for it.
		a = file(s, ipxePXE)
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
func file(s Server, names ...string) Answer {
	for _, n := range names {
		if s.Boot[n] {
			return Answer{Kind: TFTP, File: n}
		}
	}
	return Answer{Kind: Refused, Reason: fmt.Sprintf("the image set has no boot/%s", names[0])}
}

func refuse(f Facts) Answer {
	for _, a := range f.Arch {
		if name, ok := unsupported[a]; ok {
			return Answer{Kind: Refused, Reason: fmt.Sprintf("there is no boot loader for %s (architecture %d)", name, a)}
		}
	}
	return Answer{Kind: Refused, Reason: fmt.Sprintf("unknown architecture %d", f.Arch)}
}
