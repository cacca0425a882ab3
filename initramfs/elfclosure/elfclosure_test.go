package elfclosure

import (
	"debug/elf"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mosimg/initramfs/elftest"
)

func lib(needed ...string) File { return File{Data: elftest.File{Needed: needed}.Bytes()} }

func TestResolve(t *testing.T) {
	files := Files{
		"usr/sbin/criu":                                 {Data: elftest.File{Needed: []string{"liba.so.1", "libc.so.6"}, Interp: "/lib64/ld-linux-x86-64.so.2"}.Bytes()},
		"usr/lib/x86_64-linux-gnu/liba.so.1":            {Link: "liba.so.1.2.3"},
		"usr/lib/x86_64-linux-gnu/liba.so.1.2.3":        lib("libb.so", "libc.so.6"),
		"usr/lib/libb.so":                               {Link: "/usr/lib/private/libb-9.so"},
		"usr/lib/private/libb-9.so":                     {Data: elftest.File{Needed: []string{"libc.so.6", "libp.so"}, RunPath: "$ORIGIN/more:/nonexistent"}.Bytes()},
		"usr/lib/private/more/libp.so":                  lib("liba.so.1"), // a circle
		"usr/lib/x86_64-linux-gnu/libc.so.6":            lib("ld-linux-x86-64.so.2"),
		"usr/lib64/ld-linux-x86-64.so.2":                {Link: "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"},
		"usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2": lib(),
		"usr/lib/x86_64-linux-gnu/libunused.so":         lib("libmissing.so"),
	}
	got, err := files.Resolve([]string{"usr/sbin/criu"}, elf.EM_X86_64)
	if err != nil {
		t.Fatal(err)
	}
	want := []Library{
		{"ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"},
		{"liba.so.1", "usr/lib/x86_64-linux-gnu/liba.so.1.2.3"},
		{"libb.so", "usr/lib/private/libb-9.so"},
		{"libc.so.6", "usr/lib/x86_64-linux-gnu/libc.so.6"},
		{"libp.so", "usr/lib/private/more/libp.so"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Resolve (-want +got):\n%s", diff)
	}
}

// An image with a library missing or of another machine boots, and fails at
// the first migration. So the build fails, and says who needs what.
func TestResolveRefuses(t *testing.T) {
	const dir = "usr/lib/x86_64-linux-gnu/"
	for _, tc := range []struct {
		name  string
		files Files
		want  []string
	}{
		{"missing", Files{"p": lib("liba.so"), dir + "liba.so": lib("libgone.so.3")}, []string{dir + "liba.so needs libgone.so.3"}},
		{"missing loader", Files{"p": {Data: elftest.File{Interp: "/lib64/ld.so"}.Bytes()}}, []string{"p needs ld.so"}},
		{"foreign library", Files{"p": lib("liba.so"), dir + "liba.so": {Data: elftest.File{Machine: elf.EM_AARCH64}.Bytes()}}, []string{dir + "liba.so is for EM_AARCH64"}},
		{"foreign program", Files{"p": {Data: elftest.File{Machine: elf.EM_ARM}.Bytes()}}, []string{"p is for EM_ARM"}},
		{"not ELF", Files{"p": {Data: []byte("#!/bin/sh")}}, []string{"p is not a readable ELF file"}},
		{"no such program", Files{}, []string{"p is not there"}},
		{"dangling link", Files{"p": lib("liba.so"), dir + "liba.so": {Link: "liba.so.1"}}, []string{"p needs liba.so", "liba.so.1 is not there"}},
		{"link circle", Files{"p": lib("liba.so"), dir + "liba.so": {Link: "liba.so"}}, []string{"p needs liba.so", "too many"}},
	} {
		_, err := tc.files.Resolve([]string{"p"}, elf.EM_X86_64)
		if err == nil {
			t.Errorf("%s: Resolve succeeded", tc.name)
			continue
		}
		for _, want := range tc.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: Resolve = %v; want %q in it", tc.name, err, want)
			}
		}
	}
}

// A real program of this machine, if it is a dynamic one, needs a libc.
func TestResolveReadsRealFiles(t *testing.T) {
	data, err := os.ReadFile("/bin/sh")
	if err != nil || !IsELF(data) {
		t.Skip("/bin/sh is not an ELF program here")
	}
	if f, err := elf.Open("/bin/sh"); err != nil || f.Machine != elf.EM_X86_64 {
		t.Skip("this machine is not x86-64")
	}
	files := Files{"sh": {Data: data}}
	for _, pattern := range []string{"libc.so.6", "ld-linux-*", "libtinfo.so.*", "libedit.so.*"} {
		names, _ := filepath.Glob("/usr/lib/x86_64-linux-gnu/" + pattern)
		for _, n := range names {
			if b, err := os.ReadFile(n); err == nil {
				files[strings.TrimPrefix(n, "/")] = File{Data: b}
			}
		}
	}
	if len(files) == 1 {
		t.Skip("this machine has its libraries elsewhere than Debian")
	}
	libs, err := files.Resolve([]string{"sh"}, elf.EM_X86_64)
	if err != nil {
		t.Fatal(err)
	}
	if len(libs) < 2 {
		t.Errorf("Resolve(/bin/sh) = %v; want libc and the loader at least", libs)
	}
}

func FuzzResolve(f *testing.F) {
	f.Add(elftest.File{Needed: []string{"liba.so"}, Interp: "/x", RunPath: "$ORIGIN"}.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		files := Files{"p": {Data: data}, "usr/lib/liba.so": lib()}
		_, _ = files.Resolve([]string{"p"}, elf.EM_X86_64)
	})
}
