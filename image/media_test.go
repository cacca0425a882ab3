package image

import (
	"bytes"
	"debug/pe"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/fault"
	"mosimg/internal/imageset"
)

const testPin = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

func withMedia(o *Options) { o.Outputs = Outputs }

// oracle runs a program that knows the format better than we do.
func oracle(t *testing.T, name string, args ...string) string {
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

// Every medium holds the set's own kernel and initramfs, and the command line
// that tells a machine which image it is and where its head is.
func TestMedia(t *testing.T) {
	w := newWorld(t)
	plain := w.mustBuild()
	s := w.mustBuild(withMedia, func(o *Options) { o.Head, o.CA = "https://10.77.0.1:4660", testPin })
	set, err := imageset.Open(w.out)
	if err != nil {
		t.Fatal(err)
	}
	if err := set.Verify(); err != nil {
		t.Error(err)
	}
	if s.ID != plain.ID {
		t.Error("the set has another id with boot media: its nodes would seem to run another image")
	}
	var names []string
	for _, f := range s.Manifest.Files {
		names = append(names, f.Name)
	}
	if diff := cmp.Diff([]string{"boot/snponly.efi", "boot/undionly.kpxe", "head.cpio", "initramfs", "mosimg.efi", "mosimg.img", "mosimg.iso", "mosimg.qcow2", "vmlinuz"}, names); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if strings.Contains(string(readFile(t, set.Path(imageset.HeadArchive))), imageset.ISO) {
		t.Error("the head archive has the boot media in it")
	}
	cmdline := "quiet mosimg.ca=" + testPin + " mosimg.head=https://10.77.0.1:4660 mosimg.image=" + s.ID
	kernel, initrd := readFile(t, set.Path(imageset.Kernel)), readFile(t, set.Path(imageset.Initramfs))

	unified := readFile(t, set.Path(imageset.UKI))
	p, err := pe.NewFile(bytes.NewReader(unified))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{".linux": string(kernel), ".initrd": string(initrd), ".cmdline": cmdline, ".uname": "6.12.1-amd64"} {
		sec := p.Section(name)
		if sec == nil {
			t.Errorf("the unified image has no %s", name)
			continue
		}
		data, err := sec.Data()
		if err != nil || string(data[:sec.VirtualSize]) != want {
			t.Errorf("%s of the unified image = %.60q, %v; want %.60q", name, data, err, want)
		}
	}

	t.Run("disk", func(t *testing.T) {
		disk := set.Path(imageset.Disk)
		if out := oracle(t, "sgdisk", "-v", disk); !strings.Contains(out, "No problems found") {
			t.Errorf("sgdisk -v:\n%s", out)
		}
		esp := partition(t, disk)
		oracle(t, "fsck.fat", "-n", esp)
		for name, want := range map[string][]byte{"VMLINUZ": kernel, "INITRD.IMG": initrd, "EFI/BOOT/BOOTX64.EFI": unified} {
			if got := oracle(t, "mtype", "-i", esp, "::/"+name); got != string(want) {
				t.Errorf("%s has %d bytes and not the set's %d", name, len(got), len(want))
			}
		}
		if menu := oracle(t, "mtype", "-i", esp, "::/SYSLINUX.CFG"); !strings.Contains(menu, "APPEND "+cmdline+"\n") {
			t.Errorf("syslinux.cfg:\n%s", menu)
		}
	})
	t.Run("iso", func(t *testing.T) {
		image := set.Path(imageset.ISO)
		if out := oracle(t, "sgdisk", "-v", image); !strings.Contains(out, "No problems found") {
			t.Errorf("sgdisk -v:\n%s", out)
		}
		esp := partition(t, image)
		oracle(t, "fsck.fat", "-n", esp)
		if got := oracle(t, "mtype", "-i", esp, "::/EFI/BOOT/BOOTX64.EFI"); got != string(unified) {
			t.Error("the EFI partition has another BOOTX64.EFI")
		}
		files := filepath.Join(t.TempDir(), "files")
		oracle(t, "xorriso", "-osirrox", "on", "-indev", image, "-extract", "/", files)
		for name, want := range map[string][]byte{"VMLINUZ": kernel, "INITRD.IMG": initrd} {
			if !bytes.Equal(readFile(t, filepath.Join(files, name)), want) {
				t.Errorf("%s on the ISO is not the set's", name)
			}
		}
		if menu := string(readFile(t, filepath.Join(files, "ISOLINUX.CFG"))); !strings.Contains(menu, "APPEND "+cmdline+"\n") {
			t.Errorf("isolinux.cfg:\n%s", menu)
		}
	})
	t.Run("qcow2", func(t *testing.T) {
		oracle(t, "qemu-img", "check", set.Path(imageset.QCOW2))
		oracle(t, "qemu-img", "compare", set.Path(imageset.QCOW2), set.Path(imageset.Disk))
	})

	// A set without media takes their place.
	w.mustBuild()
	if _, err := os.Stat(filepath.Join(w.out, imageset.ISO)); err == nil {
		t.Error("the old ISO is still there after a build without one")
	}
}

// partition copies the first partition out of an image.
func partition(t *testing.T, disk string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "partition")
	data := readFile(t, disk)
	if err := os.WriteFile(name, data[espAt:len(data)-mib], 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

// qcow2 is made of the disk, which nobody asked for then.
func TestQCOW2Alone(t *testing.T) {
	w := newWorld(t)
	s := w.mustBuild(func(o *Options) { o.Outputs = []string{"qcow2"} })
	if _, ok := s.Manifest.File(imageset.Disk); ok {
		t.Error("the manifest has a disk that nobody asked for")
	}
	if _, err := os.Stat(filepath.Join(w.out, imageset.Disk)); err == nil {
		t.Error("there is a disk that nobody asked for")
	}
	oracle(t, "qemu-img", "check", filepath.Join(w.out, imageset.QCOW2))
}

// What another person builds elsewhere, at another time, with other habits,
// must be the same bytes.
func TestMediaAreReproducible(t *testing.T) {
	w := newWorld(t)
	first := w.mustBuild(withMedia)
	umask := syscall.Umask(0o077)
	defer syscall.Umask(umask)
	for k, v := range map[string]string{"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8", "TZ": "Pacific/Kiritimati", "USER": "somebody", "HOME": os.Getenv("HOME")} {
		t.Setenv(k, v)
	}
	local := time.Local
	time.Local = time.FixedZone("far", 14*3600)
	defer func() { time.Local = local }()
	second := w.mustBuild(withMedia, func(o *Options) { o.Cache, o.Out = t.TempDir(), filepath.Join(t.TempDir(), "x", "y") })
	for _, name := range []string{imageset.UKI, imageset.Disk, imageset.ISO, imageset.QCOW2, imageset.ManifestName} {
		if !bytes.Equal(readFile(t, filepath.Join(first.Dir, name)), readFile(t, filepath.Join(second.Dir, name))) {
			t.Errorf("%s differs", name)
		}
	}
	other := w.mustBuild(withMedia, func(o *Options) { o.Head, o.CA = "https://10.77.0.1:4660", testPin })
	if a, _ := first.Manifest.File(imageset.Disk); a == (imageset.File{}) {
		t.Error("no disk in the manifest")
	} else if b, _ := other.Manifest.File(imageset.Disk); a.SHA256 == b.SHA256 {
		t.Error("the disk does not depend on --head")
	}
	t.Setenv("SOURCE_DATE_EPOCH", "1770000000")
	w.mustBuild(withMedia)
	if list := oracle(t, "xorriso", "-indev", filepath.Join(w.out, imageset.ISO), "-lsl", "/VMLINUZ"); !strings.Contains(list, "Feb  2  2026") {
		t.Errorf("the ISO does not have SOURCE_DATE_EPOCH as its time:\n%s", list)
	}
}

// A suite without the loaders still gives a set, and says what is missing
// when media are asked for.
func TestSuiteWithoutLoaders(t *testing.T) {
	w := newWorld(t)
	w.archive.Remove("trixie", "isolinux")
	w.publish()
	w.mustBuild()
	if _, err := w.build(withMedia); fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "isolinux") {
		t.Errorf("Build = %v; want that isolinux is missing", err)
	}
}
