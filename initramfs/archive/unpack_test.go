package archive

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// What was written in two parts comes out again, and nothing of what lies elsewhere.
func TestUnpack(t *testing.T) {
	one, two := &Tree{}, &Tree{}
	one.File("usr/lib/x/bin/prog", 0o755, []byte("program"))
	one.File("etc/other", 0o644, []byte("other"))
	two.File("usr/lib/x/lib/libc", 0o644, []byte("library"))
	two.Symlink("usr/lib/x/lib/libc.so", "libc")
	two.File("usr/lib/xy", 0o644, []byte("a neighbour"))
	parts := [][]byte{write(t, one), write(t, two)}
	var plain, packed bytes.Buffer
	for _, p := range parts {
		plain.Write(p)
		e, err := zstd.NewWriter(&packed)
		if err != nil {
			t.Fatal(err)
		}
		e.Write(p)
		e.Close()
		packed.Write(make([]byte, 3)) // padding
	}
	for name, data := range map[string][]byte{"plain": plain.Bytes(), "zstd": packed.Bytes()} {
		dir := t.TempDir()
		if _, err := Unpack(bytes.NewReader(data), "usr/lib/x", dir); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for file, want := range map[string]string{"bin/prog": "program", "lib/libc.so": "library"} {
			if got, err := os.ReadFile(filepath.Join(dir, file)); err != nil || string(got) != want {
				t.Errorf("%s: %s = %q, %v; want %q", name, file, got, err, want)
			}
		}
		if fi, err := os.Stat(filepath.Join(dir, "bin/prog")); err != nil || fi.Mode().Perm() != 0o755 {
			t.Errorf("%s: bin/prog: %v, %v; want it executable", name, fi, err)
		}
		if all, _ := os.ReadDir(dir); len(all) != 2 {
			t.Errorf("%s: %d entries; want bin and lib only", name, len(all))
		}
	}
	if _, err := Unpack(bytes.NewReader(plain.Bytes()), "opt", t.TempDir()); err == nil {
		t.Error("nothing to unpack is no error")
	}
	if _, err := Unpack(bytes.NewReader(plain.Bytes()[:200]), "usr", t.TempDir()); err == nil {
		t.Error("a cut archive is no error")
	}
}

func FuzzUnpack(f *testing.F) {
	tree := &Tree{}
	tree.File("a/b", 0o644, []byte("x"))
	tree.Symlink("a/c", "../..")
	var b bytes.Buffer
	tree.Write(&b)
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<16 {
			return
		}
		dir := t.TempDir()
		Unpack(bytes.NewReader(data), "a", filepath.Join(dir)) //nolint:errcheck // it must not leave dir, nor panic
	})
}
