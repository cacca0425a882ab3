package image

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/u-root/mkuimage/cpio"

	"mosimg/image/profile"
	"mosimg/internal/imageset"
)

// TestRealImage builds the built-in profile from the real archive and runs
// what is in it. It needs the network, minutes and 1 GB, so it runs only when
// MOSIMG_E2E=1.
func TestRealImage(t *testing.T) {
	if os.Getenv("MOSIMG_E2E") != "1" {
		t.Skip("needs a Debian mirror: set MOSIMG_E2E=1")
	}
	p, err := profile.Load(profile.Default)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	s, err := Build(t.Context(), Options{Profile: p, Out: out, Cache: os.Getenv("MOSIMG_E2E_CACHE")})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d packages, %d Go modules, %.1f s", len(s.Manifest.Packages), len(s.Manifest.GoModules), s.Seconds)
	set, err := imageset.Open(out)
	if err != nil {
		t.Fatal(err)
	}
	if err := set.Verify(); err != nil {
		t.Error(err)
	}
	root := t.TempDir()
	lay(t, root, unpack(t, readFile(t, set.Path(imageset.Initramfs))))
	t.Run("node boots", func(t *testing.T) { boot(t, set) })
	t.Run("criu runs by its own loader", func(t *testing.T) {
		lib := filepath.Join(root, criuDir, "lib")
		out, err := exec.Command(filepath.Join(lib, "ld-linux-x86-64.so.2"), "--library-path", lib, filepath.Join(root, criuDir, "bin", "criu"), "--version").CombinedOutput()
		if err != nil || !strings.Contains(string(out), set.Manifest.CRIUVersion) {
			t.Errorf("criu --version = %s, %v; want %s", out, err, set.Manifest.CRIUVersion)
		}
	})
	lay(t, root, unpack(t, readFile(t, set.Path(imageset.HeadArchive))))
	for _, tc := range []struct{ want, program, arg, script string }{
		{"1", "/usr/bin/python3", "-c", "import os, socket, threading; print(1)"},
		{"42", "/usr/bin/awk", "BEGIN { print 6 * 7 }", ""},
		{"dash 3", "/bin/sh", "-c", "echo dash $((1 + 2))"},
		{"demo", "/usr/bin/id", "-un", "1000"},
		{"mke2fs", "/usr/sbin/mke2fs", "-V", ""},
		{"mosimg version", "/usr/bin/mosimg", "--version", ""},
	} {
		t.Run(tc.program, func(t *testing.T) {
			if os.Geteuid() != 0 {
				t.Skip("chroot needs root")
			}
			c := exec.Command(tc.program, tc.arg)
			if tc.script != "" {
				c.Args = append(c.Args, tc.script)
			}
			c.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
			c.Dir, c.Env = "/", []string{"PATH=/usr/bin:/usr/sbin"}
			out, err := c.CombinedOutput()
			if err != nil || !strings.Contains(string(out), tc.want) {
				t.Errorf("%v = %s, %v; want %q", c.Args, out, err, tc.want)
			}
		})
	}
}

// lay unpacks an archive into root, over what is there, as the kernel does.
func lay(t *testing.T, root string, files map[string]cpio.Record) {
	t.Helper()
	for _, name := range sortedRecords(files) {
		r, path := files[name], filepath.Join(root, name)
		var err error
		switch r.Mode & cpio.S_IFMT {
		case cpio.S_IFDIR:
			err = os.MkdirAll(path, os.FileMode(r.Mode&0o777))
		case cpio.S_IFLNK:
			os.Remove(path)
			err = os.Symlink(text(t, files, name), path)
		case cpio.S_IFREG:
			if r.NLink > 1 && r.FileSize == 0 {
				continue // a further name; none of the programs below
			}
			os.Remove(path)
			err = os.WriteFile(path, []byte(text(t, files, name)), os.FileMode(r.Mode&0o777))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// sortedRecords orders names so that folders and the links into usr come
// before what is below them.
func sortedRecords(files map[string]cpio.Record) []string {
	names := make(map[string]string, len(files))
	for n := range files {
		names[n] = ""
	}
	return sortedNames(names)
}

// bootTime is ample for an emulated machine beside other tests.
const bootTime = 3 * time.Minute

// boot starts the node image in QEMU and waits for its init to come up.
func boot(t *testing.T, set *imageset.Set) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	var console watch
	console.want, console.found = "criu works", make(chan struct{})
	c := exec.Command(qemu, "-m", "512", "-nographic", "-no-reboot", "-nic", "none", "-kernel", set.Path(imageset.Kernel), "-initrd", set.Path(imageset.Initramfs), "-append", "console=ttyS0 quiet mosimg.debug")
	c.Stdout = &console
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	}()
	began := time.Now()
	select {
	case <-console.found:
		t.Logf("agent is up after %.1f s", time.Since(began).Seconds())
	case <-time.After(bootTime):
		t.Error("the machine did not come up")
	}
}

// watch closes found when it has been written what it waits for.
type watch struct {
	want  string
	found chan struct{}
	seen  bytes.Buffer
	done  bool
}

func (w *watch) Write(b []byte) (int, error) {
	w.seen.Write(b)
	if !w.done && strings.Contains(w.seen.String(), w.want) {
		w.done = true
		close(w.found)
	}
	return len(b), nil
}
