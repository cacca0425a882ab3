package dhcpd

import (
	"slices"
	"strings"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
)

// optIPXE is iPXE's own encapsulated option (175, ipxe/dhcp.h).
const optIPXE = 175

// factsOf reads what a request says about the client that wants to boot.
func factsOf(req *dhcpv4.DHCPv4) decision.Facts {
	f := decision.Facts{
		MAC:    req.ClientHWAddr.String(),
		Vendor: strings.TrimRight(req.ClassIdentifier(), "\x00"),
		IPXE:   req.Options.Has(dhcpv4.GenericOptionCode(optIPXE)),
	}
	for _, a := range req.ClientArch() {
		f.Arch = append(f.Arch, uint16(a))
	}
	// iPXE sends the bare text instead of RFC 3004's list; UserClass copes
	// with both.
	if c := req.UserClass(); slices.Contains(c, "iPXE") {
		f.UserClass = "iPXE"
	} else if len(c) > 0 {
		f.UserClass = c[0]
	}
	f.Features = features(req.Options.Get(dhcpv4.GenericOptionCode(optIPXE)))
	return f
}

// features are the sub-option codes 0x10 to 0x4f in option 175, by which iPXE
// announces what it can do; the others are settings.
func features(opt []byte) []byte {
	var out []byte
	for len(opt) > 0 {
		code := opt[0]
		switch {
		case code == 0: // padding
			opt = opt[1:]
			continue
		case code == 255 || len(opt) < 2 || len(opt) < 2+int(opt[1]):
			return out
		}
		if code >= 0x10 && code <= 0x4f {
			out = append(out, code)
		}
		opt = opt[2+int(opt[1]):]
	}
	return out
}
