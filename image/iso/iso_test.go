package iso

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mosimg/image/mediatest"
)

func options() Options {
	return Options{
		Label: "MOSIMG", Time: time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC), Blocks: 512, BIOS: "ISOLINUX.BIN",
		Files: []File{{"VMLINUZ.", 40, 5000}, {"ISOLINUX.BIN", 30, 5000}, {"INITRD.IMG", 41, 3000}},
		UEFI:  File{"efi", 40, 470 * BlockSize},
	}
}

// xorriso reads the image: its files, of which one lies within another's
// place, and its two boot entries.
func TestOracle(t *testing.T) {
	if _, err := exec.LookPath("xorriso"); err != nil {
		t.Skip("xorriso, the oracle, is not installed (make test installs it)")
	}
	o := options()
	head, err := Head(o)
	if err != nil {
		t.Fatal(err)
	}
	image := make([]byte, int64(o.Blocks)*BlockSize)
	copy(image[systemArea*BlockSize:], head)
	for i := FirstFree * BlockSize; i < len(image); i++ {
		image[i] = byte(i / 7)
	}
	program, err := PatchISOLINUX(mediatest.ISOLINUX(), 30)
	if err != nil {
		t.Fatal(err)
	}
	copy(image[30*BlockSize:], program)
	dir := t.TempDir()
	name := filepath.Join(dir, "iso")
	if err := os.WriteFile(name, image, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("xorriso", "-indev", name, "-report_el_torito", "plain", "-osirrox", "on", "-extract", "/", filepath.Join(dir, "files")).CombinedOutput()
	if err != nil {
		t.Fatalf("xorriso: %v\n%s", err, out)
	}
	for _, want := range []string{"Volume id    : 'MOSIMG'", "El Torito boot img :   1  BIOS  y   none  0x0000  0x00      4          30", "El Torito boot img :   2  UEFI  y   none  0x0000  0x00   1880          40", "boot-info-table"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("xorriso does not say %q:\n%s", want, out)
		}
	}
	for _, f := range o.Files {
		got, err := os.ReadFile(filepath.Join(dir, "files", strings.TrimSuffix(f.Name, ".")))
		if want := image[int64(f.Block)*BlockSize:][:f.Size]; err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v", f.Name, len(got), err)
		}
	}
}

// A FAT image of 32 MiB and more has no place for its size: cut to 16 bits it
// would be a boot entry of some other length.
func TestLargeUEFIImageHasNoSize(t *testing.T) {
	o := options()
	o.Blocks, o.UEFI.Size = 1<<20, 40<<20
	head, err := Head(o)
	if err != nil {
		t.Fatal(err)
	}
	entry := head[(catalogBlock-systemArea)*BlockSize+96:]
	if got := binary.LittleEndian.Uint16(entry[6:]); got != 0 {
		t.Errorf("sectors = %d; want 0, up to the end of the medium", got)
	}
}

func TestRefusals(t *testing.T) {
	for _, tc := range []struct {
		want   string
		change func(*Options)
	}{
		{"label", func(o *Options) { o.Label = "a b" }},
		{"8.3", func(o *Options) { o.Files[0].Name = "vmlinuz" }},
		{"twice", func(o *Options) { o.Files[0].Name = "INITRD.IMG" }},
		{"within", func(o *Options) { o.Files[0].Block = 2 }},
		{"within", func(o *Options) { o.UEFI.Size = 1 << 31 }},
		{"BIOS", func(o *Options) { o.BIOS = "X" }},
	} {
		o := options()
		tc.change(&o)
		if _, err := Head(o); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("Head = %v; want %q", err, tc.want)
		}
	}
	if _, err := PatchISOLINUX(make([]byte, 5000), 30); err == nil {
		t.Error("PatchISOLINUX accepts anything")
	}
	if _, err := HybridMBR(make([]byte, 440), 30, 1); err == nil {
		t.Error("HybridMBR accepts a boot code of another size")
	}
	if mbr, err := HybridMBR(make([]byte, hybridCode), 30, 1); err != nil || len(mbr) != 446 || mbr[hybridCode] != 120 {
		t.Errorf("HybridMBR = %d bytes, %v", len(mbr), err)
	}
}
