package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

func TestOpenRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{file, file + "/below", "/proc/none"} {
		if _, err := Open(dir); fault.KindOf(err) != fault.Environment {
			t.Errorf("Open(%s) = %v; want an environment fault", dir, err)
		}
	}
}

// What a killed build left is removed; what a running one uses is not.
func TestStaleFoldersAreRemoved(t *testing.T) {
	parent := t.TempDir()
	live, err := NewTempDir(parent, ".out.")
	if err != nil {
		t.Fatal(err)
	}
	dead, err := NewTempDir(parent, ".out.")
	if err != nil {
		t.Fatal(err)
	}
	dead.Keep() // as the kernel does when the process dies
	other := filepath.Join(parent, "mine")
	fresh := filepath.Join(parent, ".out.fresh")
	for _, d := range []string{other, fresh} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	old := time.Now().Add(-time.Hour)
	for _, d := range []string{live.Path, dead.Path, other} {
		if err := os.Chtimes(d, old, old); err != nil {
			t.Fatal(err)
		}
	}
	RemoveStale(parent, ".out.")
	for path, want := range map[string]bool{live.Path: true, dead.Path: false, other: true, fresh: true} {
		if Exists(path) != want {
			t.Errorf("%s exists: %v; want %v", filepath.Base(path), !want, want)
		}
	}
	if live.Remove(); Exists(live.Path) {
		t.Error("Remove left the folder")
	}
}

func TestLockFileWaitsAndGivesUp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.part")
	a, err := LockFile(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*lockPoll)
	defer cancel()
	if f, err := LockFile(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("LockFile of a locked file = %v, %v; want a deadline", f, err)
	}
	// The holder renames the file to its place and lets go: who waited
	// must get a new file, not the finished one.
	got := make(chan error, 1)
	go func() {
		f, err := LockFile(t.Context(), path)
		if err == nil {
			var st unix.Stat_t
			if err = unix.Stat(path, &st); err == nil && !same(f, path) {
				err = errors.New("the lock is on another file")
			}
			f.Close()
		}
		got <- err
	}()
	if err := os.Rename(path, path+".done"); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestPrune(t *testing.T) {
	c, err := Open(filepath.Join(t.TempDir(), "odd [name]*"))
	if err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-keepFor - time.Hour)
	paths := map[string]bool{"steps/a/old": false, "steps/a/new": true, "steps/a/used": true, "blobs/old": false, "blobs/new": true}
	for p := range paths {
		if err := os.MkdirAll(c.Path(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if filepath.Base(p) != "new" {
			if err := os.Chtimes(c.Path(p), old, old); err != nil {
				t.Fatal(err)
			}
		}
	}
	Use(c.Path("steps/a/used"))
	c.Prune()
	for p, want := range paths {
		if Exists(c.Path(p)) != want {
			t.Errorf("%s exists: %v; want %v", p, !want, want)
		}
	}
}
