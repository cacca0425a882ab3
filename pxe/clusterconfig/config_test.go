package clusterconfig

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"mosimg/internal/fault"
)

func TestParse(t *testing.T) {
	got, err := Parse("cluster.yaml", []byte(`
cluster: attic
dns: [10.77.0.1, 9.9.9.9]
kernel_args: [console=ttyS0, mosimg.debug]
adopt: 30m
approved: ["52:54:00:00:00:0A"]
networks:
  - interface: eth1
    subnet: 10.77.0.0/24
    pool: 10.77.0.100-10.77.0.199
    router: 10.77.0.254
    lease_time: 10m
    reservations:
      - mac: 52:54:00:00:00:01
        address: 10.77.0.11
        name: render1
      - {mac: 52:54:00:00:00:02, name: render2}
  - interface: eth2
`))
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddr
	want := &Config{
		Cluster: "attic", DNS: []netip.Addr{at("10.77.0.1"), at("9.9.9.9")},
		KernelArgs: []string{"console=ttyS0", "mosimg.debug"}, Adopt: 30 * time.Minute, Approved: []string{"52:54:00:00:00:0a"},
		Networks: []Network{
			{Interface: "eth1", Subnet: netip.MustParsePrefix("10.77.0.0/24"), First: at("10.77.0.100"), Last: at("10.77.0.199"),
				Router: at("10.77.0.254"), LeaseTime: 10 * time.Minute, Reservations: []Reservation{
					{MAC: "52:54:00:00:00:01", Address: at("10.77.0.11"), Name: "render1"}, {MAC: "52:54:00:00:00:02", Name: "render2"}}},
			{Interface: "eth2"},
		},
	}
	opts := cmp.Options{cmpopts.IgnoreUnexported(Config{}, Network{}, Reservation{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })}
	if d := cmp.Diff(want, got, opts); d != "" {
		t.Errorf("Parse (-want +got):\n%s", d)
	}
	if d := cmp.Diff(map[string]string{"52:54:00:00:00:01": "render1", "52:54:00:00:00:02": "render2"}, got.Names()); d != "" {
		t.Errorf("Names (-want +got):\n%s", d)
	}
}

func TestEmptyFilesAreFine(t *testing.T) {
	for _, text := range []string{"", "# nothing yet\n", "{}", "---\n"} {
		if c, err := Parse("c.yaml", []byte(text)); err != nil || len(c.Networks) != 0 {
			t.Errorf("Parse(%q) = %+v, %v; want an empty configuration", text, c, err)
		}
	}
}

// All faults come at once, each with its line.
func TestAllFaultsWithLines(t *testing.T) {
	_, err := Parse("/etc/mosimg/cluster.yaml", []byte(`cluster: "Attic PC"
netwoks: []
adopt: soon
adopt: 5m
kernel_args: ["a b", mosimg.nonce=x]
dns: 10.0.0.1
approved: [52:54:00:00:00:01, 52:54:00:00:00:01, nonsense]
networks:
  - interface: eth1
    subnet: 10.77.0.0/24
    pool: 10.78.0.100-10.78.0.199
    router: 10.1.1.1
    reservations:
      - {mac: 52:54:00:00:00:01, address: 10.77.0.11}
      - {mac: 52:54:00:00:00:01, address: 10.77.0.12}
      - {mac: 52:54:00:00:00:02, address: 10.77.0.11}
      - {address: 10.77.0.13}
      - {mac: 52:54:00:00:00:03}
      - {mac: 52:54:00:00:00:04, address: 10.99.0.1}
      - {mac: 01:00:5e:00:00:04, addr: 10.77.0.3}
  - interface: eth1
    subnet: 10.77.0.128/25
    pool: 10.77.0.199-10.77.0.140
    lease_time: 1s
  - subnet: 10.80.0.5/24
  - interface: eth9
    subnet: 10.90.0.0/24
    pool: 10.90.0.10-10.90.0.20
    reservations: [{mac: 52:54:00:00:00:07, address: 10.90.0.15}, {mac: 52:54:00:00:00:08, address: 10.90.0.255}]
`))
	if fault.KindOf(err) != fault.Usage {
		t.Fatalf("Parse = %v; want a usage fault", err)
	}
	text := err.Error()
	for _, want := range []string{
		"cluster.yaml:1: cluster:",
		`cluster.yaml:2: unknown key "netwoks"`,
		`cluster.yaml:3: adopt: "soon"`,
		"cluster.yaml:4: adopt is given twice, first in line 3",
		"cluster.yaml:5: kernel_args: \"a b\"",
		"cluster.yaml:5: kernel_args: mosimg.nonce=x",
		"cluster.yaml:6: dns must be a list",
		"cluster.yaml:7: approved: 52:54:00:00:00:01 is there twice",
		`cluster.yaml:7: approved: "nonsense"`,
		"cluster.yaml:11: pool 10.78.0.100-10.78.0.199 is outside the subnet 10.77.0.0/24",
		"cluster.yaml:12: router 10.1.1.1",
		"cluster.yaml:15: 52:54:00:00:00:01 has a reservation in line 14",
		"cluster.yaml:16: address 10.77.0.11 is reserved in line 14",
		"cluster.yaml:17: a reservation needs a mac",
		"cluster.yaml:18: the reservation of 52:54:00:00:00:03 gives neither",
		"cluster.yaml:19: reserved address 10.99.0.1 is not an address in",
		"cluster.yaml:20: mac:",
		`cluster.yaml:20: unknown key "addr"`,
		`cluster.yaml:21: interface "eth1" is in the network of line 9`,
		"cluster.yaml:22: subnet 10.77.0.128/25 overlaps 10.77.0.0/24",
		"cluster.yaml:23: pool:",
		"cluster.yaml:24: lease_time: 1s",
		"cluster.yaml:25: subnet: 10.80.0.5/24 has host bits set; the network is 10.80.0.0/24",
		"cluster.yaml:25: with several networks each needs an interface",
		"cluster.yaml:29: reserved address 10.90.0.15 overlaps the pool",
		"cluster.yaml:29: reserved address 10.90.0.255 is not an address in",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no fault %q in:\n%s", want, text)
		}
	}
}

func TestNotYAML(t *testing.T) {
	for _, text := range []string{"a: [", "\tx: 1", "- 1\n- 2", "just text", "a: &x 1\nb: *x", "cluster: [a]", "networks: {a: b}", "? [a]\n: b", "cluster: null"} {
		if c, err := Parse("c.yaml", []byte(text)); err == nil || !strings.Contains(err.Error(), "line") && !strings.Contains(err.Error(), "c.yaml:") {
			t.Errorf("Parse(%q) = %+v, %v; want a fault with a line", text, c, err)
		}
	}
	if _, err := Load("/nonexistent/c.yaml"); fault.KindOf(err) != fault.Usage {
		t.Errorf("Load of a missing file = %v", err)
	}
}

func TestResolve(t *testing.T) {
	for _, tt := range []struct {
		name, yaml, server string
		first, last        string
		fault              string
	}{
		{name: "defaults", yaml: "", server: "10.77.0.1/24", first: "10.77.0.128", last: "10.77.0.254"},
		{name: "a /30 has one machine", yaml: "", server: "10.77.0.1/30", first: "10.77.0.2", last: "10.77.0.2"},
		{name: "a /16", yaml: "", server: "10.77.0.1/16", first: "10.77.128.0", last: "10.77.255.254"},
		{name: "the pool may be given without the subnet", yaml: "pool: 10.77.0.5-10.77.0.6", server: "10.77.0.1/24", first: "10.77.0.5", last: "10.77.0.6"},
		{name: "pool outside the interface's subnet", yaml: "pool: 10.78.0.5-10.78.0.6", server: "10.77.0.1/24", fault: "outside the subnet 10.77.0.0/24"},
		{name: "subnet of another interface", yaml: "subnet: 10.78.0.0/24", server: "10.77.0.1/24", fault: "does not contain the head's address"},
		{name: "pool to the broadcast address", yaml: "pool: 10.77.0.5-10.77.0.255", server: "10.77.0.1/24", fault: "broadcast"},
		{name: "a machine with the head's address", yaml: "reservations: [{mac: 52:54:00:00:00:01, address: 10.77.0.1}]", server: "10.77.0.1/24", fault: "head's own address"},
		{name: "reservation in the default pool", yaml: "reservations: [{mac: 52:54:00:00:00:01, address: 10.77.0.200}]", server: "10.77.0.1/24", fault: "overlaps the pool"},
		{name: "a pool of the head's address", yaml: "pool: 10.77.0.1-10.77.0.1", server: "10.77.0.1/24", fault: "no address but the head's own"},
		{name: "a /31 has no machines", yaml: "", server: "10.77.0.0/31", fault: "no room"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := Network{Interface: "eth1"}
			c := new(Config)
			if tt.yaml != "" {
				var err error
				if c, err = Parse("c.yaml", []byte("networks:\n  - "+tt.yaml)); err != nil {
					t.Fatal(err)
				}
				w = c.Networks[0]
			}
			got, err := c.Resolve(w, netip.MustParsePrefix(tt.server))
			if tt.fault != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fault) {
					t.Errorf("Resolve = %v; want a fault that says %q", err, tt.fault)
				}
				return
			}
			if err != nil || got.First.String() != tt.first || got.Last.String() != tt.last {
				t.Errorf("Resolve = pool %v-%v, %v; want %s-%s", got.First, got.Last, err, tt.first, tt.last)
			}
		})
	}
}

// The sample that is shipped must be right.
func TestSample(t *testing.T) {
	data, err := os.ReadFile("../../configs/cluster.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse("cluster.yaml", data); err != nil {
		t.Fatal(err)
	}
	// With all its comments taken off it must be right, too.
	var full strings.Builder
	for line := range strings.Lines(string(data)) {
		full.WriteString(strings.TrimPrefix(line, "#: "))
	}
	c, err := Parse("cluster.yaml", []byte(full.String()))
	if err != nil {
		t.Fatalf("%v\n%s", err, full.String())
	}
	if len(c.Networks) == 0 || len(c.Networks[0].Reservations) == 0 || len(c.KernelArgs) == 0 || len(c.DNS) == 0 || len(c.Approved) == 0 {
		t.Errorf("the sample does not show everything: %+v", c)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("cluster: a\nnetworks:\n  - interface: eth1\n    pool: 10.0.0.1-10.0.0.2\n")
	f.Add("networks: [{subnet: 10.0.0.0/8, reservations: [{mac: 52:54:00:00:00:01, name: a}]}]")
	f.Add("a: &a [*a]")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse("c.yaml", []byte(text))
		if err == nil {
			for _, n := range c.Networks {
				c.Resolve(n, netip.MustParsePrefix("10.77.0.1/24"))
			}
		}
	})
}
