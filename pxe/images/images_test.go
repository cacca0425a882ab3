package images

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/pxe/imagetest"
)

func openStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func content(t *testing.T, f *File) string {
	t.Helper()
	if f == nil {
		t.Fatal("no such file")
	}
	b, err := io.ReadAll(f.Reader())
	if err != nil {
		t.Fatal(err)
	}
	if whole, err := f.Bytes(); err != nil || string(whole) != string(b) {
		t.Errorf("Bytes = %q, %v; want %q", whole, err, b)
	}
	return string(b)
}

// A machine that is in the middle of a download gets the bytes that its
// script named, whatever is published meanwhile; the next boot gets the new.
func TestPublishWhileServing(t *testing.T) {
	dir := t.TempDir()
	old := imagetest.Publish(t, dir, "amd64", imagetest.Files("one"))
	s := openStore(t, dir)
	sha := imagetest.Sum("kernel one")
	running := s.ByHash(sha, "vmlinuz")

	fresh := imagetest.Publish(t, dir, "amd64", imagetest.Files("two"))
	if got := s.Pick().Manifest.ID; got != fresh {
		t.Errorf("the served set is %.8s; want the new one %.8s", got, fresh)
	}
	if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
		t.Fatal(err)
	}
	if got := content(t, running); got != "kernel one" {
		t.Errorf("a running download reads %q", got)
	}
	if got := content(t, s.ByHash(sha, "vmlinuz")); got != "kernel one" {
		t.Errorf("a script from before the publish finds %q", got)
	}
	if got := content(t, s.ByHash(imagetest.Sum("kernel two"), "vmlinuz")); got != "kernel two" {
		t.Errorf("the new kernel is %q", got)
	}
	if got := content(t, s.Loader("snponly.efi")); got != "snponly.efi two" {
		t.Errorf("the new loader is %q", got)
	}
}

// A half-written or damaged set is never served in place of a good one.
func TestABadPublishIsNotServed(t *testing.T) {
	dir := t.TempDir()
	good := imagetest.Publish(t, dir, "amd64", imagetest.Files("one"))
	s := openStore(t, dir)
	bad := imagetest.Publish(t, dir, "amd64", imagetest.Files("two"))
	kernel := filepath.Join(dir, bad, "vmlinuz")
	if err := os.WriteFile(kernel, []byte("kernel TWO"), 0o644); err != nil { // same size
		t.Fatal(err)
	}
	if got := s.Pick().Manifest.ID; got != good {
		t.Errorf("served %.8s, whose kernel is not what its manifest says; want %.8s", got, good)
	}
	if err := os.WriteFile(kernel, []byte("kernel two"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.retryAt = time.Time{}
	if got := s.Pick().Manifest.ID; got != bad {
		t.Errorf("mended, but %.8s is still served", got)
	}
}

// Someone copies over a served file in place: its name by hash must not lead
// to other bytes.
func TestOverwrittenInPlace(t *testing.T) {
	dir := t.TempDir()
	imagetest.Make(t, dir, "amd64", imagetest.Files("one"))
	s := openStore(t, dir)
	sha := imagetest.Sum("kernel one")
	if s.ByHash(sha, "vmlinuz") == nil {
		t.Fatal("not found")
	}
	if err := os.WriteFile(filepath.Join(dir, "vmlinuz"), []byte("changed!!!"), 0o644); err != nil {
		t.Fatal(err)
	}
	if f := s.ByHash(sha, "vmlinuz"); f != nil {
		t.Errorf("served %q under the hash of %q", content(t, f), "kernel one")
	}
	// A rebuild into the same folder is picked up.
	id := imagetest.Make(t, dir, "amd64", imagetest.Files("two"))
	if got := s.Pick().Manifest.ID; got != id {
		t.Errorf("the rebuilt set is not served")
	}
}

func TestWhatIsNotServed(t *testing.T) {
	dir := t.TempDir()
	imagetest.Make(t, dir, "amd64", imagetest.Files("one"))
	s := openStore(t, dir)
	for _, name := range []string{"", ".", "..", "../vmlinuz", "vmlinuz", "boot/snponly.efi", "nothing", "autoexec.ipxe"} {
		if s.Loader(name) != nil {
			t.Errorf("Loader(%q) serves a file", name)
		}
	}
	if s.ByHash(imagetest.Sum("head archive one"), "head.cpio") != nil {
		t.Error("the head archive is served")
	}
	if s.ByHash(imagetest.Sum("kernel one"), "initramfs") != nil {
		t.Error("a file is served under another name")
	}
}

func TestOldSetsAreBounded(t *testing.T) {
	dir := t.TempDir()
	for tag := range strings.FieldsSeq("a b c d e f") {
		imagetest.Publish(t, dir, "amd64", imagetest.Files(tag))
		if tag == "a" {
			continue
		}
		openStore(t, dir).Current()
	}
	s := openStore(t, dir)
	for tag := range strings.FieldsSeq("g h i j k") {
		imagetest.Publish(t, dir, "amd64", imagetest.Files(tag))
		s.Current()
	}
	if len(s.old) != keepOld {
		t.Errorf("%d superseded sets are held open; want %d", len(s.old), keepOld)
	}
}

func TestNoStore(t *testing.T) {
	for name, dir := range map[string]string{"empty": t.TempDir(), "missing": "/nonexistent"} {
		if _, err := Open(dir, nil); fault.KindOf(err) != fault.NotFound {
			t.Errorf("%s: Open = %v; want not found", name, err)
		}
	}
	dir := t.TempDir()
	imagetest.Make(t, dir, "amd64", imagetest.Files("one"))
	if err := os.WriteFile(filepath.Join(dir, "initramfs"), []byte("initramfs 0ne"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, nil); fault.KindOf(err) != fault.Untrusted {
		t.Errorf("a damaged set: Open = %v; want untrusted", err)
	}
}

// What an operator does with `mosimg image` a running head serves from the
// next request on.
func TestPublishAndRollback(t *testing.T) {
	dir := t.TempDir()
	first := imagetest.Publish(t, dir, "amd64", imagetest.Files("one"))
	s := openStore(t, dir)
	from := t.TempDir()
	second := imagetest.Make(t, from, "amd64", imagetest.Files("two"))
	store := imageset.Store{Dir: dir}
	if _, err := store.Publish(from, 3); err != nil {
		t.Fatal(err)
	}
	if got := s.Pick().Manifest.ID; got != second {
		t.Errorf("after a publish %.8s is served; want %.8s", got, second)
	}
	if _, err := store.Rollback("", ""); err != nil {
		t.Fatal(err)
	}
	if got := s.Pick().Manifest.ID; got != first {
		t.Errorf("after a rollback %.8s is served; want %.8s", got, first)
	}
	if got := content(t, s.Loader("snponly.efi")); got != "snponly.efi one" {
		t.Errorf("the loader is %q", got)
	}
}
