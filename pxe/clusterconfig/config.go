// Package clusterconfig reads cluster.yaml, the one file that an operator may
// write for a head. Everything in it is checked before the head starts, and
// all faults are told at once, each with its line.
package clusterconfig

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"mosimg/internal/fault"
	"mosimg/pxe/nodename"
)

// Config is a whole cluster.yaml. The zero value is a cluster without one.
type Config struct {
	// Cluster is the cluster's name; "" keeps the stored one.
	Cluster string
	// Networks are served with these settings; empty means that the head
	// serves the interface it finds, with defaults.
	Networks []Network
	// DNS servers are told to clients.
	DNS []netip.Addr
	// KernelArgs are added to every node's kernel command line.
	KernelArgs []string
	// Adopt is how long an adoption window is open after the head starts.
	Adopt time.Duration
	// Approved are MACs of machines that are let in without a question.
	Approved []string

	name string // the file's, for faults
}

// Network is one interface's part.
type Network struct {
	// Interface is its name; "" means the one that the head finds.
	Interface string
	// Subnet is served; the zero value means that of the interface's address.
	Subnet netip.Prefix
	// First and Last bound the pool; unset means the upper half of the subnet.
	First, Last netip.Addr
	// Router is told to clients when set.
	Router netip.Addr
	// LeaseTime of addresses; 0 means the default.
	LeaseTime time.Duration
	// Reservations are fixed addresses.
	Reservations []Reservation

	line, subnetLine, poolLine, routerLine int
}

// Reservation gives a machine a fixed address, a name, or both.
type Reservation struct {
	MAC     string
	Address netip.Addr // the zero value: only a name
	Name    string     // "" for the default

	line int
}

// maxFile bounds the file: a cluster of 10,000 reservations has 1 MB.
const maxFile = 4 << 20

// Load reads a file.
func Load(name string) (*Config, error) {
	st, err := os.Stat(name)
	if err == nil && st.Size() > maxFile {
		err = fmt.Errorf("it has %d bytes, at most %d are read", st.Size(), maxFile)
	}
	var data []byte
	if err == nil {
		data, err = os.ReadFile(name)
	}
	if err != nil {
		return nil, fault.New(fault.Usage, "read configuration", name, err, "")
	}
	return Parse(name, data)
}

// Parse reads a configuration; name is for faults.
func Parse(name string, data []byte) (*Config, error) {
	p := &parser{name: filepath.Base(name)}
	c := &Config{name: p.name}
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return nil, fault.New(fault.Usage, "read configuration", name, strings.TrimPrefix(err.Error(), "yaml: "), "")
	}
	if len(doc.Content) > 0 && doc.Content[0].Tag != "!!null" {
		p.config(c, doc.Content[0])
	}
	return c, p.faults.Err(fault.Usage, "read configuration", name, "")
}

// parser collects faults while it walks the tree.
type parser struct {
	name   string
	faults fault.List
}

func (p *parser) bad(line int, format string, args ...any) {
	p.faults.Addf("%s:%d: %s", p.name, line, fmt.Sprintf(format, args...))
}

// key handles one key of a mapping.
type key struct {
	name string
	read func(*yaml.Node)
}

// mapping walks a mapping. Unknown and repeated keys are faults: a word that
// is silently ignored is worse than one that is missing.
func (p *parser) mapping(n *yaml.Node, what string, keys []key) {
	if n.Kind != yaml.MappingNode {
		p.bad(n.Line, "%s must be a mapping of %s", what, names(keys))
		return
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if first, dup := seen[k.Value]; dup {
			p.bad(k.Line, "%s is given twice, first in line %d", k.Value, first)
			continue
		}
		seen[k.Value] = k.Line
		found := false
		for _, want := range keys {
			if k.Value == want.name {
				found = true
				if v.Kind == yaml.AliasNode {
					p.bad(v.Line, "%s: aliases are not supported", k.Value)
				} else {
					want.read(v)
				}
			}
		}
		if !found {
			p.bad(k.Line, "unknown key %q in %s; known are %s", k.Value, what, names(keys))
		}
	}
}

func names(keys []key) string {
	var s []string
	for _, k := range keys {
		s = append(s, k.name)
	}
	return strings.Join(s, ", ")
}

// list walks a sequence.
func (p *parser) list(what string, each func(*yaml.Node)) func(*yaml.Node) {
	return func(n *yaml.Node) {
		if n.Kind != yaml.SequenceNode {
			p.bad(n.Line, "%s must be a list", what)
			return
		}
		for _, c := range n.Content {
			if c.Kind == yaml.AliasNode {
				p.bad(c.Line, "%s: aliases are not supported", what)
				continue
			}
			each(c)
		}
	}
}

// text reads a scalar with a conversion that may fail.
func text[T any](p *parser, what string, out *T, convert func(string) (T, error)) func(*yaml.Node) {
	return func(n *yaml.Node) {
		if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
			p.bad(n.Line, "%s must be one word", what)
			return
		}
		v, err := convert(n.Value)
		if err != nil {
			p.bad(n.Line, "%s: %v", what, err)
			return
		}
		*out = v
	}
}

func (p *parser) config(c *Config, n *yaml.Node) {
	approved := map[string]bool{}
	p.mapping(n, "cluster.yaml", []key{
		{"cluster", text(p, "cluster", &c.Cluster, clusterName)},
		{"networks", p.list("networks", func(n *yaml.Node) { p.network(c, n) })},
		{"dns", p.list("dns", func(n *yaml.Node) {
			var a netip.Addr
			text(p, "dns", &a, ipv4)(n)
			if a.IsValid() {
				c.DNS = append(c.DNS, a)
			}
		})},
		{"kernel_args", p.list("kernel_args", func(n *yaml.Node) {
			var w string
			text(p, "kernel_args", &w, kernelArg)(n)
			if w != "" {
				c.KernelArgs = append(c.KernelArgs, w)
			}
		})},
		{"adopt", text(p, "adopt", &c.Adopt, duration)},
		{"approved", p.list("approved", func(n *yaml.Node) {
			var mac string
			text(p, "approved", &mac, parseMAC)(n)
			if approved[mac] {
				p.bad(n.Line, "approved: %s is there twice", mac)
			}
			if mac != "" {
				approved[mac] = true
				c.Approved = append(c.Approved, mac)
			}
		})},
	})
	p.acrossNetworks(c)
}

func (p *parser) network(c *Config, n *yaml.Node) {
	w := Network{line: n.Line}
	p.mapping(n, "a network", []key{
		{"interface", text(p, "interface", &w.Interface, interfaceName)},
		{"subnet", func(n *yaml.Node) { w.subnetLine = n.Line; text(p, "subnet", &w.Subnet, prefix)(n) }},
		{"pool", func(n *yaml.Node) {
			w.poolLine = n.Line
			var r [2]netip.Addr
			text(p, "pool", &r, pool)(n)
			w.First, w.Last = r[0], r[1]
		}},
		{"router", func(n *yaml.Node) { w.routerLine = n.Line; text(p, "router", &w.Router, ipv4)(n) }},
		{"lease_time", text(p, "lease_time", &w.LeaseTime, leaseTime)},
		{"reservations", p.list("reservations", func(n *yaml.Node) { p.reservation(&w, n) })},
	})
	c.Networks = append(c.Networks, w)
}

func (p *parser) reservation(w *Network, n *yaml.Node) {
	r := Reservation{line: n.Line}
	before := p.faults.Len()
	p.mapping(n, "a reservation", []key{
		{"mac", text(p, "mac", &r.MAC, parseMAC)},
		{"address", text(p, "address", &r.Address, ipv4)},
		{"name", text(p, "name", &r.Name, nodeName)},
	})
	switch {
	case p.faults.Len() > before:
		return
	case r.MAC == "":
		p.bad(n.Line, "a reservation needs a mac")
		return
	case !r.Address.IsValid() && r.Name == "":
		p.bad(n.Line, "the reservation of %s gives neither an address nor a name", r.MAC)
		return
	}
	w.Reservations = append(w.Reservations, r)
}

// acrossNetworks checks what must be unique in the whole file.
func (p *parser) acrossNetworks(c *Config) {
	ifs, macs, nodeNames, addrs := map[string]int{}, map[string]int{}, map[string]int{}, map[netip.Addr]int{}
	for i, w := range c.Networks {
		if first, dup := ifs[w.Interface]; dup {
			p.bad(w.line, "interface %q is in the network of line %d already", w.Interface, first)
		}
		ifs[w.Interface] = w.line
		if w.Interface == "" && len(c.Networks) > 1 {
			p.bad(w.line, "with several networks each needs an interface")
		}
		for _, o := range c.Networks[:i] {
			if w.Subnet.IsValid() && o.Subnet.IsValid() && w.Subnet.Overlaps(o.Subnet) {
				p.bad(w.subnetLine, "subnet %s overlaps %s in line %d", w.Subnet, o.Subnet, o.subnetLine)
			}
		}
		for _, r := range w.Reservations {
			if first, dup := macs[r.MAC]; dup {
				p.bad(r.line, "%s has a reservation in line %d already", r.MAC, first)
			}
			if first, dup := nodeNames[r.Name]; dup && r.Name != "" {
				p.bad(r.line, "name %s is used in line %d already", r.Name, first)
			}
			if first, dup := addrs[r.Address]; dup && r.Address.IsValid() {
				p.bad(r.line, "address %s is reserved in line %d already", r.Address, first)
			}
			macs[r.MAC], nodeNames[r.Name], addrs[r.Address] = r.line, r.line, r.line
		}
		if w.Subnet.IsValid() {
			p.checkNetwork(&w)
		}
	}
}

// Names are the node names by MAC.
func (c *Config) Names() map[string]string {
	out := map[string]string{}
	for _, w := range c.Networks {
		for _, r := range w.Reservations {
			if r.Name != "" {
				out[r.MAC] = r.Name
			}
		}
	}
	return out
}

func clusterName(s string) (string, error) { return s, nodename.CheckCluster(s) }

func nodeName(s string) (string, error) { return s, nodename.Check(s) }

func interfaceName(s string) (string, error) {
	// IFNAMSIZ is 16 with the zero at the end (linux/if.h).
	if s == "" || len(s) > 15 || strings.ContainsAny(s, "/ \t\n") {
		return "", fmt.Errorf("%q is not an interface name", s)
	}
	return s, nil
}

func parseMAC(s string) (string, error) {
	m, err := net.ParseMAC(s)
	if err != nil || len(m) != 6 || m[0]&1 != 0 {
		return "", fmt.Errorf("%q is not the Ethernet address of a machine, such as 52:54:00:00:00:01", s)
	}
	return m.String(), nil
}

func ipv4(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	if err != nil || !a.Is4() || a.IsUnspecified() || a.IsMulticast() {
		return netip.Addr{}, fmt.Errorf("%q is not an IPv4 address", s)
	}
	return a, nil
}

func prefix(s string) (netip.Prefix, error) {
	x, err := netip.ParsePrefix(s)
	if err != nil || !x.Addr().Is4() {
		return netip.Prefix{}, fmt.Errorf("%q is not an IPv4 network such as 10.77.0.0/24", s)
	}
	if x.Bits() < 8 || x.Bits() > 30 {
		return netip.Prefix{}, fmt.Errorf("%s has no room for machines, or far too much: want /8 to /30", s)
	}
	if x != x.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s has host bits set; the network is %s", s, x.Masked())
	}
	return x, nil
}

func pool(s string) ([2]netip.Addr, error) {
	a, b, ok := strings.Cut(s, "-")
	first, err1 := ipv4(strings.TrimSpace(a))
	last, err2 := ipv4(strings.TrimSpace(b))
	if !ok || err1 != nil || err2 != nil {
		return [2]netip.Addr{}, fmt.Errorf("%q is not a range such as 10.77.0.100-10.77.0.199", s)
	}
	if last.Less(first) {
		return [2]netip.Addr{}, fmt.Errorf("%s ends before it begins", s)
	}
	return [2]netip.Addr{first, last}, nil
}

func duration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not a time such as 30m or 8h", s)
	}
	return d, nil
}

func leaseTime(s string) (time.Duration, error) {
	d, err := duration(s)
	if err == nil && (d < time.Minute || d > 30*24*time.Hour) {
		err = fmt.Errorf("%s is not between 1m and 720h", s)
	}
	return d, err
}

// kernelArg is one word of a kernel command line. Our own words are not for
// the operator: a second mosimg.head would take machines elsewhere.
func kernelArg(s string) (string, error) {
	switch {
	case s == "" || strings.ContainsAny(s, " \t\r\n${}|&\\\"'#") || strings.Trim(s, printableASCII) != "":
		return "", fmt.Errorf("%q is not one plain word", s)
	case strings.HasPrefix(s, "BOOTIF=") || strings.HasPrefix(s, "initrd="),
		strings.HasPrefix(s, "mosimg.") && s != "mosimg.debug":
		return "", fmt.Errorf("%s is set by the head itself", s)
	}
	return s, nil
}
