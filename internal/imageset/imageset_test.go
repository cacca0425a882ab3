package imageset

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mosimg/internal/fault"
)

// writeSet makes a small image set in dir.
func writeSet(t *testing.T, dir, kernel string) *Manifest {
	t.Helper()
	m := &Manifest{Format: Format, Arch: "amd64", KernelArgs: []string{"quiet"}}
	for name, content := range map[string]string{Kernel: kernel, Initramfs: "initramfs", BootDir + "/snponly.efi": "efi", HeadArchive: "head of " + kernel} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(content))
		m.Files = append(m.Files, File{Name: name, Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:])})
	}
	m.ID = m.ComputeID()
	if err := m.Write(dir); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestOpenAndVerify(t *testing.T) {
	dir := t.TempDir()
	writeSet(t, dir, "kernel")
	s, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(); err != nil {
		t.Errorf("Verify of a good set = %v", err)
	}
	if err := os.WriteFile(s.Path(Kernel), []byte("Kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(); fault.KindOf(err) != fault.Untrusted {
		t.Errorf("Verify of a changed kernel = %v; want an Untrusted fault", err)
	}
	if err := os.WriteFile(s.Path(Kernel), []byte("short"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); fault.KindOf(err) != fault.Untrusted {
		t.Errorf("Open with a truncated kernel = %v; want an Untrusted fault", err)
	}
	if _, err := Open(t.TempDir()); fault.KindOf(err) != fault.NotFound {
		t.Errorf("Open of an empty folder = %v; want NotFound", err)
	}
}

func TestIDIsThatOfWhatANodeBoots(t *testing.T) {
	a := writeSet(t, t.TempDir(), "kernel")
	if a.ComputeID() != a.WithoutHead().ComputeID() {
		t.Error("the id changes when the head archive is taken out: a head would serve another set than was built")
	}
	b := writeSet(t, t.TempDir(), "other kernel")
	if a.ID == b.ID {
		t.Error("two kernels, one id")
	}
	c := *a
	c.KernelArgs = []string{"debug"}
	if c.ComputeID() == a.ID {
		t.Error("kernel arguments are not part of the id")
	}
	for _, name := range []string{UKI, Disk, ISO, QCOW2} {
		m := writeSet(t, t.TempDir(), "kernel")
		m.Files = append(m.Files, File{Name: name, Size: 1, SHA256: strings.Repeat("0", 64)})
		if m.ComputeID() != m.ID {
			t.Errorf("the id depends on %s, which is made of the set", name)
		}
		if _, ok := m.WithoutHead().File(name); ok {
			t.Errorf("a head would look for %s", name)
		}
	}
}

func TestParseManifestRefusesPathsOutsideTheSet(t *testing.T) {
	for _, name := range []string{"../etc/shadow", "/etc/shadow", "boot/../../x", "", ".", `a\b`, "a//b"} {
		m := writeSet(t, t.TempDir(), "kernel")
		m.Files = append(m.Files, File{Name: name, SHA256: strings.Repeat("0", 64)})
		m.ID = m.ComputeID()
		b, _ := m.Marshal()
		if _, err := ParseManifest(b); err == nil {
			t.Errorf("ParseManifest accepted the file name %q", name)
		}
	}
}

func TestOpenStore(t *testing.T) {
	store := t.TempDir()
	if _, err := OpenStore(store); fault.KindOf(err) != fault.NotFound {
		t.Errorf("OpenStore of an empty store = %v; want NotFound", err)
	}
	old := writeSet(t, filepath.Join(store, "old"), "old kernel")
	if err := os.Symlink("old", filepath.Join(store, CurrentLink("amd64"))); err != nil {
		t.Fatal(err)
	}
	sets, err := OpenStore(store)
	if err != nil || sets["amd64"] == nil || sets["amd64"].Manifest.ID != old.ID {
		t.Fatalf("OpenStore = %v, %v; want the set that the link names", sets, err)
	}
	if strings.Contains(sets["amd64"].Dir, "current") {
		t.Error("the set is opened through the link: a publish would mix two sets")
	}
	if err := os.Symlink("old", filepath.Join(store, CurrentLink("386"))); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenStore(store); err == nil {
		t.Error("OpenStore accepted an amd64 set as the current one for 386")
	}
	if sets, err := OpenStore(filepath.Join(store, "old")); err != nil || sets["amd64"] == nil {
		t.Errorf("OpenStore of a single set = %v, %v", sets, err)
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`{"format":1,"files":[{"name":"vmlinuz","sha256":""}]}`))
	f.Fuzz(func(_ *testing.T, b []byte) { ParseManifest(b) })
}
