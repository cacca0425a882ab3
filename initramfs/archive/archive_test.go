package archive

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"
)

func sample(order int) *Tree {
	t := &Tree{MTime: 7}
	adds := []func(){
		func() { t.File("usr/bin/a", 0o755, []byte("hello")) },
		func() { t.Add(Entry{Name: "usr/bin/b", HardLink: true, Link: "usr/bin/z"}) },
		func() { t.File("bin/z", fs.ModeSetuid|0o755, []byte("zed")) },
		func() { t.Symlink("usr/bin/sh", "dash") },
		func() { t.Dir("tmp", fs.ModeSticky|0o777) },
		func() { t.Add(Entry{Name: "home/demo", Mode: fs.ModeDir | 0o700, UID: 1000, GID: 1001}) },
		func() {
			t.Add(Entry{Name: "dev/console", Mode: fs.ModeDevice | fs.ModeCharDevice | 0o600, Major: 5, Minor: 1})
		},
		func() { t.Add(Entry{Name: "body", Mode: 0o644, Body: strings.NewReader("from a reader"), Size: 13}) },
	}
	for i := range adds {
		adds[(i*order+order)%len(adds)]()
	}
	return t
}

func write(t *testing.T, tree *Tree) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := tree.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func list(t *testing.T, data []byte) []string {
	t.Helper()
	var lines []string
	err := cpio.ForEachRecord(cpio.Newc.Reader(bytes.NewReader(data)), func(r cpio.Record) error {
		body, err := io.ReadAll(io.NewSectionReader(r.ReaderAt, 0, int64(r.FileSize)))
		lines = append(lines, fmt.Sprintf("%d %06o %d:%d %d %s %q dev %d,%d t%d", r.Ino, r.Mode, r.UID, r.GID, r.NLink, r.Name, body, r.Rmajor, r.Rminor, r.MTime))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func TestWrite(t *testing.T) {
	want := []string{
		`1 100644 0:0 1 body "from a reader" dev 0,0 t7`,
		`2 040755 0:0 1 dev "" dev 0,0 t7`,
		`3 020600 0:0 1 dev/console "" dev 5,1 t7`,
		`4 040755 0:0 1 home "" dev 0,0 t7`,
		`5 040700 1000:1001 1 home/demo "" dev 0,0 t7`,
		`6 041777 0:0 1 tmp "" dev 0,0 t7`,
		`7 040755 0:0 1 usr "" dev 0,0 t7`,
		`8 040755 0:0 1 usr/bin "" dev 0,0 t7`,
		`9 100755 0:0 1 usr/bin/a "hello" dev 0,0 t7`,
		`10 104755 0:0 2 usr/bin/b "zed" dev 0,0 t7`,
		`11 120777 0:0 1 usr/bin/sh "dash" dev 0,0 t7`,
		`10 104755 0:0 2 usr/bin/z "" dev 0,0 t7`,
	}
	first := write(t, sample(1))
	if diff := cmp.Diff(want, list(t, first)); diff != "" {
		t.Errorf("archive (-want +got):\n%s", diff)
	}
	if len(first)%4 != 0 {
		t.Errorf("archive has %d bytes, not a multiple of 4: the kernel would not find the next one", len(first))
	}
	for _, order := range []int{3, 5, 7} {
		if !bytes.Equal(first, write(t, sample(order))) {
			t.Error("the order of additions changes the bytes")
		}
	}
}

// cpio is the oracle: it unpacks what we write, hard links and all.
func TestCpioUnpacksIt(t *testing.T) {
	tool, err := exec.LookPath("cpio")
	if err != nil {
		t.Skip("cpio is not installed")
	}
	dir := t.TempDir()
	tree := sample(1)
	delete(tree.entries, "dev/console") // needs root
	c := exec.Command(tool, "-idm", "--quiet", "--no-preserve-owner")
	c.Dir, c.Stdin = dir, bytes.NewReader(write(t, tree))
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v\n%s", err, out)
	}
	for name, want := range map[string]string{"usr/bin/a": "hello", "usr/bin/b": "zed", "usr/bin/z": "zed", "body": "from a reader"} {
		if got, err := os.ReadFile(dir + "/" + name); err != nil || string(got) != want {
			t.Errorf("%s = %q, %v; want %q", name, got, err, want)
		}
	}
	b, err1 := os.Stat(dir + "/usr/bin/b")
	z, err2 := os.Stat(dir + "/usr/bin/z")
	if err1 != nil || err2 != nil || !os.SameFile(b, z) {
		t.Error("usr/bin/b and usr/bin/z are not one file")
	}
}

func TestWriteZstd(t *testing.T) {
	var b bytes.Buffer
	stat, n, err := sample(1).WriteZstd(&b)
	if err != nil {
		t.Fatal(err)
	}
	if int64(b.Len()) != n || n%4 != 0 || stat.Files != 12 {
		t.Errorf("WriteZstd = %+v, %d with %d bytes written; want equal sizes, padded to 4", stat, n, b.Len())
	}
	z, err := zstd.NewReader(bytes.NewReader(bytes.TrimRight(b.Bytes(), "\x00")), zstd.WithDecoderMaxWindow(window))
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(z)
	if err != nil && len(got) == 0 {
		t.Fatal(err)
	}
	if want := write(t, sample(1)); !bytes.Equal(got, want) {
		t.Error("the compressed archive is not the plain one")
	}
}

func TestAddCPIO(t *testing.T) {
	plain := &Tree{}
	plain.File("bbin/bb", 0o755, []byte("busybox"))
	plain.Symlink("bbin/ls", "bb")
	copied := &Tree{}
	if err := copied.AddCPIO(bytes.NewReader(write(t, plain))); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(list(t, write(t, plain)), list(t, write(t, copied))); diff != "" {
		t.Errorf("copy (-want +got):\n%s", diff)
	}
	// What was built under another umask must give the same image.
	strict := &Tree{}
	strict.Dir("bbin", 0o700)
	strict.File("bbin/bb", 0o700, []byte("busybox"))
	strict.File("etc/motd", 0o600, []byte("hello"))
	strict.Symlink("bbin/ls", "bb")
	plain.File("etc/motd", 0o644, []byte("hello"))
	again := &Tree{}
	if err := again.AddCPIO(bytes.NewReader(write(t, strict))); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(write(t, plain), write(t, again)) {
		t.Errorf("modes of another umask (-want +got):\n%s", cmp.Diff(list(t, write(t, plain)), list(t, write(t, again))))
	}
	for _, garbage := range []string{"", "short", strings.Repeat("garbage that is no archive", 20)} {
		if err := copied.AddCPIO(strings.NewReader(garbage)); err == nil {
			t.Errorf("AddCPIO took %.10q", garbage)
		}
	}
}

// Two parts of an image that claim one name would hide each other's file.
func TestFaults(t *testing.T) {
	for _, tc := range []struct {
		name string
		add  func(*Tree)
		want string
	}{
		{"collision", func(t *Tree) { t.File("a", 0o644, []byte("1")); t.File("a", 0o644, []byte("2")) }, "two different files are to be a"},
		{"collision by merged usr", func(t *Tree) { t.File("bin/a", 0o644, nil); t.Symlink("usr/bin/a", "b") }, "usr/bin/a"},
		{"below a file", func(t *Tree) { t.File("a", 0o644, nil); t.File("a/b", 0o644, nil) }, "not a folder"},
		{"absolute", func(t *Tree) { t.File("/a", 0o644, nil) }, "clean relative"},
		{"dots", func(t *Tree) { t.File("a/../b", 0o644, nil) }, "clean relative"},
		{"dangling hard link", func(t *Tree) { t.Add(Entry{Name: "a", HardLink: true, Link: "b"}) }, "hard link a"},
		{"socket", func(t *Tree) { t.Add(Entry{Name: "a", Mode: fs.ModeSocket}) }, "kind"},
	} {
		tree := &Tree{}
		tc.add(tree)
		if _, err := tree.Write(io.Discard); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: Write = %v; want %q", tc.name, err, tc.want)
		}
	}
	same := &Tree{}
	same.File("a", 0o644, []byte("1"))
	same.File("a", 0o644, []byte("1"))
	same.Replace(Entry{Name: "a", Mode: fs.ModeSymlink | 0o777, Link: "b"})
	if _, err := same.Write(io.Discard); err != nil {
		t.Errorf("equal files, then a replacement: %v", err)
	}
}

func TestFullDiskIsAnError(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("no /dev/full here")
	}
	defer full.Close()
	if _, _, err := sample(1).WriteZstd(full); err == nil {
		t.Error("WriteZstd to a full disk succeeded")
	}
}
