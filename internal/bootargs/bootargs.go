// Package bootargs names the words on the kernel command line by which a head
// tells a booting machine where it is, and parses them. The writer (the boot
// decision of the head, the lab) and the reader (the agent as init) share it.
//
//	mosimg.head=https://10.77.0.1:4660   where to enrol
//	mosimg.ca=sha256:HEX                 identity.Pin of the cluster CA
//	mosimg.nonce=TEXT                    one-shot boot nonce
//	mosimg.image=ID                      image set that was served
//	BOOTIF=01-52-54-00-00-00-01          the NIC that booted (pxelinux form)
//	mosimg.role=head                     start a head here (needs the head archive)
//	mosimg.interface=IF|MAC              head: the NIC to serve
//	mosimg.address=10.77.0.1/24          head: static address of that NIC
//	mosimg.state=/dev/vda                head: block device for its state; blank ones are formatted
//	mosimg.debug                         root shell on the consoles
package bootargs

import (
	"net"
	"sort"
	"strings"
)

// Args are the words that concern us; everything else on the line is ignored.
type Args struct {
	Head      string
	CA        string
	Nonce     string
	Image     string
	BootMAC   string // lower case with colons, "" when BOOTIF is absent
	Role      string // "node" (default) or "head"
	Interface string
	Address   string
	State     string
	Debug     bool
}

// Parse reads a kernel command line. The last value of a repeated word wins,
// as in the kernel. A malformed BOOTIF is treated as absent.
func Parse(cmdline string) Args {
	a := Args{Role: "node"}
	dst := map[string]*string{
		"mosimg.head": &a.Head, "mosimg.ca": &a.CA, "mosimg.nonce": &a.Nonce,
		"mosimg.image": &a.Image, "mosimg.role": &a.Role, "mosimg.interface": &a.Interface,
		"mosimg.address": &a.Address, "mosimg.state": &a.State,
	}
	for w := range strings.FieldsSeq(cmdline) {
		key, value, _ := strings.Cut(w, "=")
		switch {
		case key == "mosimg.debug":
			a.Debug = value == "" || value == "1"
		case key == "BOOTIF":
			a.BootMAC = parseBOOTIF(value)
		case dst[key] != nil:
			*dst[key] = value
		}
	}
	return a
}

// Words are the arguments as command-line words, sorted, without defaults.
func (a Args) Words() []string {
	var w []string
	add := func(k, v string) {
		if v != "" {
			w = append(w, k+"="+v)
		}
	}
	add("mosimg.head", a.Head)
	add("mosimg.ca", a.CA)
	add("mosimg.nonce", a.Nonce)
	add("mosimg.image", a.Image)
	if a.Role != "node" {
		add("mosimg.role", a.Role)
	}
	add("mosimg.interface", a.Interface)
	add("mosimg.address", a.Address)
	add("mosimg.state", a.State)
	if a.BootMAC != "" {
		w = append(w, "BOOTIF=01-"+strings.ReplaceAll(a.BootMAC, ":", "-"))
	}
	if a.Debug {
		w = append(w, "mosimg.debug")
	}
	sort.Strings(w)
	return w
}

// parseBOOTIF reads pxelinux's form: hardware type, then six bytes, by dashes.
func parseBOOTIF(s string) string {
	s = strings.ReplaceAll(s, "-", ":")
	if len(s) == len("01:52:54:00:00:00:01") {
		s = s[3:]
	}
	mac, err := net.ParseMAC(s)
	if err != nil || len(mac) != 6 {
		return ""
	}
	return mac.String()
}
