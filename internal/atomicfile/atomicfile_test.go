package atomicfile

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func TestAFailedWriteLeavesTheOldFileAndNoDebris(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	if err := Write(name, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	full := errors.New("disk full")
	err := WriteFunc(name, 0o600, func(w io.Writer) error {
		w.Write([]byte("half of the ne"))
		return full
	})
	if !errors.Is(err, full) {
		t.Errorf("WriteFunc = %v; want the writer's error", err)
	}
	if b, _ := os.ReadFile(name); string(b) != "old" {
		t.Errorf("file is %q; want the old content", b)
	}
	if es, _ := os.ReadDir(dir); len(es) != 1 {
		t.Errorf("%d files in the folder; want 1", len(es))
	}
}

func TestModeIsWhatWasAskedWhateverTheUmask(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	if err := Write(name, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if st, _ := os.Stat(name); st.Mode().Perm() != 0o644 {
		t.Errorf("mode = %v; want 0644", st.Mode().Perm())
	}
}
