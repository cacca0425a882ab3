package image

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/image/cache"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
)

// smallSet writes an image set with one byte in each file.
func smallSet(t *testing.T, dir string) {
	t.Helper()
	m := &imageset.Manifest{Format: imageset.Format, Arch: "amd64"}
	for _, name := range []string{"vmlinuz", "initramfs", "boot/a.efi"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		sum, size, err := imageset.HashFile(path)
		if err != nil {
			t.Fatal(err)
		}
		m.Files = append(m.Files, imageset.File{Name: name, Size: size, SHA256: sum})
	}
	m.ID = m.ComputeID()
	if err := m.Write(dir); err != nil {
		t.Fatal(err)
	}
}

// The output folder is replaced as a whole; nobody may lose files by naming
// the wrong one.
func TestOutputRefusesWhatItWouldDelete(t *testing.T) {
	for _, tc := range []struct {
		name string
		make func(t *testing.T, dir string)
		want string // "" means it is accepted
	}{
		{"does not exist", func(*testing.T, string) {}, ""},
		{"empty", func(t *testing.T, dir string) { mkdir(t, dir) }, ""},
		{"image set", smallSet, ""},
		{"a file", func(t *testing.T, dir string) { touch(t, dir) }, "it is a file"},
		{"other files", func(t *testing.T, dir string) { mkdir(t, dir); touch(t, dir+"/thesis.txt") }, "not an image set"},
		{"image set and a file", func(t *testing.T, dir string) { smallSet(t, dir); touch(t, dir+"/notes") }, "notes in it is not part"},
		{"image set and a file in boot", func(t *testing.T, dir string) { smallSet(t, dir); touch(t, dir+"/boot/mine") }, "boot/mine in it is not part"},
		{"image set and a folder", func(t *testing.T, dir string) { smallSet(t, dir); mkdir(t, dir+"/sub") }, "sub in it is not part"},
		{"damaged image set", func(t *testing.T, dir string) { smallSet(t, dir); touch(t, dir+"/manifest.json") }, ""},
		{"damaged image set and a file", func(t *testing.T, dir string) {
			smallSet(t, dir)
			touch(t, dir+"/manifest.json")
			touch(t, dir+"/x")
		}, "x in it is not part"},
		{"link to an image set", func(t *testing.T, dir string) {
			smallSet(t, dir+".real")
			if err := os.Symlink(dir+".real", dir); err != nil {
				t.Fatal(err)
			}
		}, ""},
	} {
		dir := filepath.Join(t.TempDir(), "out")
		tc.make(t, dir)
		o, err := newOutput(dir)
		if tc.want != "" {
			if fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: newOutput = %v; want %q", tc.name, err, tc.want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: newOutput = %v", tc.name, err)
			continue
		}
		touch(t, filepath.Join(o.tmp.Path, "new"))
		if err := o.publish(); err != nil {
			t.Errorf("%s: publish = %v", tc.name, err)
		}
		o.discard()
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 || entries[0].Name() != "new" {
			t.Errorf("%s: after publish the folder has %v, %v", tc.name, entries, err)
		}
	}
}

func mkdir(t *testing.T, dir string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

func touch(t *testing.T, name string) {
	t.Helper()
	if err := os.WriteFile(name, []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFileThatAppearsDuringTheBuildIsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "out")
	o, err := newOutput(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer o.discard()
	mkdir(t, dir)
	touch(t, dir+"/late")
	if err := o.publish(); err == nil {
		t.Error("publish replaced a folder with somebody's file in it")
	}
}

func TestCurrentFolderIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "out")
	smallSet(t, dir)
	t.Chdir(filepath.Join(dir, "boot"))
	if _, err := newOutput(dir); err == nil || !strings.Contains(err.Error(), "current folder") {
		t.Errorf("newOutput of the current folder's parent = %v", err)
	}
}

// Parents that were made for an output go again when the build fails; those
// of others stay.
func TestParentsAreMadeAndRemoved(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "a", "b", "out")
	o, err := newOutput(dir)
	if err != nil {
		t.Fatal(err)
	}
	o.discard()
	if cache.Exists(filepath.Join(base, "a")) {
		t.Error("a failed build left folders")
	}
	if o, err = newOutput(dir); err != nil {
		t.Fatal(err)
	}
	touch(t, filepath.Join(base, "a", "other"))
	o.discard()
	if !cache.Exists(filepath.Join(base, "a", "other")) || cache.Exists(filepath.Join(base, "a", "b")) {
		t.Error("a failed build did not remove just what it made")
	}
}

func TestLeftoversOfAKilledBuildAreRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "out")
	killed, err := newOutput(dir)
	if err != nil {
		t.Fatal(err)
	}
	killed.tmp.Keep() // the kernel drops the lock of a dead process
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(killed.tmp.Path, old, old); err != nil {
		t.Fatal(err)
	}
	next, err := newOutput(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer next.discard()
	if cache.Exists(killed.tmp.Path) {
		t.Error("the unfinished folder of a killed build is still there")
	}
}

// tmpfs mounts a small file system for a test.
func tmpfs(t *testing.T, flags uintptr, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", flags, options); err != nil {
		t.Skipf("cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// A full disk, on either side, is told as that, with what is needed where;
// and nothing half-written stays.
func TestFullDisk(t *testing.T) {
	w := newWorld(t)
	room := int64(256 << 10)
	for _, f := range w.mustBuild().Manifest.Files {
		room += f.Size
	}
	for name, change := range map[string]func(o *Options, small string){
		"output": func(o *Options, small string) { o.Out = filepath.Join(small, "out") },
		"output of media": func(o *Options, small string) {
			o.Out, o.Outputs = filepath.Join(small, "out"), []string{"disk"}
		},
		"cache": func(o *Options, small string) { o.Cache = filepath.Join(small, "cache") },
	} {
		size := "size=64k"
		if name == "output of media" {
			size = fmt.Sprint("size=", room) // enough for the set, not for a disk
		}
		small := tmpfs(t, 0, size)
		_, err := w.build(func(o *Options) { change(o, small) })
		if fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "no space left on device") || !strings.Contains(err.Error(), "a build needs about") {
			t.Errorf("%s on a full disk: %v", name, err)
		}
		if name != "cache" {
			if left, err := os.ReadDir(small); err != nil || len(left) != 0 {
				t.Errorf("left on the full disk: %v, %v", left, err)
			}
		}
	}
}

func TestReadOnlyOutput(t *testing.T) {
	w := newWorld(t)
	for name, dir := range map[string]string{"read-only": tmpfs(t, unix.MS_RDONLY, ""), "mount point": tmpfs(t, 0, "")} {
		out := filepath.Join(dir, "out")
		want := "read-only file system"
		if name == "mount point" {
			out, want = dir, "mounted folder"
		}
		if _, err := w.build(func(o *Options) { o.Out = out }); fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v; want %q", name, err, want)
		}
	}
}
