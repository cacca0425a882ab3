package shim

import (
	"archive/tar"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestStrayIn(t *testing.T) {
	for name, tt := range map[string]struct {
		pids    []int
		parents map[int]int
		want    int
	}{
		"tree":                 {[]int{1000, 1001, 1002}, map[int]int{1001: 1000, 1002: 1001}, -1},
		"parent about to exit": {[]int{1000, 1002}, map[int]int{1001: 1000, 1002: 1001}, -1},
		"fell to shim":         {[]int{1000, 1001, 1005}, map[int]int{1001: 1000, 1005: 1}, 1005},
		"leader missing":       {[]int{1001}, map[int]int{1001: 1}, 1001},
		"circle":               {[]int{7, 8, 1000}, map[int]int{8: 7, 7: 8}, 7},
		"parent is alien":      {[]int{1000, 1004}, map[int]int{1004: 77, 77: 1}, 1004},
	} {
		if got := strayIn(tt.pids, tt.parents, 1000); got != tt.want {
			t.Errorf("%s: strayIn = %d; want %d", name, got, tt.want)
		}
	}
}

// A process that is exiting is not in its group's list any more, but its child has it as parent
// until it is gone: the child is no stray.
func TestAncestryOfAnOrphanToBe(t *testing.T) {
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		child.Process.Kill()
		child.Wait()
	}()
	grand := os.Getppid() // this process is the one in between, and not listed
	pids := []int{grand, child.Process.Pid}
	parents, err := ancestry(pids, grand)
	if err != nil {
		t.Fatal(err)
	}
	if got := strayIn(pids, parents, grand); got != -1 {
		t.Errorf("strayIn(%v, %v) = %d; want none", pids, parents, got)
	}
	if got := strayIn(pids, parents, child.Process.Pid+1); got == -1 {
		t.Error("no stray below a leader that is none of their ancestors")
	}
}

// What CRIU and the shim take while a job is restored must not be a number of
// the job's: restore fails on a number that is taken.
func TestScratchPids(t *testing.T) {
	for _, tt := range []struct {
		job         []int
		limit, want int
	}{
		{[]int{1000, 1001, 1010}, 32768, 1010 + (32768-1010)/2},
		{[]int{1000, 32000}, 32768, 1000 + 31000/2},
		{[]int{30000, 31000}, 32768, 1000 + 29000/2},
		{[]int{1000}, 4194304, 1000 + (4194304-1000)/2},
	} {
		if got := scratchPids(tt.job, tt.limit); got != tt.want {
			t.Errorf("scratchPids(%v, %d) = %d; want %d", tt.job, tt.limit, got, tt.want)
		}
	}
}

func TestInodes(t *testing.T) {
	m := make(map[string]string)
	table := "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n" +
		"   0: 0100007F:0CEA 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0 0 10 0\n" +
		"   1: 0100007F:0CEA 00000000:0000 06 00000000:00000000 00:00000000 00000000     0        0 0 3 0\nshort\n"
	if err := inodes(strings.NewReader(table), "tcp", m); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]string{"socket:[4711]": "tcp"}, m); diff != "" {
		t.Error(diff)
	}
}

// describe lists a tree: name, mode, owner, content or target.
func describe(t *testing.T, dir string) (list []string) {
	t.Helper()
	filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			t.Fatal(err)
		}
		what := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, _ := os.ReadFile(path)
			what = string(data)
		case unix.S_IFLNK:
			what, _ = os.Readlink(path)
			st.Mtim = unix.Timespec{} // a link's own time does not travel
		}
		rel, _ := filepath.Rel(dir, path)
		list = append(list, cmpLine(rel, st, what))
		return nil
	})
	return list
}

func cmpLine(name string, st unix.Stat_t, what string) string {
	return strings.Join([]string{name, oct(st.Mode), oct(st.Uid), oct(st.Gid), oct(uint32(st.Nlink)), oct(uint32(st.Mtim.Sec)), what}, " ")
}

func oct(n uint32) string { return string(appendOct(nil, n)) }

func appendOct(b []byte, n uint32) []byte {
	if n >= 8 {
		b = appendOct(b, n/8)
	}
	return append(b, '0'+byte(n%8))
}

func TestTreeTravels(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("owners need root")
	}
	src, dst := t.TempDir(), t.TempDir()
	at := func(name string) string { return filepath.Join(src, name) }
	for _, err := range []error{
		os.Mkdir(at("dir"), 0o700),
		os.WriteFile(at("dir/file"), []byte("content"), 0o640),
		os.Chown(at("dir/file"), 1234, 5678),
		os.Link(at("dir/file"), at("other name")),
		os.Symlink("/etc/passwd", at("link")),
		unix.Mkfifo(at("fifo"), 0o600),
		os.Chmod(at("dir"), os.ModeSticky|0o777),
		os.Chtimes(at("dir"), deadlinePast, deadlinePast),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := writeTree(w, src); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if err := readTree(tar.NewReader(&b), dst); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(describe(t, src), describe(t, dst)); diff != "" {
		t.Errorf("-source +destination:\n%s", diff)
	}
}

// An archive comes from another node: it must not reach outside.
func TestTreeStaysInside(t *testing.T) {
	out := t.TempDir()
	for _, h := range []*tar.Header{
		{Name: "../x", Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: "/abs", Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: "link/x", Typeflag: tar.TypeReg, Mode: 0o644},
		{Name: "dev", Typeflag: tar.TypeBlock},
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		w.WriteHeader(&tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: out, Mode: 0o777})
		w.WriteHeader(h)
		w.Close()
		if err := readTree(tar.NewReader(&b), t.TempDir()); err == nil {
			t.Errorf("%q = no error", h.Name)
		}
	}
	if left, _ := os.ReadDir(out); len(left) > 0 {
		t.Errorf("%v was written", left)
	}
}

func FuzzReadTree(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "a", Typeflag: tar.TypeReg, Size: 1, Mode: 0o644})
	w.Write([]byte("x"))
	w.Close()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		readTree(tar.NewReader(bytes.NewReader(data)), t.TempDir())
	})
}
