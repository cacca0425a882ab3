// Package imagetest makes small image sets for tests.
package imagetest

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"testing"

	"mosimg/internal/imageset"
)

// Files are the content of a complete set whose bytes contain tag.
func Files(tag string) map[string]string {
	files := map[string]string{
		imageset.Kernel:      "kernel " + tag,
		imageset.Initramfs:   "initramfs " + tag,
		imageset.HeadArchive: "head archive " + tag,
	}
	for _, b := range []string{"undionly.kpxe", "ipxe.pxe", "snponly.efi", "ipxe.efi"} {
		files[imageset.BootDir+"/"+b] = b + " " + tag
	}
	return files
}

// Make writes a set into dir and returns its id.
func Make(t testing.TB, dir, arch string, files map[string]string) string {
	t.Helper()
	m := &imageset.Manifest{Format: imageset.Format, Arch: arch, Profile: "test", KernelArgs: []string{"quiet"}}
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		m.Files = append(m.Files, imageset.File{Name: name, Size: int64(len(text)), SHA256: Sum(text)})
	}
	m.ID = m.ComputeID()
	if err := m.Write(dir); err != nil {
		t.Fatal(err)
	}
	return m.ID
}

// Publish makes a set in a store and points the link of its arch at it, as a
// build does.
func Publish(t testing.TB, store, arch string, files map[string]string) string {
	t.Helper()
	tmp, err := os.MkdirTemp(store, "new")
	if err != nil {
		t.Fatal(err)
	}
	id := Make(t, tmp, arch, files)
	if err := os.Rename(tmp, filepath.Join(store, id)); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(store, "."+imageset.CurrentLink(arch))
	if err := os.Symlink(id, link); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link, filepath.Join(store, imageset.CurrentLink(arch))); err != nil {
		t.Fatal(err)
	}
	return id
}

// Sum is the hex SHA-256 of a text.
func Sum(text string) string {
	s := sha256.Sum256([]byte(text))
	return hex.EncodeToString(s[:])
}
