package dhcpd

import (
	"encoding/hex"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"

	"mosimg/pxe/decision"
)

var update = flag.Bool("update", false, "write the golden files (and fail)")

// machine is a kind of client by the bytes that it sends. All requests of this
// list are synthetic: made from what the named source sends, in its order.
type machine struct {
	name   string
	source string
	mac    string
	// options follow the message type, as hex.
	options []string
	// flags, relay and relay's option 82 of the header.
	broadcast bool
	relay     string
}

// opt is one option in hex.
func opt(code byte, data string) string { return fmt.Sprintf("%02x%02x%x", code, len(data), data) }

const (
	guid    = "\x000123456789abcdef" // option 97: type 0 and 16 bytes
	undi    = "\x01\x03\x10"         // option 94: UNDI 3.16
	bigPkt  = "\x05\xc0"             // option 57: 1472
	pxeList = "\x01\x02\x03\x04\x05\x06\x0c\x0d\x0f\x11\x12\x16\x17\x1c\x28\x29\x2a\x2b\x32\x33\x36\x3a\x3b\x3c\x42\x43\x61\x80\x81\x82\x83\x84\x85\x86\x87"
	srcEDK2 = "edk2 NetworkPkg/UefiPxeBcDxe/PxeBcDhcp4.c, PxeBcBuildDhcp4Options"
	srcHTTP = "edk2 NetworkPkg/HttpBootDxe/HttpBootDhcp4.c, HttpBootBuildDhcp4Options"
	srcIPXE = "ipxe src/net/udp/dhcp.c, dhcp_create_request"
	// features of iPXE 1.21: bus id, version, and pxe, iscsi, dns, bzimage,
	// tftp, menu, https, http, sdi, aoe, elf, multiboot.
	full175 = "\xb1\x05\x01\x80\x86\x10\x0e\xeb\x03\x01\x15\x01" + "\x21\x01\x01\x11\x01\x01\x17\x01\x01\x18\x01\x01\x13\x01\x01\x14\x01\x01\x27\x01\x01"
	efi175  = "\xb1\x05\x01\x80\x86\x10\x0e\xeb\x03\x01\x15\x01" + "\x21\x01\x01\x11\x01\x01\x17\x01\x01\x13\x01\x01\x24\x01\x01\x27\x01\x01"
)

func firmware(vendor string, arch byte) []string {
	return []string{opt(57, bigPkt), opt(55, pxeList), opt(97, guid), opt(94, undi), opt(93, "\x00"+string([]byte{arch})), opt(60, fmt.Sprintf("%s:Arch:%05d:UNDI:003016", vendor, arch))}
}

func ipxeOptions(arch byte, class, features string) []string {
	o := []string{opt(57, bigPkt), opt(93, "\x00"+string([]byte{arch})), opt(94, "\x01\x02\x01"), opt(60, fmt.Sprintf("PXEClient:Arch:%05d:UNDI:002001", arch))}
	if class != "" {
		o = append(o, opt(77, class))
	}
	return append(o, opt(55, "\x01\x03\x06\x07\x0c\x0f\x11\x1a\x2b\x3c\x42\x43\x77\x80\x81\x82\x83\x84\x85\x86\x87\xaf\xcb"),
		opt(175, features), opt(61, "\x01\x52\x54\x00\x00\x00\x01"), opt(97, guid))
}

var machines = []machine{
	{name: "bios", source: "PXE 2.1 section 2.2.1, as Intel's boot agent sends it", options: []string{
		opt(55, pxeList), opt(57, "\x04\xec"), opt(97, guid), opt(93, "\x00\x00"), opt(94, "\x01\x02\x01"), opt(60, "PXEClient:Arch:00000:UNDI:002001")}, broadcast: true},
	{name: "uefi-x64-7", source: srcEDK2, options: firmware("PXEClient", 7)},
	{name: "uefi-x64-9", source: srcEDK2, options: firmware("PXEClient", 9), broadcast: true},
	{name: "uefi-ia32", source: srcEDK2, options: firmware("PXEClient", 6)},
	{name: "uefi-arm64", source: srcEDK2, options: firmware("PXEClient", 11)},
	{name: "http-ia32", source: srcHTTP, options: firmware("HTTPClient", 15)},
	{name: "http-x64", source: srcHTTP, options: firmware("HTTPClient", 16)},
	{name: "http-arm64", source: srcHTTP, options: firmware("HTTPClient", 19)},
	{name: "ipxe-rom-without-http", source: srcIPXE + ", a ROM built without HTTP", options: ipxeOptions(0, "iPXE", "\xeb\x03\x01\x00\x00\x21\x01\x01\x18\x01\x01")},
	{name: "flexboot", source: srcIPXE + ", without option 77 as Mellanox builds it", options: ipxeOptions(0, "", full175)},
	{name: "ipxe-bios", source: srcIPXE, options: ipxeOptions(0, "iPXE", full175)},
	{name: "ipxe-efi", source: srcIPXE, options: ipxeOptions(7, "iPXE", efi175)},
	{name: "u-boot", source: "u-boot net/bootp.c, dhcp_extended with BOOTP_VCI", options: []string{opt(57, "\x02\x40"), opt(93, "\x00\x16"), opt(94, "\x01\x00\x00"), opt(60, "U-Boot.armv8"), opt(55, "\x01\x03\x06\x0c\x11\x43")}},
	{name: "u-boot-efi-x64", source: "u-boot include/config_distro_bootcmd.h, BOOTENV_EFI_PXE", options: []string{opt(57, "\x02\x40"), opt(93, "\x00\x07"), opt(94, "\x01\x00\x00"), opt(60, "PXEClient:Arch:00007:UNDI:003000"), opt(55, "\x01\x03\x06\x0c\x11\x43")}},
	{name: "raspberry-pi", source: "Raspberry Pi boot EEPROM, which says BIOS", mac: "dc:a6:32:00:00:01", options: []string{opt(55, "\x01\x03\x2b\x3c\x42\x43\x80\x81\x82\x83\x84\x85\x86\x87"), opt(93, "\x00\x00"), opt(94, "\x01\x02\x01"), opt(60, "PXEClient:Arch:00000:UNDI:002001"), opt(97, guid)}},
	{name: "laptop", source: "udhcpc 1.36", options: []string{opt(61, "\x01\x52\x54\x00\x00\x00\x01"), opt(57, "\x02\x40"), opt(55, "\x01\x03\x06\x0c\x0f\x1c\x2a"), opt(60, "udhcp 1.36.1")}},
	{name: "bios-relayed", source: "PXE 2.1, by a relay that adds circuit and remote id (RFC 3046)", relay: "10.77.0.250", options: []string{
		opt(55, pxeList), opt(97, guid), opt(93, "\x00\x00"), opt(94, "\x01\x02\x01"), opt(60, "PXEClient:Arch:00000:UNDI:002001"), opt(82, "\x01\x04eth7\x02\x03sw1")}},
}

// packet is a message of the machine in its own bytes; more is options that
// come before its own.
func (m machine) packet(t dhcpv4.MessageType, ciaddr string, more ...string) []byte {
	b := make([]byte, 240, 548)
	copy(b, []byte{1, 1, 6, 0, 0xde, 0xad, 0xbe, 0xef, 0, 4})
	if m.broadcast {
		b[10] = 0x80
	}
	for at, a := range map[int]string{12: ciaddr, 24: m.relay} {
		if a != "" {
			copy(b[at:], netip.MustParseAddr(a).AsSlice())
		}
	}
	if m.relay != "" {
		b[3] = 1
	}
	hw, err := net.ParseMAC(m.hw())
	if err != nil {
		panic(err)
	}
	copy(b[28:], hw)
	copy(b[236:], []byte{0x63, 0x82, 0x53, 0x63})
	b = append(b, 53, 1, byte(t))
	for _, o := range append(more, m.options...) {
		raw, err := hex.DecodeString(o)
		if err != nil {
			panic(err)
		}
		b = append(b, raw...)
	}
	return append(b, 255)
}

func (m machine) hw() string {
	if m.mac == "" {
		return mac(1)
	}
	return m.mac
}

// exchange asks a fresh handler and writes down what is said.
type exchange struct {
	*wire
	out strings.Builder
}

func newExchange(t *testing.T, mode decision.Mode, title string) *exchange {
	x := &exchange{wire: newWire(t, nil)}
	x.Mode = func() decision.Mode { return mode }
	fmt.Fprintf(&x.out, "# %s\n# %v mode\n", title, mode)
	return x
}

func (x *exchange) ask(b []byte, port int) *dhcpv4.DHCPv4 {
	x.t.Helper()
	req, err := parse(b)
	if err != nil {
		x.t.Fatal(err)
	}
	fmt.Fprintf(&x.out, "\n> %s to port %d\n%s", req.MessageType(), port, dump(b))
	var reply *dhcpv4.DHCPv4
	var to netip.AddrPort
	if port == 67 {
		reply, to = x.Handle(x.now, req)
	} else {
		reply, to = x.HandleBoot(req, netip.MustParseAddrPort("10.77.0.50:68"))
	}
	if reply == nil {
		fmt.Fprint(&x.out, "\n< silence\n")
		return nil
	}
	fmt.Fprintf(&x.out, "\n< %s to %s\n%s", reply.MessageType(), to, dump(reply.ToBytes()))
	return reply
}

var modes = []decision.Mode{decision.Server, decision.Proxy}

// Byte for byte, what each kind of firmware asks and is answered: a change
// here is a change for machines that nobody here can try.
func TestGolden(t *testing.T) {
	for _, m := range machines {
		for _, mode := range modes {
			t.Run(fmt.Sprintf("%s-%v", m.name, mode), func(t *testing.T) {
				x := newExchange(t, mode, fmt.Sprintf("%s; the requests are synthetic, after %s", m.name, m.source))
				offer := x.ask(m.packet(dhcpv4.MessageTypeDiscover, ""), 67)
				if mode == decision.Server && offer != nil {
					x.ask(m.packet(dhcpv4.MessageTypeRequest, "", opt(50, string(offer.YourIPAddr.To4())), opt(54, "\x0a\x4d\x00\x01")), 67)
					x.ask(m.packet(dhcpv4.MessageTypeRequest, offer.YourIPAddr.String()), 67) // renewal
				}
				if mode == decision.Proxy {
					x.ask(m.packet(dhcpv4.MessageTypeRequest, "", opt(50, "\x0a\x4d\x00\x32"), opt(54, "\x0a\x4d\x00\x42")), 67)
					x.ask(m.packet(dhcpv4.MessageTypeRequest, "10.77.0.50"), 4011)
				}
				golden(t, fmt.Sprintf("%s-%v.txt", m.name, mode), x.out.String())
			})
		}
	}
}

// The same for what real firmware sent on a wire.
func TestGoldenCaptured(t *testing.T) {
	files, err := filepath.Glob("testdata/captured/*.txt")
	if err != nil || len(files) < 4 {
		t.Fatalf("captures %v, %v", files, err)
	}
	for _, file := range files {
		title, requests := readCapture(t, file)
		for _, mode := range modes {
			name := strings.TrimSuffix(filepath.Base(file), ".txt")
			t.Run(fmt.Sprintf("%s-%v", name, mode), func(t *testing.T) {
				x := newExchange(t, mode, "captured: "+title)
				for _, r := range requests {
					x.ask(r.payload, r.port)
				}
				golden(t, fmt.Sprintf("captured-%s-%v.txt", name, mode), x.out.String())
			})
		}
	}
}

type captured struct {
	port    int
	payload []byte
}

func readCapture(t *testing.T, file string) (title string, out []captured) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if text, ok := strings.CutPrefix(strings.TrimSpace(line), "# "); ok {
			if title == "" {
				title = text
			}
			continue
		}
		var c captured
		var text string
		if _, err := fmt.Sscan(line, &c.port, &text); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		if c.payload, err = hex.DecodeString(text); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		out = append(out, c)
	}
	return title, out
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", "golden", name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Errorf("wrote %s: look at the difference, then run without -update", file)
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); d != "" {
		t.Errorf("%s (-want +got):\n%s", file, d)
	}
}

// dump is hex.Dump, with equal lines shortened to one "*".
func dump(b []byte) string {
	var out strings.Builder
	last, starred := "", false
	for line := range strings.Lines(hex.Dump(b)) {
		bytes := line[8:]
		if bytes == last {
			if !starred {
				out.WriteString("*\n")
			}
			starred = true
			continue
		}
		last, starred = bytes, false
		out.WriteString(line)
	}
	return out.String()
}
