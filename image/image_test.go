package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/mkuimage/cpio"

	"mosimg/image/debian"
	"mosimg/image/debian/debiantest"
	"mosimg/image/mediatest"
	"mosimg/image/profile"
	"mosimg/image/steps"
	"mosimg/initramfs/elftest"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/internal/modlist"
)

// world is all that a build needs, small: a signed archive with packages that
// hold a few bytes, and a checkout with three tiny programs.
type world struct {
	t       *testing.T
	archive *debiantest.Archive
	source  string
	cache   string
	out     string
	profile *profile.Profile
}

// kernelImage of a test: the header of the boot protocol and no code.
func fakeKernel() string {
	b := make([]byte, 0x400)
	copy(b[0x202:], "HdrS")
	b[0x236] = 1
	return string(b)
}

func module(name string, info ...string) string {
	return string(elftest.File{Modinfo: append(info, "name="+name)}.Bytes())
}

func program(interp bool, needed ...string) string {
	f := elftest.File{Needed: needed}
	if interp {
		f.Interp = "/lib64/ld-linux-x86-64.so.2"
	}
	return string(f.Bytes())
}

const copyright = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\nFiles: *\nLicense: MIT\n"

func newWorld(t *testing.T) *world {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("there is no go command here")
	}
	a, err := debiantest.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	const lib, mods = "usr/lib/x86_64-linux-gnu/", "usr/lib/modules/6.12.1-amd64/"
	a.Add("trixie",
		debiantest.Package{Name: "linux-image-amd64", Version: "6.12.1-1", Fields: map[string]string{"Depends": "linux-image-6.12.1-amd64 (= 6.12.1-1)"}},
		debiantest.Package{Name: "linux-image-6.12.1-amd64", Version: "6.12.1-1", Fields: map[string]string{"Depends": "kmod", "Source": "linux-signed (6.12.1+1)"}, Files: map[string]string{
			"boot/vmlinuz-6.12.1-amd64": fakeKernel(), mods + "modules.builtin": "kernel/fs/fuse/fuse.ko\n",
			mods + "kernel/net/mii.ko": module("mii"), mods + "kernel/net/r8169.ko": module("r8169", "depends=mii", "alias=pci:v1d2*"),
			mods + "kernel/net/unused.ko":                                module("unused"),
			"usr/share/doc/linux-image-6.12.1-amd64/copyright":           copyright,
			"usr/share/doc/linux-image-6.12.1-amd64/changelog.Debian.gz": "x",
		}},
		debiantest.Package{Name: "criu", Version: "4.1.1-1", Fields: map[string]string{"Depends": "libc6, libnet1"}, Files: map[string]string{
			"usr/sbin/criu": program(true, "libnet.so.1", "libc.so.6"), "usr/share/doc/criu/copyright": "GPL\n",
		}},
		debiantest.Package{Name: "libnet1", Version: "1.3-2", Files: map[string]string{
			lib + "libnet.so.1": "-> libnet.so.1.3", lib + "libnet.so.1.3": program(false, "libc.so.6"), "usr/share/doc/libnet1": "-> libc6",
		}},
		debiantest.Package{Name: "libc6", Version: "2.41-1", Files: map[string]string{
			lib + "libc.so.6": program(false, "ld-linux-x86-64.so.2"), lib + "ld-linux-x86-64.so.2": program(false), "usr/lib64/ld-linux-x86-64.so.2": "-> /" + lib + "ld-linux-x86-64.so.2",
			"usr/share/doc/libc6/copyright": copyright,
		}},
		debiantest.Package{Name: "libunneeded", Version: "1", Files: map[string]string{lib + "libunneeded.so": program(false)}},
		debiantest.Package{Name: "ipxe", Version: "1.21", Arch: "all", Files: map[string]string{"usr/lib/ipxe/undionly.kpxe": "bios", "usr/lib/ipxe/ipxe-amd64.efi": "efi", "usr/lib/ipxe/snponly.efi": "-> ipxe-amd64.efi"}},
		debiantest.Package{Name: "dash", Version: "0.5", Fields: map[string]string{"Depends": "libc6, tool-minimal, libunneeded"}, Files: map[string]string{
			"bin/dash": program(true, "libc.so.6"), "usr/share/man/man1/dash.1": "manual", "usr/share/doc/dash/copyright": copyright,
		}},
		debiantest.Package{Name: "systemd-boot-efi", Version: "257", Files: map[string]string{"usr/lib/systemd/boot/efi/linuxx64.efi.stub": string(mediatest.Stub()), "usr/share/doc/systemd-boot-efi/copyright": copyright}},
		debiantest.Package{Name: "syslinux", Version: "6.04", Files: map[string]string{"usr/bin/syslinux": string(mediatest.Installer(64))}},
		debiantest.Package{Name: "syslinux-common", Version: "6.04", Arch: "all", Files: map[string]string{
			"usr/lib/syslinux/mbr/gptmbr.bin": strings.Repeat("g", 440), "usr/lib/syslinux/modules/bios/ldlinux.c32": "module",
		}},
		debiantest.Package{Name: "isolinux", Version: "6.04", Arch: "all", Files: map[string]string{
			"usr/lib/ISOLINUX/isolinux.bin": string(mediatest.ISOLINUX()), "usr/lib/ISOLINUX/isohdpfx.bin": strings.Repeat("h", 432),
		}},
		debiantest.Package{Name: "tool-minimal", Version: "1", Files: map[string]string{"usr/bin/tool": "#!/bin/sh\n"}},
	)
	w := &world{t: t, archive: a, source: t.TempDir(), cache: t.TempDir(), out: filepath.Join(t.TempDir(), "out")}
	w.publish()
	for name, text := range map[string]string{
		"go.mod":                                        "module mosimg\n\ngo 1.25\n",
		"cmd/mosagent/main.go":                          "package main\n\nfunc main() { println(\"agent\") }\n",
		"cmd/mosimg/main.go":                            "package main\n\nfunc main() { println(\"tool\") }\n",
		"initramfs/uroot/go.mod":                        "module mosimg/initramfs/uroot\n\ngo 1.25\n\nrequire github.com/u-root/u-root v0.0.0\n\nreplace github.com/u-root/u-root => ./u-root\n",
		"initramfs/uroot/main.go":                       fakeURoot,
		"initramfs/uroot/u-root/go.mod":                 "module github.com/u-root/u-root\n\ngo 1.25\n",
		"initramfs/uroot/u-root/cmds/core/gosh/main.go": "package main\n\nfunc main() {}\n",
	} {
		w.write(name, text)
	}
	w.profile = &profile.Profile{
		Name: "test", Arch: "amd64", Suite: "trixie",
		Kernel:    profile.Kernel{Package: "linux-image-amd64", Args: []string{"quiet"}},
		Modules:   profile.Modules{Hardware: []string{"r8169"}, Always: []string{"fuse"}},
		CRIU:      profile.CRIU{Package: "criu"},
		Boot:      profile.Boot{Package: "ipxe", Files: map[string]string{"undionly.kpxe": "usr/lib/ipxe/undionly.kpxe", "snponly.efi": "usr/lib/ipxe/snponly.efi"}},
		Utilities: []string{"gosh"}, Tools: []string{"mosmon"},
		Head: profile.Head{Packages: []profile.HeadPackage{{Name: "dash"}}, Follow: []string{"*-minimal"}, Links: map[string]string{"usr/bin/sh": "dash"}},
	}
	return w
}

// fakeURoot stands for the program in initramfs/uroot: it takes the same
// arguments and writes an archive with one file.
const fakeURoot = `package main

import (
	"flag"
	"fmt"
	"os"
)

func main() {
	out := flag.String("o", "", "")
	flag.String("tmp", "", "")
	flag.String("arch", "", "")
	flag.Parse()
	entry := func(name, body string, mode int) string {
		pad := func(s string) string { return s + "\x00\x00\x00"[:(4-len(s)%4)%4] }
		h := "070701"
		for _, v := range []int{0, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(name) + 1, 0} {
			h += fmt.Sprintf("%08X", v)
		}
		return pad(h+name+"\x00") + pad(body)
	}
	text := entry("bbin", "", 0o040755) + entry("bbin/bb", "busybox", 0o100755) + entry("TRAILER!!!", "", 0)
	if err := os.WriteFile(*out, []byte(text), 0o644); err != nil {
		panic(err)
	}
}
`

func (w *world) write(name, text string) {
	w.t.Helper()
	path := filepath.Join(w.source, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) publish() {
	w.t.Helper()
	if err := w.archive.Publish(); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) options() Options {
	return Options{
		Profile: w.profile, Out: w.out, Mirror: "file://" + w.archive.Root, Keyring: w.archive.Keyring,
		Cache: w.cache, Source: w.source, host: &debian.Host{},
	}
}

func (w *world) build(change ...func(*Options)) (*Summary, error) {
	o := w.options()
	for _, c := range change {
		c(&o)
	}
	return Build(w.t.Context(), o)
}

func (w *world) mustBuild(change ...func(*Options)) *Summary {
	w.t.Helper()
	s, err := w.build(change...)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// noDebris checks that a build left nothing but dir beside it, and nothing
// unfinished in its cache.
func (w *world) noDebris(dir string) {
	w.t.Helper()
	entries, err := os.ReadDir(filepath.Dir(dir))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != filepath.Base(dir) {
			w.t.Errorf("the build left %s beside its output", e.Name())
		}
	}
	left, _ := os.ReadDir(filepath.Join(w.cache, "tmp"))
	if len(left) != 0 {
		w.t.Errorf("the build left %v in the cache's tmp", left)
	}
}

// unpack reads concatenated archives as the kernel does.
func unpack(t *testing.T, data []byte) map[string]cpio.Record {
	t.Helper()
	files := make(map[string]cpio.Record)
	add := func(r cpio.Record) error { files[r.Name] = r; return nil }
	for len(data) > 0 {
		switch {
		case data[0] == 0:
			data = data[1:]
		case bytes.HasPrefix(data, []byte("070701")): // to the end: ours has it last
			if err := cpio.ForEachRecord(cpio.Newc.Reader(bytes.NewReader(data)), add); err != nil {
				t.Fatal(err)
			}
			data = nil
		default:
			plain, n := unzstd(t, data)
			if err := cpio.ForEachRecord(cpio.Newc.Reader(bytes.NewReader(plain)), add); err != nil {
				t.Fatal(err)
			}
			data = data[n:]
		}
	}
	return files
}

func TestBuild(t *testing.T) {
	w := newWorld(t)
	s := w.mustBuild()
	set, err := imageset.Open(w.out)
	if err != nil {
		t.Fatal(err)
	}
	if err := set.Verify(); err != nil {
		t.Error(err)
	}
	m := set.Manifest
	if s.ID != m.ID || s.Dir != w.out || m.KernelRelease != "6.12.1-amd64" || m.CRIUVersion != "4.1.1" || m.Profile != "test" || m.Compression != "zstd" || !m.Created.Equal(w.archive.Date) {
		t.Errorf("summary %+v, manifest %+v", s, m)
	}
	var names []string
	for _, f := range m.Files {
		names = append(names, f.Name)
	}
	if diff := cmp.Diff([]string{"boot/snponly.efi", "boot/undionly.kpxe", "head.cpio", "initramfs", "vmlinuz"}, names); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	var packages []string
	for _, p := range m.Packages {
		packages = append(packages, fmt.Sprintf("%s %s %s %s", p.Name, p.Version, p.Used, p.Licence))
	}
	want := []string{
		"criu 4.1.1-1 node see copyright", "dash 0.5 head MIT", "ipxe 1.21 boot see copyright", "libc6 2.41-1 node MIT", "libc6 2.41-1 head MIT",
		"libnet1 1.3-2 node MIT", "linux-image-6.12.1-amd64 6.12.1-1 node MIT", "tool-minimal 1 head see copyright",
	}
	if diff := cmp.Diff(want, packages); diff != "" {
		t.Errorf("packages (-want +got):\n%s", diff)
	}

	node := unpack(t, readFile(t, set.Path(imageset.Initramfs)))
	for name, want := range map[string]string{
		"init": "usr/bin/mosagent", "bin": "usr/bin", "lib64": "usr/lib64", "usr/bin/mosmon": "mosagent", "usr/bin/sh": "../../bbin/gosh", "bbin/bb": "busybox",
		"etc/mosimg/image.json": `{"profile":"test","version":"dev"}` + "\n",
	} {
		if got := text(t, node, name); got != want {
			t.Errorf("%s = %q; want %q", name, got, want)
		}
	}
	for _, name := range []string{"usr/lib/mosimg/criu/bin/criu", "usr/lib/mosimg/criu/lib/libnet.so.1", "usr/lib/mosimg/criu/lib/ld-linux-x86-64.so.2", "dev/console", "usr/bin/mosagent"} {
		if _, ok := node[name]; !ok {
			t.Errorf("the initramfs has no %s", name)
		}
	}
	mods, err := modlist.Parse([]byte(text(t, node, "usr/lib/mosimg/modules.json")))
	if err != nil {
		t.Fatal(err)
	}
	for _, mod := range mods.Modules {
		if _, ok := node[strings.TrimPrefix(mod.Path, "/")]; !ok {
			t.Errorf("module %s is listed but not in the initramfs", mod.Path)
		}
	}
	if len(mods.Modules) != 2 {
		t.Errorf("modules = %+v; want mii and r8169", mods.Modules)
	}

	head := unpack(t, readFile(t, set.Path(imageset.HeadArchive)))
	inside := headImages + "/" + m.ID
	for name, want := range map[string]string{
		"usr/bin/sh": "dash", headImages + "/current-amd64": m.ID, inside + "/vmlinuz": fakeKernel(), "usr/bin/tool": "#!/bin/sh\n",
		"usr/lib64/ld-linux-x86-64.so.2": "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
	} {
		if got := text(t, head, name); got != want {
			t.Errorf("head archive: %s = %.40q; want %.40q", name, got, want)
		}
	}
	if strings.Contains(text(t, head, "etc/passwd"), "demo:x:1000:1000:") == false || head["home/demo"].UID != 1000 {
		t.Error("the head archive has no user demo with a home")
	}
	for _, name := range []string{"usr/share/man/man1/dash.1", "usr/lib/x86_64-linux-gnu/libunneeded.so", "bin/dash", "bin"} {
		if _, ok := head[name]; ok {
			t.Errorf("the head archive has %s", name)
		}
	}
	// The set in the head archive is one that a head can serve.
	stored, err := imageset.ParseManifest([]byte(text(t, head, inside+"/manifest.json")))
	if err != nil || stored.ID != m.ID {
		t.Errorf("manifest in the head archive: %+v, %v", stored, err)
	}
	w.noDebris(w.out)
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func text(t *testing.T, files map[string]cpio.Record, name string) string {
	t.Helper()
	r, ok := files[name]
	if !ok {
		t.Errorf("there is no %s", name)
		return ""
	}
	b := make([]byte, r.FileSize)
	if _, err := r.ReadAt(b, 0); err != nil && len(b) > 0 {
		t.Errorf("read %s: %v", name, err)
	}
	return string(b)
}

// Anybody must be able to check that an image is what its sources say.
func TestTwoBuildsInDifferentPlacesAreEqual(t *testing.T) {
	w := newWorld(t)
	first := w.mustBuild()
	moved := filepath.Join(t.TempDir(), "elsewhere")
	if err := os.CopyFS(moved, os.DirFS(w.source)); err != nil {
		t.Fatal(err)
	}
	second := w.mustBuild(func(o *Options) { o.Source, o.Cache, o.Out = moved, t.TempDir(), filepath.Join(t.TempDir(), "x", "y") })
	if first.ID != second.ID {
		t.Errorf("ids %.12s and %.12s; want the same", first.ID, second.ID)
	}
	for _, f := range append(first.Manifest.Files, imageset.File{Name: imageset.ManifestName}) {
		if !bytes.Equal(readFile(t, filepath.Join(first.Dir, f.Name)), readFile(t, filepath.Join(second.Dir, f.Name))) {
			t.Errorf("%s differs", f.Name)
		}
	}
	t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
	dated := w.mustBuild()
	if dated.ID == first.ID || dated.Manifest.Created.Unix() != 1000000000 {
		t.Errorf("with SOURCE_DATE_EPOCH: id %.12s, created %v", dated.ID, dated.Manifest.Created)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	if _, err := w.build(); fault.KindOf(err) != fault.Usage {
		t.Errorf("SOURCE_DATE_EPOCH=yesterday: %v", err)
	}
}

func built(s *Summary) (names []string) {
	for _, st := range s.Steps {
		if !st.Reused && st.Why != nil {
			names = append(names, st.Name)
		}
	}
	sort.Strings(names)
	return names
}

// The promise of the builder: what did not change is not built.
func TestOnlyWhatChangedIsBuilt(t *testing.T) {
	w := newWorld(t)
	first := w.mustBuild()
	if got := built(first); len(got) != 9 {
		t.Errorf("cold build built %v; want all nine steps", got)
	}
	s := w.mustBuild()
	if got := built(s); len(got) != 0 || s.ID != first.ID {
		t.Errorf("warm build built %v, id %.12s", got, s.ID)
	}
	w.write("cmd/mosagent/main.go", "package main\n\nfunc main() { println(\"other agent\") }\n")
	s = w.mustBuild()
	if diff := cmp.Diff([]string{stepAgent}, built(s)); diff != "" || s.ID == first.ID {
		t.Errorf("agent changed (-want +got):\n%s", diff)
	}
	for _, st := range s.Steps {
		if st.Name == stepAgent && !slices.Contains(st.Why, "source cmd/mosagent/main.go changed") {
			t.Errorf("why = %q; want the file that changed", st.Why)
		}
	}
	w.archive.Add("trixie", debiantest.Package{Name: "libnet1", Version: "1.3-3", Files: map[string]string{"usr/lib/x86_64-linux-gnu/libnet.so.1": program(false, "libc.so.6")}})
	w.publish()
	s = w.mustBuild()
	if diff := cmp.Diff([]string{stepCRIU, "packages"}, built(s)); diff != "" {
		t.Errorf("a library of CRIU changed (-want +got):\n%s", diff)
	}
	w.profile.Modules.Hardware = []string{"mii"}
	if diff := cmp.Diff([]string{stepKernel}, built(w.mustBuild())); diff != "" {
		t.Errorf("module list changed (-want +got):\n%s", diff)
	}
}

// Every way in which a build can fail names its cause and leaves the old
// image set, or nothing.
func TestRefusals(t *testing.T) {
	base := newWorld(t)
	old := base.mustBuild()
	for _, tc := range []struct {
		name   string
		change func(w *world, o *Options)
		kind   fault.Kind
		want   string
		cold   bool // with an empty cache
	}{
		{"386", func(_ *world, o *Options) { o.Arch = "386" }, fault.Usage, "amd64 only", false},
		{"unknown arch", func(_ *world, o *Options) { o.Arch = "vax" }, fault.Usage, "there are amd64 and 386", false},
		{"unknown output", func(_ *world, o *Options) { o.Outputs = []string{"pxe", "floppy"} }, fault.Usage, "--outputs floppy: this version of mosimg makes: pxe", false},
		{"head without CA", func(_ *world, o *Options) { o.Outputs, o.Head = []string{"uki"}, "https://10.0.0.1:4660" }, fault.Usage, "belong together", false},
		{"head without media", func(_ *world, o *Options) { o.Head, o.CA = "https://10.0.0.1:4660", testPin }, fault.Usage, "--outputs uki", false},
		{"head in clear", func(_ *world, o *Options) {
			o.Outputs, o.Head, o.CA = []string{"uki"}, "http://10.0.0.1:4660", testPin
		}, fault.Usage, "https://ADDRESS:PORT", false},
		{"CA is no pin", func(_ *world, o *Options) {
			o.Outputs, o.Head, o.CA = []string{"uki"}, "https://10.0.0.1:4660", "sha256:12"
		}, fault.Usage, "64-HEX-DIGITS", false},
		{"stub of another kind", func(w *world, o *Options) {
			o.Outputs = []string{"iso"}
			w.replace("systemd-boot-efi", map[string]string{"usr/lib/systemd/boot/efi/linuxx64.efi.stub": "MZ"})
		}, fault.Environment, "read the stub", false},
		{"syslinux of another kind", func(w *world, o *Options) {
			o.Outputs = []string{"disk"}
			w.replace("syslinux", map[string]string{"usr/bin/syslinux": "ELF"})
		}, fault.Environment, "no ldlinux.sys", false},
		{"loader is missing", func(w *world, o *Options) {
			o.Outputs = []string{"uki"}
			w.replace("isolinux", map[string]string{"usr/lib/ISOLINUX/isolinux.bin": "x"})
		}, fault.Internal, "isohdpfx.bin", false},
		{"command line is too long", func(w *world, o *Options) {
			o.Outputs = []string{"uki"}
			w.profile.Kernel.Args = []string{strings.Repeat("x", 2048)}
		}, fault.Usage, "a kernel takes 2047", false},
		{"no checkout", func(w *world, o *Options) { o.Source = w.cache }, fault.Usage, "--source", false},
		{"checkout is gone", func(_ *world, o *Options) { o.Source = "/nonexistent" }, fault.Usage, "no such folder", false},
		{"program does not compile", func(w *world, _ *Options) { w.write("cmd/mosagent/main.go", "package main\n\nfunc main() { no }\n") }, fault.Environment, "undefined: no", false},
		{"program is missing", func(w *world, _ *Options) { os.RemoveAll(filepath.Join(w.source, "cmd")) }, fault.Environment, "mosagent", false},
		{"unknown module", func(w *world, _ *Options) { w.profile.Modules.Always = []string{"warp_drive"} }, fault.Usage, "warp_drive", false},
		{"unknown package", func(w *world, _ *Options) { w.profile.Head.Packages[0].Name = "emacs" }, fault.NotFound, "emacs", false},
		{"unknown file of a package", func(w *world, _ *Options) { w.profile.Head.Packages[0].Only = []string{"usr/bin/none"} }, fault.Usage, "usr/bin/none", false},
		{"unknown boot loader", func(w *world, _ *Options) { w.profile.Boot.Files["x"] = "usr/lib/ipxe/none" }, fault.Internal, "usr/lib/ipxe/none", false},
		{"library is missing", func(w *world, _ *Options) {
			w.archive.Add("trixie", debiantest.Package{Name: "libnet1", Version: "2", Files: map[string]string{"usr/lib/x86_64-linux-gnu/other.so": "x"}})
			w.publish()
		}, fault.Environment, "usr/sbin/criu needs libnet.so.1", false},
		{"kernel for 32 bit", func(w *world, _ *Options) { w.kernel(strings.Replace(fakeKernel(), "\x01", "\x00", 1)) }, fault.Internal, "32-bit", false},
		{"kernel is something else", func(w *world, _ *Options) { w.kernel("MZ") }, fault.Internal, "not an x86 kernel", false},
		{"tampered package", func(w *world, _ *Options) {
			if err := w.archive.Write("pool/main/criu_4.1.1-1_amd64.deb", []byte("evil")); err != nil {
				w.t.Fatal(err)
			}
		}, fault.NotFound, "criu_4.1.1-1_amd64.deb", true},
		{"no such mirror", func(_ *world, o *Options) { o.Mirror = "file:///nonexistent" }, fault.Unavailable, "no such file", false},
		{"wrong keyring", func(w *world, o *Options) {
			other, err := debiantest.New(w.t.TempDir())
			if err != nil {
				w.t.Fatal(err)
			}
			o.Keyring = other.Keyring
		}, fault.Untrusted, "bad signature", false},
		{"cache is a file", func(w *world, o *Options) { o.Cache = w.archive.Keyring }, fault.Environment, "open cache", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			if err := os.CopyFS(w.out, os.DirFS(base.out)); err != nil {
				t.Fatal(err)
			}
			if !tc.cold {
				w.cache = base.cache
			}
			o := w.options()
			tc.change(w, &o)
			_, err := Build(t.Context(), o)
			if err == nil || fault.KindOf(err) != tc.kind || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("Build = %v (kind %d); want kind %d with %q", err, fault.KindOf(err), tc.kind, tc.want)
			}
			set, err := imageset.Open(w.out)
			if err != nil || set.Verify() != nil || set.Manifest.ID != old.ID {
				t.Errorf("the old image set is not as it was: %v", err)
			}
			w.noDebris(w.out)
		})
	}
}

// replace publishes a newer version of a package.
func (w *world) replace(name string, files map[string]string) {
	w.t.Helper()
	w.archive.Add("trixie", debiantest.Package{Name: name, Version: "999", Files: files})
	w.publish()
}

// kernel publishes a newer kernel package with this as its kernel.
func (w *world) kernel(image string) {
	w.t.Helper()
	w.archive.Add("trixie",
		debiantest.Package{Name: "linux-image-amd64", Version: "6.13-1", Fields: map[string]string{"Depends": "linux-image-6.13-amd64"}},
		debiantest.Package{Name: "linux-image-6.13-amd64", Version: "6.13-1", Files: map[string]string{"boot/vmlinuz-6.13-amd64": image}})
	w.publish()
}

// A build that is interrupted, at whatever moment, leaves the old image set
// and no debris.
func TestInterruptionAtEveryMoment(t *testing.T) {
	w := newWorld(t)
	old := w.mustBuild()
	w.cache = t.TempDir() // cold again, so that every step has work to do
	for n := 1; ; n++ {
		w.write("cmd/mosagent/main.go", fmt.Sprintf("package main\n\nfunc main() { println(%d) }\n", n))
		ctx, cancel := context.WithCancel(t.Context())
		o := w.options()
		o.Outputs = Outputs
		seen := 0
		o.Report = func(steps.Event) {
			if seen++; seen == n {
				cancel()
			}
		}
		_, err := Build(ctx, o)
		cancel()
		if err == nil {
			if n < 5 {
				t.Errorf("only %d moments were tried", n)
			}
			break
		}
		if !errors.Is(err, context.Canceled) {
			t.Errorf("interrupted at event %d: %v; want context.Canceled", n, err)
		}
		if set, err := imageset.Open(w.out); err != nil || set.Manifest.ID != old.ID {
			t.Errorf("interrupted at event %d: the old image set is gone: %v", n, err)
		}
		w.noDebris(w.out)
	}
	set, err := imageset.Open(w.out)
	if err != nil || set.Verify() != nil || set.Manifest.ID == old.ID {
		t.Errorf("the build that was let run gave %v", err)
	}
}

func TestConcurrentBuilds(t *testing.T) {
	w := newWorld(t)
	outs := []string{w.out, w.out, filepath.Join(t.TempDir(), "b")}
	ids := make([]string, len(outs))
	var all sync.WaitGroup
	for i, out := range outs {
		all.Go(func() {
			s, err := w.build(func(o *Options) { o.Out = out })
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = s.ID
		})
	}
	all.Wait()
	if ids[0] == "" || ids[0] != ids[1] || ids[1] != ids[2] {
		t.Errorf("ids = %q; want three times the same", ids)
	}
	w.noDebris(w.out)
}

func TestSummaryIsJSON(t *testing.T) {
	data, err := json.Marshal(&Summary{Dir: "d", Steps: []StepTime{{Name: "a", Seconds: 0.5}}})
	if err != nil || !strings.Contains(string(data), `"seconds":0.5`) {
		t.Errorf("%s, %v", data, err)
	}
}
