// Package cache is the builder's folder of things that need not be made
// twice: files named by their SHA-256, results of steps, and room for
// unfinished work. Several builds may share one cache at the same time; what
// they share appears by rename, so nobody sees half of anything.
//
//	DIR/blobs/SHA256      downloads, verified before they get their name
//	DIR/blobs/SHA256.part an unfinished download, locked while somebody works on it
//	DIR/index/...         verified InRelease files and parsed indexes
//	DIR/steps/NAME/KEY/   results of build steps
//	DIR/tmp/...           unfinished work; left-overs of killed builds are removed
//
// Deleting the folder, or anything in it while no build runs, is safe.
package cache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Cache is an open cache. It is safe for concurrent use, by other processes too.
type Cache struct{ dir string }

// DefaultDir is $XDG_CACHE_HOME/mosimg or ~/.cache/mosimg.
func DefaultDir() (string, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return "", fault.New(fault.Environment, "find", "the cache folder", err, "name one with --cache")
	}
	return filepath.Join(base, "mosimg"), nil
}

// Open makes the folders that are missing and removes what killed builds
// left in tmp.
func Open(dir string) (*Cache, error) {
	abs, err := filepath.Abs(dir)
	if err == nil {
		for _, sub := range []string{"blobs", "index", "steps", "tmp"} {
			if err = os.MkdirAll(filepath.Join(abs, sub), 0o755); err != nil {
				break
			}
		}
	}
	if err == nil {
		err = unix.Access(filepath.Join(abs, "tmp"), unix.W_OK)
	}
	if err != nil {
		return nil, fault.New(fault.Environment, "open cache", dir, err, "name a writable folder with --cache")
	}
	c := &Cache{dir: abs}
	RemoveStale(c.Path("tmp"), "")
	return c, nil
}

// Dir is the cache's folder.
func (c *Cache) Dir() string { return c.dir }

// Path is a path inside the cache.
func (c *Cache) Path(elem ...string) string {
	return filepath.Join(append([]string{c.dir}, elem...)...)
}

// Blob is where the file with this SHA-256 lies once it is complete.
func (c *Cache) Blob(sha256 string) string { return c.Path("blobs", sha256) }

// TempDir makes a folder for unfinished work in the cache.
func (c *Cache) TempDir(name string) (*TempDir, error) { return NewTempDir(c.Path("tmp"), name+".") }

// TempDir is a folder that lives as long as the process that made it: Remove
// deletes it, and when the process was killed the next RemoveStale does,
// because the lock that it held on the folder is gone then.
type TempDir struct {
	Path string
	lock *os.File
}

// NewTempDir makes a TempDir in parent.
func NewTempDir(parent, prefix string) (*TempDir, error) {
	dir, err := os.MkdirTemp(parent, prefix)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	// A file system without locks (some network ones) only loses the
	// removal of left-overs: RemoveStale gets no lock there either.
	_ = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	return &TempDir{Path: dir, lock: f}, nil
}

// Keep gives the folder up without removing it: its content has been renamed
// to its place.
func (t *TempDir) Keep() { t.lock.Close() }

// Remove deletes the folder and all in it. What cannot be deleted now is left
// to the next RemoveStale.
func (t *TempDir) Remove() {
	os.RemoveAll(t.Path)
	t.lock.Close()
}

// staleAge protects a folder in the moment between its making and its lock.
const staleAge = 10 * time.Second

// RemoveStale removes the folders in parent whose names begin with prefix and
// that no living process holds. Faults are left for the next time.
func RemoveStale(parent, prefix string) {
	entries, _ := os.ReadDir(parent)
	for _, e := range entries {
		st, err := e.Info()
		if err != nil || !st.IsDir() || !strings.HasPrefix(e.Name(), prefix) || time.Since(st.ModTime()) < staleAge {
			continue
		}
		name := filepath.Join(parent, e.Name())
		f, err := os.Open(name)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			os.RemoveAll(name)
		}
		f.Close()
	}
}

// lockPoll is how often a taken lock is asked for again; flock itself cannot
// be given up when the context ends.
const lockPoll = 50 * time.Millisecond

// LockFile opens path for reading and writing, making it if needed, and
// locks it against other processes. It waits until ctx ends. The caller
// closes the file to unlock it.
func LockFile(ctx context.Context, path string) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return nil, err
		}
		switch err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); {
		case err == nil:
			// The former holder may have renamed or removed the file
			// that was just locked: then it is no longer the one at path.
			if same(f, path) {
				return f, nil
			}
			f.Close()
			continue
		case !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR):
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		f.Close()
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(lockPoll):
		}
	}
}

func same(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// keepFor is how long a step's result that no build asks for is kept.
const keepFor = 30 * 24 * time.Hour

// Prune removes step results and downloads that were not used for 30 days.
// Use marks them.
func (c *Cache) Prune() {
	folders := []string{c.Path("blobs"), c.Path("index")}
	kinds, _ := os.ReadDir(c.Path("steps"))
	for _, k := range kinds {
		folders = append(folders, c.Path("steps", k.Name()))
	}
	old := time.Now().Add(-keepFor)
	for _, dir := range folders {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if st, err := e.Info(); err == nil && st.ModTime().Before(old) {
				os.RemoveAll(filepath.Join(dir, e.Name()))
			}
		}
	}
}

// Use marks a file or folder of the cache as used now.
func Use(path string) {
	now := time.Now()
	_ = os.Chtimes(path, now, now) // only Prune looks at it
}

// Exists says whether path is there.
func Exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
