package debian

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"mosimg/image/debian/debiantest"
)

func tarOf(headers ...tar.Header) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		body := h.PAXRecords["body"]
		h.PAXRecords = nil
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		h.Size = int64(len(body))
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			panic(err)
		}
		io.WriteString(w, body)
	}
	w.Close()
	return b.Bytes()
}

func file(name, body string) tar.Header {
	return tar.Header{Name: name, PAXRecords: map[string]string{"body": body}}
}

func gz(data []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(data)
	w.Close()
	return b.Bytes()
}

func zst(data []byte) []byte {
	w, _ := zstd.NewWriter(nil)
	return w.EncodeAll(data, nil)
}

// deb packs a data.tar into a package.
func deb(data []byte) []byte {
	return debiantest.Ar("debian-binary", []byte("2.0\n"), "control.tar.gz", gz(tarOf(file("./control", "Package: x\n"))), "data.tar.gz", gz(data))
}

func walk(t *testing.T, data []byte) ([]string, error) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "x.deb")
	if err := os.WriteFile(name, data, 0o644); err != nil {
		t.Fatal(err)
	}
	var got []string
	err := WalkDeb(t.Context(), name, func(f *DebFile) error {
		line := f.Name
		if f.Body != nil {
			b, err := io.ReadAll(f.Body)
			if err != nil {
				return err
			}
			line += "=" + string(b)
		}
		if f.Linkname != "" {
			line += "->" + f.Linkname
		}
		got = append(got, line)
		return nil
	})
	return got, err
}

func TestWalkDeb(t *testing.T) {
	data := tarOf(
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		tar.Header{Name: "./usr/", Typeflag: tar.TypeDir, Mode: 0o755},
		file("./usr/a", "hello"),
		tar.Header{Name: "./usr/b", Typeflag: tar.TypeSymlink, Linkname: "../../etc/x"},
		tar.Header{Name: "./usr/c", Typeflag: tar.TypeLink, Linkname: "./usr/a"},
	)
	want := "usr|usr/a=hello|usr/b->../../etc/x|usr/c->usr/a"
	for name, pkg := range map[string][]byte{
		"gz":    deb(data),
		"plain": debiantest.Ar("debian-binary", []byte("2.0\n"), "data.tar", data),
		"zst":   debiantest.Ar("debian-binary", []byte("2.0\n"), "control.tar.zst", []byte("odd"), "data.tar.zst/", zst(data)),
	} {
		got, err := walk(t, pkg)
		if err != nil || strings.Join(got, "|") != want {
			t.Errorf("%s: WalkDeb = %q, %v; want %q", name, got, err, want)
		}
	}
}

// A package that is cut off, or that would write outside its root, must end
// the build; silently taking half of it would make a broken image.
func TestWalkDebRefuses(t *testing.T) {
	good := tarOf(file("./a", strings.Repeat("x", 5000)))
	for _, tc := range []struct {
		name string
		deb  []byte
		want string
	}{
		{"not ar", []byte("<html>"), "magic"},
		{"empty", nil, "magic"},
		{"no data", debiantest.Ar("debian-binary", []byte("2.0\n")), "no data.tar"},
		{"old format", debiantest.Ar("debian-binary", []byte("0.9\n"), "data.tar", good), "debian-binary"},
		{"unknown compression", debiantest.Ar("debian-binary", []byte("2.0\n"), "data.tar.lzma", good), "compression"},
		{"cut gz", deb(good)[:len(deb(good))-40], "EOF"},
		{"cut plain", debiantest.Ar("debian-binary", []byte("2.0\n"), "data.tar", good)[:2000], "EOF"},
		{"bad header", append([]byte("!<arch>\n"), bytes.Repeat([]byte("x"), 60)...), "header"},
		{"dot dot", deb(tarOf(file("./../x", "x"))), "leaves"},
		{"hidden dot dot", deb(tarOf(file("./a/../../x", "x"))), "leaves"},
		{"absolute", deb(tarOf(file("/etc/passwd", "x"))), "leaves"},
		{"hard link out", deb(tarOf(tar.Header{Name: "./a", Typeflag: tar.TypeLink, Linkname: "../x"})), "leaves"},
		{"device", deb(tarOf(tar.Header{Name: "./a", Typeflag: tar.TypeBlock})), "type"},
	} {
		if _, err := walk(t, tc.deb); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: WalkDeb = %v; want an error with %q", tc.name, err, tc.want)
		}
	}
}

func FuzzWalkDeb(f *testing.F) {
	data := tarOf(file("./a", "hello"), tar.Header{Name: "./b", Typeflag: tar.TypeSymlink, Linkname: "a"})
	f.Add(deb(data))
	f.Add(debiantest.Ar("debian-binary", []byte("2.0\n"), "data.tar", data))
	f.Add(debiantest.Ar("debian-binary", []byte("2.0\n"), "data.tar.zst", zst(data)))
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = walkDeb(bytes.NewReader(data), func(f *DebFile) error {
			if f.Name == "" || f.Name == ".." || strings.HasPrefix(f.Name, "../") || strings.HasPrefix(f.Name, "/") {
				t.Errorf("name %q leaves the package", f.Name)
			}
			if f.Body != nil {
				io.Copy(io.Discard, io.LimitReader(f.Body, 1<<20))
			}
			return nil
		})
	})
}
