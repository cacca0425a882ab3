package kmod

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mosimg/initramfs/elftest"
	"mosimg/internal/modlist"
)

// kernel makes a Kernel from modules given as path -> modinfo.
func kernel(modules map[string]string) *Kernel {
	k := &Kernel{Release: "6.12", Builtin: ParseBuiltin([]byte("kernel/fs/fuse/fuse.ko\nkernel/drivers/virtio/virtio_pci.ko\n")), Paths: map[string]string{}}
	for p := range modules {
		k.Paths[Name(p)] = p
	}
	k.Read = func(p string) ([]byte, error) {
		return elftest.File{Modinfo: append(strings.Split(modules[p], ";"), "name="+Name(p))}.Bytes(), nil
	}
	return k
}

var modules = map[string]string{
	"kernel/net/ipv4/tcp_diag.ko.xz":      "depends=inet-diag",
	"kernel/net/ipv4/inet_diag.ko.xz":     "depends=",
	"kernel/drivers/net/r8169.ko.xz":      "depends=libphy,mii;softdep=pre: realtek post: other;alias=pci:v000010ECd00008168sv*sd*bc*sc*i*;alias=r8169-thing;firmware=rtl_nic/a.fw",
	"kernel/drivers/net/phy/libphy.ko.xz": "depends=mdio",
	"kernel/drivers/net/mdio.ko":          "depends=",
	"kernel/drivers/net/mii.ko.xz":        "depends=",
	"kernel/drivers/net/realtek.ko.xz":    "depends=libphy",
	"kernel/lib/libcrc32c.ko.xz":          "softdep=pre: crc32c",
	"kernel/crypto/crc32c_generic.ko.xz":  "alias=crc32c;alias=crypto-crc32c",
	"kernel/arch/x86/crypto/a-intel.ko":   "alias=crc32c",
	"kernel/net/nf_tables.ko.xz":          "depends=libcrc32c;softdep=pre: nowhere fuse",
	"kernel/drivers/net/via-rhine.ko.xz":  "depends=mii",
	"kernel/a.ko":                         "depends=b",
	"kernel/b.ko":                         "depends=a",
	"kernel/c.ko":                         "depends=gone",
}

func TestSelect(t *testing.T) {
	got, err := kernel(modules).Select([]string{"r8169", "via-rhine", "virtio_pci"}, []string{"tcp_diag", "nf_tables", "fuse"})
	if err != nil {
		t.Fatal(err)
	}
	const dir = "/usr/lib/modules/6.12/kernel/"
	want := &modlist.List{Release: "6.12", Modules: []modlist.Module{
		{Name: "crc32c_generic", Path: dir + "crypto/crc32c_generic.ko"},
		{Name: "inet_diag", Path: dir + "net/ipv4/inet_diag.ko"},
		{Name: "libcrc32c", Path: dir + "lib/libcrc32c.ko", Deps: []string{"crc32c_generic"}},
		{Name: "libphy", Path: dir + "drivers/net/phy/libphy.ko", Deps: []string{"mdio"}},
		{Name: "mdio", Path: dir + "drivers/net/mdio.ko"},
		{Name: "mii", Path: dir + "drivers/net/mii.ko"},
		{Name: "nf_tables", Path: dir + "net/nf_tables.ko", Deps: []string{"crc32c_generic", "libcrc32c"}, Always: true},
		{Name: "r8169", Path: dir + "drivers/net/r8169.ko", Deps: []string{"mdio", "libphy", "realtek", "mii"}, Aliases: []string{"pci:v000010ECd00008168sv*sd*bc*sc*i*"}},
		{Name: "realtek", Path: dir + "drivers/net/realtek.ko", Deps: []string{"mdio", "libphy"}},
		{Name: "tcp_diag", Path: dir + "net/ipv4/tcp_diag.ko", Deps: []string{"inet_diag"}, Always: true},
		{Name: "via_rhine", Path: dir + "drivers/net/via-rhine.ko", Deps: []string{"mii"}},
	}}
	for i := range got.Modules {
		if len(got.Modules[i].Deps) == 0 {
			got.Modules[i].Deps = nil
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Select (-want +got):\n%s", diff)
	}
	// What the node reads must accept what we write.
	data, err := got.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := modlist.Parse(data); err != nil {
		t.Errorf("modlist.Parse of the list: %v", err)
	}
}

func TestSelectRefuses(t *testing.T) {
	for _, tc := range []struct{ module, want string }{
		{"nope", "no module nope"},
		{"a", "need each other"},
		{"c", "c needs gone, which kernel 6.12 does not have"},
	} {
		if _, err := kernel(modules).Select([]string{tc.module}, nil); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("Select(%s) = %v; want %q", tc.module, err, tc.want)
		}
	}
	_, err := kernel(modules).Select([]string{"x1", "mii"}, []string{"x2"})
	if err == nil || !strings.Contains(err.Error(), "x1, x2") {
		t.Errorf("Select with two unknown modules = %v; want both named", err)
	}
}

func TestReadFaultIsTold(t *testing.T) {
	k := kernel(modules)
	k.Read = func(p string) ([]byte, error) { return nil, fmt.Errorf("%s: broken", p) }
	if _, err := k.Select([]string{"mii"}, nil); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("Select = %v; want the read fault", err)
	}
	k.Read = func(string) ([]byte, error) { return []byte("not a module"), nil }
	if _, err := k.Select([]string{"mii"}, nil); err == nil || !strings.Contains(err.Error(), "mii") {
		t.Errorf("Select of garbage = %v; want the path named", err)
	}
}

func TestName(t *testing.T) {
	for in, want := range map[string]string{
		"via-rhine": "via_rhine", "kernel/net/via-rhine.ko.xz": "via_rhine", "8139too.ko": "8139too", "x/crc32c-intel.ko.zst": "crc32c_intel",
	} {
		if got := Name(in); got != want {
			t.Errorf("Name(%q) = %q; want %q", in, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(elftest.File{Modinfo: []string{"depends=a,b", "softdep=pre: c"}}.Bytes())
	f.Add([]byte("depends=a\x00alias=b"))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = Parse(data)
		for _, d := range parseModinfo(data).Depends {
			if d == "" || strings.Contains(d, "-") {
				t.Errorf("dependency %q is not a module name", d)
			}
		}
	})
}
