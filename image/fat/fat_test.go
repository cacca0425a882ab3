package fat

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
	}
	if _, err := os.Stat(path); err != nil {
		t.Skipf("%s, the oracle, is not installed (make test installs it)", name)
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		t.Errorf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func write(t *testing.T, v *Volume) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "volume")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(v.Size()); err != nil {
		t.Fatal(err)
	}
	if err := v.WriteTo(f, 0); err != nil {
		t.Fatal(err)
	}
	return name
}

// fsck.fat finds no fault in volumes of every size of cluster and of the
// sizes at which other writers' tables are too short, and mtools reads back
// what was written.
func TestOracles(t *testing.T) {
	kernel := bytes.Repeat([]byte("kernel! "), 20000)
	for _, free := range []int64{0, 16 << 20, 31 << 20, 64<<20 - 1<<17, 64 << 20, 255 << 20, 300 << 20} {
		t.Run(fmt.Sprint(free>>20), func(t *testing.T) {
			v, err := New(Options{
				Label: "MOSIMG", ID: 0x12345678, Time: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC), Free: free, Hidden: 2048,
				Files: []File{
					{Name: "LDLINUX.SYS", Data: []byte("loader"), System: true}, {Name: "EMPTY", Data: nil},
					{Name: "EFI/BOOT/BOOTX64.EFI", Data: kernel}, {Name: "EFI/A.B", Data: []byte("x")}, {Name: "VMLINUZ", Data: kernel[1:]},
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			disk := write(t, v)
			if out := tool(t, "fsck.fat", "-n", "-v", disk); !strings.Contains(out, "7 files") && !strings.Contains(out, "8 files") {
				t.Errorf("fsck.fat:\n%s", out)
			}
			if got := tool(t, "mtype", "-i", disk, "::/EFI/BOOT/BOOTX64.EFI"); got != string(kernel) {
				t.Errorf("BOOTX64.EFI has %d bytes and not what was written", len(got))
			}
			list := tool(t, "mdir", "-i", disk, "-/", "-a", "::/")
			for _, want := range []string{"MOSIMG", "1234-5678", "BOOTX64  EFI    160000 2026-02-03   4:05", "EMPTY"} {
				if !strings.Contains(list, want) {
					t.Errorf("mdir does not show %q:\n%s", want, list)
				}
			}
			f, err := os.Open(disk)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for name, want := range map[string][]byte{"VMLINUZ": kernel[1:], "EFI/BOOT/BOOTX64.EFI": kernel} {
				at, ok := v.Offset(name)
				got := make([]byte, len(want))
				if _, err := f.ReadAt(got, at); err != nil || !ok || at%Align != 0 || !bytes.Equal(got, want) {
					t.Errorf("Offset(%s) = %d, %v: it is not there (%v)", name, at, ok, err)
				}
			}
		})
	}
}

// A partition cannot hold names that its folder has no place for.
func TestRefusals(t *testing.T) {
	for _, tc := range []struct {
		want string
		o    Options
	}{
		{"label", Options{Label: "far too long a label"}},
		{"8.3", Options{Label: "A", Files: []File{{Name: "initramfs.cpio"}}}},
		{"8.3", Options{Label: "A", Files: []File{{Name: "EFI//X"}}}},
		{"twice", Options{Label: "A", Files: []File{{Name: "X"}, {Name: "X"}}}},
		{"twice", Options{Label: "A", Files: []File{{Name: "X"}, {Name: "X/Y"}}}},
		{"too large", Options{Label: "A", Free: 1 << 45}},
	} {
		if _, err := New(tc.o); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("New(%+v) = %v; want %q", tc.o, err, tc.want)
		}
	}
	v, err := New(Options{Label: "A"})
	if err != nil {
		t.Fatal(err)
	}
	if err := v.SetBootCode(make([]byte, 512)); err == nil {
		t.Error("a sector of zeros counts as a boot sector")
	}
}

func TestStampStaysWithinFAT(t *testing.T) {
	for _, tc := range []struct {
		year        int
		date, clock uint16
	}{{1970, 0x21, 0}, {2026, 46<<9 | 1<<5 | 1, 0}, {2300, 127<<9 | 12<<5 | 31, 23<<11 | 59<<5 | 29}} {
		date, clock := stamp(time.Date(tc.year, 1, 1, 0, 0, 0, 0, time.UTC))
		if date != tc.date || clock != tc.clock {
			t.Errorf("stamp(%d) = %#x, %#x; want %#x, %#x", tc.year, date, clock, tc.date, tc.clock)
		}
	}
}
