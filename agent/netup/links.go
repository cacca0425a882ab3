package netup

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// link is one network interface as the kernel shows it.
type link struct {
	Name    string
	MAC     string
	Wired   bool // an Ethernet device of this machine: no loopback, bridge, tunnel, radio
	Carrier bool
}

func (l link) String() string { return l.Name + " (" + l.MAC + ")" }

// sysNet is where the kernel lists interfaces.
const sysNet = "/sys/class/net"

// arphrdEther is ARPHRD_ETHER of include/uapi/linux/if_arp.h.
const arphrdEther = "1"

// readLinks lists interfaces in the order of their index, so that "the
// first" is the same at each boot.
func readLinks(sys string) ([]link, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	var out []link
	for _, i := range ifs {
		if i.Flags&net.FlagLoopback != 0 || len(i.HardwareAddr) != 6 {
			continue
		}
		out = append(out, link{
			Name:    i.Name,
			MAC:     i.HardwareAddr.String(),
			Wired:   wired(filepath.Join(sys, i.Name)),
			Carrier: readTrim(filepath.Join(sys, i.Name, "carrier")) == "1",
		})
	}
	return out, nil
}

func wired(dir string) bool {
	return readTrim(filepath.Join(dir, "type")) == arphrdEther &&
		exists(filepath.Join(dir, "device")) &&
		!exists(filepath.Join(dir, "wireless")) && !exists(filepath.Join(dir, "phy80211"))
}

// Driver and Mbit tell which driver serves an interface and its link speed,
// zero values when the kernel does not say.
func Driver(name string) string {
	to, err := os.Readlink(filepath.Join(sysNet, name, "device", "driver"))
	if err != nil {
		return ""
	}
	return filepath.Base(to)
}

// Mbit is the speed of an interface's link, 0 when unknown.
func Mbit(name string) int {
	n, err := strconv.Atoi(readTrim(filepath.Join(sysNet, name, "speed")))
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// Wired reports whether an interface is an Ethernet card of this machine,
// and whether it has carrier.
func Wired(name string) (wiredCard, carrier bool) {
	dir := filepath.Join(sysNet, name)
	return wired(dir), readTrim(filepath.Join(dir, "carrier")) == "1"
}

// matching are the interfaces that a machine may use: the one named (by name
// or MAC), or every wired one when none is named.
func matching(links []link, want string) []link {
	var out []link
	mac, err := net.ParseMAC(want)
	for _, l := range links {
		switch {
		case want == "" && l.Wired,
			want != "" && l.Name == want,
			err == nil && l.MAC == mac.String():
			out = append(out, l)
		}
	}
	return out
}

func withCarrier(links []link) []link {
	var out []link
	for _, l := range links {
		if l.Carrier {
			out = append(out, l)
		}
	}
	return out
}

// whyNone says why there is no link to use.
func whyNone(all, match []link, want string) string {
	switch {
	case len(match) > 0:
		return "no carrier on " + names(match) + ": check the cable"
	case want != "" && len(all) > 0:
		return fmt.Sprintf("no network card %s here; there is %s", want, names(all))
	case want != "":
		return fmt.Sprintf("no network card %s here, nor any other: the image has no driver for it", want)
	}
	return "no wired network card found: the image has no driver for it"
}

func names(links []link) string {
	var s []string
	for _, l := range links {
		s = append(s, l.String())
	}
	return strings.Join(s, ", ")
}

func readTrim(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
