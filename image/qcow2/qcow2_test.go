package qcow2

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// qemu-img finds no fault, and the same bytes as in the source.
func TestOracle(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Skip("qemu-img, the oracle, is not installed (make test installs it)")
	}
	for _, size := range []int64{512, 65536, 65536 + 512, 5<<20 - 512, 520 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			dir := t.TempDir()
			raw, image := create(t, dir, "raw"), create(t, dir, "image")
			if err := raw.Truncate(size); err != nil {
				t.Fatal(err)
			}
			for _, at := range []int64{0, size / 2, size - 3} {
				if _, err := raw.WriteAt([]byte("abc"), at); err != nil {
					t.Fatal(err)
				}
			}
			if err := Write(image, raw, size); err != nil {
				t.Fatal(err)
			}
			for _, args := range [][]string{{"check", image.Name()}, {"compare", "-f", "raw", "-F", "qcow2", raw.Name(), image.Name()}} {
				if out, err := exec.Command("qemu-img", args...).CombinedOutput(); err != nil || strings.Contains(string(out), "Leaked") {
					t.Errorf("qemu-img %q: %v\n%s", args, err, out)
				}
			}
			if st, err := image.Stat(); err != nil || st.Size() > 12*cluster {
				t.Errorf("the image has %d bytes: zeros are stored", st.Size())
			}
		})
	}
}

func create(t *testing.T, dir, name string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestRefusals(t *testing.T) {
	f := create(t, t.TempDir(), "x")
	for _, size := range []int64{0, -1, 100, maxSize + 512} {
		if err := Write(f, bytes.NewReader(nil), size); err == nil {
			t.Errorf("Write of %d bytes succeeded", size)
		}
	}
}
