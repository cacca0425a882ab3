package syslinux

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"mosimg/image/mediatest"
)

// The installer itself is the oracle: on the same volume it and we must put
// the same bytes into the boot sector and into ldlinux.sys.
func TestInstallsAsTheInstallerDoes(t *testing.T) {
	installer, err := exec.LookPath("syslinux")
	if err != nil {
		t.Skip("syslinux, the oracle, is not installed (make test installs it)")
	}
	program, err := os.ReadFile(installer)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Extract(program)
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	run(t, "truncate", "-s", "64M", disk)
	run(t, "mkfs.fat", "-F", "32", "-s", "1", disk)
	run(t, installer, "--install", disk)
	theirs := run(t, "mtype", "-i", disk, "::/ldlinux.sys")
	image, err := os.ReadFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	// mshowfat names the clusters: "<3-118>".
	_, where, _ := strings.Cut(run(t, "mshowfat", "-i", disk, "::/ldlinux.sys"), "<")
	from, _, _ := strings.Cut(where, "-")
	cluster, err := strconv.Atoi(from)
	if err != nil {
		t.Fatalf("mshowfat: %q: %v", where, err)
	}
	le := binary.LittleEndian
	first := int(le.Uint16(image[14:])) + int(image[16])*int(le.Uint32(image[36:])) + cluster - 2
	boot, file := l.Install(uint64(first))
	if !bytes.Equal(file, []byte(theirs)) {
		t.Errorf("ldlinux.sys is not the installer's: %d and %d bytes", len(file), len(theirs))
	}
	if len(file) != l.Size() {
		t.Errorf("Size() = %d; want %d", l.Size(), len(file))
	}
	if !bytes.Equal(boot[:11], image[:11]) || !bytes.Equal(boot[90:], image[90:512]) {
		t.Errorf("the boot sector is not the installer's:\n%x\n%x", boot, image[:512])
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	c := exec.Command(name, args...)
	c.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	c.Path = lookPath(t, name)
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s%s", name, args, err, out, stderr.String())
	}
	return string(out)
}

// lookPath finds programs that a user's PATH may lack.
func lookPath(t *testing.T, name string) string {
	t.Helper()
	for _, n := range []string{name, "/usr/sbin/" + name} {
		if p, err := exec.LookPath(n); err == nil {
			return p
		}
	}
	t.Skipf("%s is not installed (make test installs it)", name)
	return ""
}

func FuzzExtract(f *testing.F) {
	f.Add(mediatest.Installer(64))
	f.Add([]byte("\r\nSYSLINUX "))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := Extract(b)
		if err != nil {
			return
		}
		if _, file := l.Install(2052); len(file) != l.Size() {
			t.Errorf("Install gave %d bytes; want %d", len(file), l.Size())
		}
	})
}

// A program of another version must be refused, not half understood.
func TestExtractRefusals(t *testing.T) {
	for _, tc := range []struct {
		name string
		harm func(b []byte) []byte
		want string
	}{
		{"none", func(b []byte) []byte { return b }, ""},
		{"something else", func([]byte) []byte { return []byte("\x7fELF") }, "no ldlinux.sys"},
		{"no boot sector", func(b []byte) []byte { b[0] = 0; return b }, "no ldlinux.sys"},
		{"cut off", func(b []byte) []byte { return b[:len(b)-7] }, "no end"},
		{"no patch area", func(b []byte) []byte { b[512+24] = 0; return b }, "no patch area"},
		{"extended area outside", func(b []byte) []byte { b[512+24+patchExtArea+1] = 0xff; return b }, "extended"},
		{"extents outside", func(b []byte) []byte { b[512+600+extExtents+1] = 0xff; return b }, "another version"},
		{"too few extents", func(b []byte) []byte { b[512+600+extExtentCount] = 0; return b }, "another version"},
	} {
		_, err := Extract(tc.harm(mediatest.Installer(64)))
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: Extract = %v; want %q", tc.name, err, tc.want)
		}
	}
}
