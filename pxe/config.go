package pxe

import (
	"cmp"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/pxe/tftpd"
)

// DHCPMode says whether the head gives out addresses.
type DHCPMode string

const (
	// DHCPAuto looks at each network: DHCPServer where nobody gives out
	// addresses, DHCPProxy where another server does. It looks again every
	// few minutes and steps down when one appears.
	DHCPAuto DHCPMode = "auto"
	// DHCPServer gives out addresses without looking for another server.
	DHCPServer DHCPMode = "server"
	// DHCPProxy adds what to boot to another server's addresses.
	DHCPProxy DHCPMode = "proxy"
	// DHCPOff does no DHCP: another server must name this head.
	DHCPOff DHCPMode = "off"
)

// Config is how a head is to run. The zero value serves the wired interfaces
// with a static address from the default folders.
type Config struct {
	// Interfaces to serve, by name or MAC. Empty: those of ConfigFile, or
	// the wired ones with a static address.
	Interfaces []string
	// Images is an image store or one image set; "" is DefaultImages.
	Images string
	// ConfigFile is a cluster.yaml; "" for none.
	ConfigFile string
	// DHCP is DHCPAuto when "".
	DHCP DHCPMode
	// Adopt opens an adoption window of that length at start. It goes
	// before that of ConfigFile; 0 leaves it to that.
	Adopt time.Duration
	// State is the folder of the registry; "" is DefaultState.
	State string
	// Run is the folder of the admin socket and the local ticket; "" is
	// api.RunDir.
	Run string
	// Reprobe is how often DHCPAuto looks for another server; 0 is
	// DefaultReprobe.
	Reprobe time.Duration
	// Ports; 0 is the standard one (80, 69, api.HeadPort, 67).
	HTTPPort, TFTPPort, APIPort, DHCPPort int
	// TFTPPorts are the ports that boot loaders are sent from: "" for any,
	// "single" for TFTPPort, or a range such as "40000-40255".
	TFTPPorts string
	// Log gets the boot trace and everything else; nil is silent.
	Log *slog.Logger
	// Started is called once when everything is being served; may be nil.
	Started func(Info)

	tftpPorts tftpd.Ports // TFTPPorts, read by complete
}

// DefaultReprobe is short enough that a rival does little harm, and long enough
// that the question is no noise in another server's log.
const DefaultReprobe = 3 * time.Minute

// Default places.
const (
	DefaultState  = "/var/lib/mosimg"
	DefaultImages = "/var/lib/mosimg/images"
)

// Info is what a started head tells about itself.
type Info struct {
	Cluster  string
	CA       string // identity.Pin
	Networks []string
	Images   map[string]string // arch -> image set id
	HTTP     string            // URL
	API      string            // URL
	// DHCP is DHCPOff, DHCPProxy when every network has another server, or
	// DHCPServer.
	DHCP DHCPMode
}

// complete fills in defaults and checks what needs no look at the machine.
func (c *Config) complete() error {
	c.Images = cmp.Or(c.Images, DefaultImages)
	c.State = cmp.Or(c.State, DefaultState)
	c.Run = cmp.Or(c.Run, api.RunDir)
	c.DHCP = cmp.Or(c.DHCP, DHCPAuto)
	c.HTTPPort = cmp.Or(c.HTTPPort, 80)
	c.TFTPPort = cmp.Or(c.TFTPPort, 69)
	c.APIPort = cmp.Or(c.APIPort, api.HeadPort)
	c.DHCPPort = cmp.Or(c.DHCPPort, 67)
	c.Reprobe = cmp.Or(c.Reprobe, DefaultReprobe)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var l fault.List
	switch c.DHCP {
	case DHCPAuto, DHCPServer, DHCPProxy, DHCPOff:
	default:
		l.Addf("--dhcp %s: want auto, server, proxy or off", c.DHCP)
	}
	for flag, port := range map[string]int{"--http-port": c.HTTPPort, "--tftp-port": c.TFTPPort, "--api-port": c.APIPort, "--dhcp-port": c.DHCPPort} {
		if port < 1 || port > 65535 {
			l.Addf("%s %d: want 1 to 65535", flag, port)
		}
	}
	var err error
	if c.tftpPorts, err = tftpd.ParsePorts(c.TFTPPorts); err != nil {
		l.Addf("--tftp-ports: %v", err)
	}
	if c.HTTPPort == c.APIPort {
		l.Addf("--http-port and --api-port are both %d", c.HTTPPort)
	}
	if c.Adopt < 0 {
		l.Addf("--adopt %s: want a time that is not negative", c.Adopt)
	}
	return l.Err(fault.Usage, "start head", "", "")
}

// httpURL is the head's HTTP root at one of its addresses.
func (c *Config) httpURL(a netip.Addr) string {
	if c.HTTPPort == 80 {
		return "http://" + a.String()
	}
	return fmt.Sprintf("http://%s:%d", a, c.HTTPPort)
}

func (c *Config) apiURL(a netip.Addr) string { return fmt.Sprintf("https://%s:%d", a, c.APIPort) }
