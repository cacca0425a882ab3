package modlist

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

var list = &List{Release: "6.12", Modules: []Module{
	{Name: "e1000", Path: "/m/e1000.ko", Aliases: []string{"pci:v00008086d0000100Esv*sd*bc*sc*i*"}},
	{Name: "inet_diag", Path: "/m/inet_diag.ko"},
	{Name: "mii", Path: "/m/mii.ko"},
	{Name: "pcnet32", Path: "/m/pcnet32.ko", Deps: []string{"mii"}, Aliases: []string{"pci:v00001022d00002000sv*sd*bc*sc*i*"}},
	{Name: "tcp_diag", Path: "/m/tcp_diag.ko", Deps: []string{"inet_diag"}, Always: true},
	{Name: "udp_diag", Path: "/m/udp_diag.ko", Deps: []string{"inet_diag"}, Always: true},
}}

func names(ms []Module) []string {
	var n []string
	for _, m := range ms {
		n = append(n, m.Name)
	}
	return n
}

func TestPlansLoadDependenciesFirstAndOnce(t *testing.T) {
	for _, tc := range []struct {
		name string
		got  []Module
		want []string
	}{
		{"always", list.Always(), []string{"inet_diag", "tcp_diag", "udp_diag"}},
		{"hardware", list.ForHardware([]string{"pci:v00001022d00002000sv0sd0bc02sc00i00", "acpi:PNP0F13:"}), []string{"mii", "pcnet32"}},
		{"no such hardware", list.ForHardware([]string{"pci:v00001234d00005678sv0sd0bc02sc00i00"}), nil},
	} {
		if diff := cmp.Diff(tc.want, names(tc.got)); diff != "" {
			t.Errorf("%s: plan (-want +got):\n%s", tc.name, diff)
		}
	}
	plan, unknown := list.Named("e1000", "nope")
	if diff := cmp.Diff([]string{"e1000"}, names(plan)); diff != "" {
		t.Errorf("Named plan (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"nope"}, unknown); diff != "" {
		t.Errorf("Named unknown (-want +got):\n%s", diff)
	}
}

func TestParseRefusesAMissingDependency(t *testing.T) {
	b, err := (&List{Modules: []Module{{Name: "a", Deps: []string{"b"}}}}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(b); err == nil {
		t.Error("Parse accepted a list whose dependency is missing")
	}
	b, _ = list.Marshal()
	if _, err := Parse(b); err != nil {
		t.Errorf("Parse(Marshal(list)) = %v", err)
	}
}
