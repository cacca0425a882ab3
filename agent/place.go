package agent

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// checkHead checks the two words that say where the head is and who it is.
func checkHead(head, ca string) error {
	if head == "" || ca == "" {
		return fault.New(fault.Usage, "find", "head", "this machine was not told where its head is",
			"boot it from a mosimg head, or give --head and --ca, or --join")
	}
	u, err := url.Parse(head)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.Port() == "" || strings.Trim(u.Path, "/") != "" || u.User != nil || u.RawQuery != "" {
		return fault.New(fault.Usage, "read head", fmt.Sprintf("%q", head), "not of the form https://ADDRESS:PORT", "check mosimg.head or --head")
	}
	digest, ok := strings.CutPrefix(ca, "sha256:")
	if b, err := hex.DecodeString(digest); !ok || err != nil || len(b) != 32 {
		return fault.New(fault.Usage, "read CA", fmt.Sprintf("%q", ca), "not of the form sha256:64-HEX-DIGITS", "check mosimg.ca or --ca")
	}
	return nil
}

// readTicket reads what the head on this machine left for us. It must be
// root's alone: whoever can write it decides which cluster we join.
func readTicket(path string) (api.LocalTicket, error) {
	var t api.LocalTicket
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return t, errText("waiting for the head on this machine to start (" + path + ")")
	}
	if err != nil {
		return t, fault.New(fault.Environment, "read ticket", path, err, "")
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return t, fault.New(fault.Environment, "read ticket", path, err, "")
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return t, fault.New(fault.Refused, "read ticket", path, "others than its owner may read or write it", "it should be made by mosimg head, mode 0600")
	}
	if err := json.NewDecoder(f).Decode(&t); err != nil {
		return t, fault.New(fault.Environment, "read ticket", path, err, "restart mosimg head")
	}
	return t, nil
}

// towards is the MAC and address by which this machine reaches the head.
func towards(head string) (mac, addr string, err error) {
	u, err := url.Parse(head)
	if err != nil {
		return "", "", err
	}
	// No packet is sent: connecting a UDP socket only asks for the route.
	c, err := net.Dial("udp", u.Host)
	if err != nil {
		return "", "", fault.New(fault.Environment, "find the way to", u.Host, err, "is the network up?")
	}
	defer c.Close()
	ip := c.LocalAddr().(*net.UDPAddr).IP
	ifs, err := net.Interfaces()
	if err != nil {
		return "", "", err
	}
	for _, i := range ifs {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.Equal(ip) && len(i.HardwareAddr) == 6 {
				return i.HardwareAddr.String(), ip.String(), nil
			}
		}
	}
	return "", "", fault.New(fault.Environment, "find the card with", ip.String(), "no Ethernet card has this address", "give --mac and --address")
}
