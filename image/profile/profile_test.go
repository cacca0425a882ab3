package profile

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/fault"
)

func TestBuiltinProfilesAreSound(t *testing.T) {
	if len(Names()) == 0 {
		t.Fatal("there are no built-in profiles")
	}
	for _, n := range Names() {
		p, err := Load(n)
		if err != nil || p.Name != n || p.Arch == "" {
			t.Errorf("Load(%s) = %+v, %v", n, p, err)
		}
	}
}

func TestUsersProfileChangesOnlyItsKeys(t *testing.T) {
	base, err := Load(Default)
	if err != nil {
		t.Fatal(err)
	}
	want := *base
	want.Name = "lab"
	want.Kernel.Args = []string{"console=ttyS1"}
	want.Modules.Hardware = []string{"virtio_net"}
	want.Boot.Files = map[string]string{"a.efi": "usr/lib/ipxe/a.efi"}
	file := filepath.Join(t.TempDir(), "lab.yaml")
	text := "kernel:\n  args: [console=ttyS1]\nmodules:\n  hardware: [virtio_net]\nboot:\n  files: {a.efi: usr/lib/ipxe/a.efi}\n"
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&want, got); diff != "" {
		t.Errorf("Load (-want +got):\n%s", diff)
	}
	want = *base
	want.Name = "empty"
	if got, err = Parse("empty", nil); err != nil || cmp.Diff(&want, got) != "" {
		t.Errorf("an empty profile = %v, %v; want the default", got, err)
	}
}

// All faults of a file are told in one go, each with its line: nobody should
// have to build ten times to correct ten typing errors.
func TestAllFaultsAtOnce(t *testing.T) {
	_, err := Parse("mine", []byte(`arch: arm64
suite: "Trixie!"
kernal: {}
kernel:
  package: "Linux Image"
  args: ["a b", ok]
modules:
  always: not-a-list
  hardware: [ok, "../bad"]
boot:
  files:
    x/y: /abs
utilities: [ls]
head:
  packages:
    - name: dash
      bonly: [x]
    - name: B@D
  follow: ["["]
`))
	if fault.KindOf(err) != fault.Usage {
		t.Fatalf("Parse = %v; want a usage fault", err)
	}
	for _, want := range []string{
		`line 1: arch: "arm64" is not amd64 or 386`,
		`line 2: suite: "Trixie!"`,
		`line 3: unknown key "kernal"`,
		`line 5: kernel.package: "Linux Image"`,
		`line 6: kernel.args[0]: "a b" is not one word`,
		`line 8: must be a list, not the word "not-a-list"`,
		`line 9: modules.hardware[1]: "../bad"`,
		`line 12: boot.files.x/y: "x/y" is not a plain file name`,
		`line 12: boot.files.x/y: "/abs" is not the path`,
		`line 13: utilities: gosh`,
		`line 17: unknown key "bonly"`,
		`line 18: head.packages[1].name: "B@D"`,
		`line 19: head.follow[0]: "[" is not a pattern`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in:\n%v", want, err)
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, tc := range []struct{ name, want string }{
		{"nope", "there are: x86_64"},
		{"", "there are: x86_64"},
		{filepath.Join(dir, "none.yaml"), "no such file"},
		{dir + "/", "is a directory"},
		{write("syntax.yaml", "a: [b\n"), "line"},
		{write("list.yaml", "- a\n"), "line 1: must be keys and values, not a list"},
		{write("base.yaml", "base: other\n"), `"other"`},
		{write("twice.yaml", "arch: amd64\narch: amd64\n"), "already defined"},
		{write("big.yaml", strings.Repeat("#", maxFile+1)), "more than"},
		{write("bomb.yaml", "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: &f [*e,*e,*e,*e,*e,*e,*e]\nutilities: *f\n"), ""},
	} {
		_, err := Load(tc.name)
		if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("Load(%s) = %v; want a usage fault with %q", tc.name, err, tc.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("arch: amd64\nhead:\n  packages: [{name: dash}]\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := Parse("x", data); err == nil && (p.Arch == "" || p.Kernel.Package == "") {
			t.Errorf("accepted a profile without arch or kernel: %+v", p)
		}
	})
}
