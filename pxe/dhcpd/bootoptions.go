package dhcpd

import (
	"net/netip"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
)

// pxeDirect is option 43 for PXE: discovery control (6) with bit 3, "boot the
// file that is named and look no further" (PXE 2.1, table 2-1). PXE's encoding
// ends with 255.
var pxeDirect = []byte{6, 1, 8, 255}

// ipxeNoProxy is option 175 for iPXE: no-pxedhcp (ipxe/dhcp.h).
var ipxeNoProxy = []byte{176, 1, 1}

// maxHeaderFile is the room in the header's file field, with its zero byte.
const maxHeaderFile = 128

// bootOptions puts the boot decision into header fields and options: EDK2
// reads siaddr and option 67, U-Boot only the header, some others only the
// options. Names end with a zero byte because ROMs print and use what follows.
func bootOptions(reply *dhcpv4.DHCPv4, server netip.Addr, a *decision.Answer) {
	if a.File == "" {
		return
	}
	reply.ServerIPAddr = ip(server)
	if len(a.File) < maxHeaderFile {
		reply.BootFileName = a.File
	}
	reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionBootfileName, []byte(a.File+"\x00")))
	reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionTFTPServerName, []byte(server.String()+"\x00")))
	if a.Vendor != "" {
		reply.UpdateOption(dhcpv4.OptClassIdentifier(a.Vendor))
	}
	if a.Direct {
		reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionVendorSpecificInformation, pxeDirect))
	}
	if a.NoProxy {
		reply.UpdateOption(dhcpv4.OptGeneric(dhcpv4.GenericOptionCode(optIPXE), ipxeNoProxy))
	}
}
