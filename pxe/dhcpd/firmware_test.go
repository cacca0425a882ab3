package dhcpd

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
)

// edk2 is how UEFI firmware chooses among the offers it hears (edk2
// NetworkPkg/UefiPxeBcDxe/PxeBcDhcp4.c, PxeBcParseDhcp4Packet and
// PxeBcSelectDhcp4Offer): the file that it boots at once, or that it asks the
// server at the address given on port 4011, or neither.
func edk2(offers []*dhcpv4.DHCPv4) (file string, ask netip.Addr) {
	const (
		dhcpOnly = iota
		dhcpBinl
		dhcpPXE
		proxyBinl
		proxyPXE
		kinds
	)
	var heard [kinds]*dhcpv4.DHCPv4
	for _, o := range offers {
		pxe := o.ClassIdentifier() == "PXEClient"
		menu := o.Options.Has(dhcpv4.OptionVendorSpecificInformation)
		kind := dhcpOnly
		switch leases := isSet(addrOf(o.YourIPAddr)); {
		case !o.Options.Has(dhcpv4.OptionDHCPMessageType), !leases && !pxe:
			continue
		case leases && pxe && menu:
			kind = dhcpPXE
		case leases && pxe:
			kind = dhcpBinl
		case !leases && menu:
			kind = proxyPXE
		case !leases:
			kind = proxyBinl
		}
		if heard[kind] == nil {
			heard[kind] = o
		}
	}
	binl := func(o *dhcpv4.DHCPv4) (string, netip.Addr) {
		if a := addrOf(o.ServerIPAddr); isSet(a) {
			return "", a
		}
		return "", addrOf(o.ServerIdentifier())
	}
	switch only := heard[dhcpOnly]; {
	case heard[dhcpPXE] != nil:
		return fileOf(heard[dhcpPXE]), ask
	case only != nil && heard[proxyPXE] != nil:
		return fileOf(heard[proxyPXE]), ask
	case heard[dhcpBinl] != nil:
		return binl(heard[dhcpBinl])
	case only != nil && heard[proxyBinl] != nil:
		return binl(heard[proxyBinl])
	case only != nil:
		return fileOf(only), ask
	}
	return "", ask
}

// biosROM is how a BIOS ROM chooses (PXE 2.1 section 2.3, step 4): an offer of
// PXE's with discovery control 8 names the file; with option 60 and without
// that it looks for a boot server menu and finds none; a plain offer's file is
// booted if nobody speaks PXE.
func biosROM(offers []*dhcpv4.DHCPv4) string {
	leased, plain := false, ""
	direct, lost := "", false
	for _, o := range offers {
		leased = leased || isSet(addrOf(o.YourIPAddr))
		if o.ClassIdentifier() != "PXEClient" {
			if plain == "" && isSet(addrOf(o.YourIPAddr)) {
				plain = fileOf(o)
			}
			continue
		}
		v := o.Options.Get(dhcpv4.OptionVendorSpecificInformation)
		if len(v) >= 3 && v[0] == 6 && v[2]&8 != 0 {
			direct = fileOf(o)
		} else {
			lost = true
		}
	}
	switch {
	case !leased || lost:
		return ""
	case direct != "":
		return direct
	}
	return plain
}

// httpBoot is how UEFI HTTP boot chooses (edk2 NetworkPkg/HttpBootDxe).
func httpBoot(offers []*dhcpv4.DHCPv4) string {
	leased, url := false, ""
	for _, o := range offers {
		leased = leased || isSet(addrOf(o.YourIPAddr))
		if o.ClassIdentifier() == "HTTPClient" {
			url = fileOf(o)
		}
	}
	if !leased {
		return ""
	}
	return url
}

// ipxeROM is how iPXE chooses (ipxe src/net/udp/dhcp.c): a proxy offer counts
// if it has option 60 and a server id, and wins over the lease's file.
func ipxeROM(offers []*dhcpv4.DHCPv4) string {
	leased, file := false, ""
	for _, o := range offers {
		if isSet(addrOf(o.YourIPAddr)) {
			leased = true
			if file == "" {
				file = fileOf(o)
			}
		}
	}
	for _, o := range offers {
		if !isSet(addrOf(o.YourIPAddr)) && o.ClassIdentifier() == "PXEClient" && isSet(addrOf(o.ServerIdentifier())) && isSet(addrOf(o.ServerIPAddr)) && fileOf(o) != "" {
			file = fileOf(o)
		}
	}
	if !leased {
		return ""
	}
	return file
}

// uboot reads the header and no option (u-boot net/bootp.c, store_net_params).
func uboot(offers []*dhcpv4.DHCPv4) string {
	for _, o := range offers {
		if isSet(addrOf(o.ServerIPAddr)) && o.BootFileName != "" {
			return o.BootFileName
		}
	}
	return ""
}

// fileOf is the boot file as EDK2 reads it: option 67, else the header.
func fileOf(o *dhcpv4.DHCPv4) string {
	if f := o.BootFileNameOption(); f != "" {
		return f
	}
	return o.BootFileName
}

// Each firmware, by its own rules, finds its file in what we send: alone, and
// beside a home router that knows nothing of booting and may answer first.
func TestFirmwareFindsItsFile(t *testing.T) {
	const script = "http://10.77.0.1/ipxe/52:54:00:00:00:01"
	for _, tt := range []struct {
		machine string
		choose  func([]*dhcpv4.DHCPv4) string
		want    string
	}{
		{"bios", biosROM, "undionly.kpxe"},
		{"uefi-x64-7", nil, "snponly.efi"},
		{"uefi-x64-9", nil, "snponly.efi"},
		{"uefi-arm64", nil, ""},
		{"http-x64", httpBoot, "http://10.77.0.1/boot/snponly.efi"},
		{"ipxe-bios", ipxeROM, script},
		{"ipxe-efi", ipxeROM, script},
		{"flexboot", ipxeROM, script},
		{"ipxe-rom-without-http", ipxeROM, "ipxe.pxe"},
		{"u-boot-efi-x64", uboot, "snponly.efi"},
	} {
		var m machine
		for _, x := range machines {
			if x.name == tt.machine {
				m = x
			}
		}
		for _, mode := range []decision.Mode{decision.Server, decision.Proxy} {
			t.Run(fmt.Sprintf("%s-%v", tt.machine, mode), func(t *testing.T) {
				w := newWire(t, nil)
				w.Mode = func() decision.Mode { return mode }
				discover, err := parse(m.packet(dhcpv4.MessageTypeDiscover, ""))
				if err != nil {
					t.Fatal(err)
				}
				var ours []*dhcpv4.DHCPv4
				if o, _ := w.Handle(w.now, discover); o != nil {
					if o, err = dhcpv4.FromBytes(o.ToBytes()); err != nil {
						t.Fatal(err)
					}
					ours = append(ours, o)
				}
				orders := [][]*dhcpv4.DHCPv4{ours}
				if mode == decision.Proxy {
					router := plainOffer(t, discover)
					orders = [][]*dhcpv4.DHCPv4{append([]*dhcpv4.DHCPv4{router}, ours...), append(slices.Clip(ours), router)}
				}
				for _, offers := range orders {
					var got string
					if tt.choose != nil {
						got = tt.choose(offers)
					} else {
						got = bootEDK2(t, w, m, offers)
					}
					if got != tt.want {
						t.Errorf("boots %q; want %q", got, tt.want)
					}
				}
			})
		}
	}
}

// bootEDK2 goes on to port 4011 if the firmware would.
func bootEDK2(t *testing.T, w *wire, m machine, offers []*dhcpv4.DHCPv4) string {
	t.Helper()
	file, ask := edk2(offers)
	if !isSet(ask) {
		return file
	}
	if ask != server {
		t.Fatalf("it asks %v on port 4011; want %v", ask, server)
	}
	req, err := parse(m.packet(dhcpv4.MessageTypeRequest, "10.77.0.50"))
	if err != nil {
		t.Fatal(err)
	}
	reply, to := w.HandleBoot(req, netip.MustParseAddrPort("10.77.0.50:68"))
	if reply == nil {
		t.Fatal("port 4011 is silent: the firmware hangs")
	}
	if to.String() != "10.77.0.50:68" || reply.ClassIdentifier() != "PXEClient" || reply.MessageType() != dhcpv4.MessageTypeAck {
		t.Errorf("port 4011: %v to %v", reply, to)
	}
	return fileOf(reply)
}

// plainOffer is a home router's.
func plainOffer(t *testing.T, req *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	t.Helper()
	o, err := dhcpv4.NewReplyFromRequest(req, dhcpv4.WithMessageType(dhcpv4.MessageTypeOffer), dhcpv4.WithServerIP(ip(netip.MustParseAddr("10.77.0.254"))),
		dhcpv4.WithYourIP(ip(netip.MustParseAddr("10.77.0.50"))), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(ip(netip.MustParseAddr("10.77.0.254")))))
	if err != nil {
		t.Fatal(err)
	}
	return o
}
