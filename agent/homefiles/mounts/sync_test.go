package mounts_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

func init() { helpers["dirty"] = dirtyHelper }

// dirtyHelper writes into a file through a shared mapping, takes its permissions away,
// closes it, says so and waits with the mapping: "FILE SIZE [unlink]".
func dirtyHelper(args []string) error {
	fd, err := unix.Open(args[0], unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	size, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return err
	}
	m, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	if err := unix.Fchmod(fd, 0); err != nil {
		return err
	}
	if err := unix.Close(fd); err != nil {
		return err
	}
	if len(args) > 2 {
		if err := unix.Unlink(args[0]); err != nil {
			return err
		}
	}
	for i := range m {
		m[i] = 'd'
	}
	fmt.Println("dirty")
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// home counts what the dirty helper has written of a file at home.
func (w *world) home(name string) int {
	w.t.Helper()
	data, err := os.ReadFile(name)
	must(w.t, err)
	return bytes.Count(data, []byte("d"))
}

// What a job has written into a mapped file is in its node's cache only, and
// would be lost with it when the job moves on: Sync returns when all of it is
// at home, also over a link that needs seconds for it, and also of a file that
// is closed, deleted, or that nobody may open any more.
func TestSyncBringsMappedPagesHome(t *testing.T) {
	const size = 1 << 20
	w := newWorld(t, options{rate: 1 << 20})
	far := w.guest()
	near := filepath.Join(w.tree, "kept")
	for i := range 3 {
		start(t, helper(alice, "dirty", filepath.Join(far, fmt.Sprint(i)), fmt.Sprint(size))).says("dirty")
	}
	// The home can see a deleted file only by a descriptor.
	must(t, os.WriteFile(near, nil, 0o666))
	must(t, os.Chown(near, int(alice.UID), int(alice.GID)))
	f, err := os.Open(near)
	must(t, err)
	defer f.Close()
	start(t, helper(alice, "dirty", filepath.Join(far, "kept"), fmt.Sprint(size), "unlink")).says("dirty")

	began := time.Now()
	must(t, w.roots.Sync(ctx(t), homeNode, job, 2))
	took := time.Since(began)
	for _, name := range []string{w.tree + "/0", w.tree + "/1", w.tree + "/2", fmt.Sprintf("/proc/self/fd/%d", f.Fd())} {
		if n := w.home(name); n != size {
			t.Errorf("Sync returned after %v; of %s at home are %d of %d bytes that the job had written", took, name, n, size)
		}
	}
	began = time.Now()
	must(t, w.roots.Sync(ctx(t), homeNode, job, 2))
	if again := time.Since(began); again > took/2 {
		t.Errorf("Sync of nothing takes %v, after one of %v", again, took)
	}
}

// An agent that is killed amid a Sync is followed by one that does all of it.
func TestSyncAcrossACut(t *testing.T) {
	const size = 2 << 20
	w := newWorld(t, options{rate: 1 << 20})
	far := w.guest()
	start(t, helper(alice, "dirty", filepath.Join(far, "f"), fmt.Sprint(size))).says("dirty")
	synced := make(chan error, 1)
	c := ctx(t)
	go func() { synced <- w.roots.Sync(c, homeNode, job, 2) }()
	time.Sleep(500 * time.Millisecond) // some of it is on its way
	w.killAgent()
	select {
	case err := <-synced:
		t.Fatalf("Sync ended in a cut, with %d of %d bytes at home: %v", w.home(filepath.Join(w.tree, "f")), size, err)
	case <-time.After(2 * time.Second): // beyond the patience of the mount's process, which answers for the home
	}
	w.startAgent(options{})
	must(t, <-synced)
	if n := w.home(filepath.Join(w.tree, "f")); n != size {
		t.Errorf("at home are %d of %d bytes", n, size)
	}
}

// A home whose disk is full cannot take what a job has written into its mapping: a move
// must not hide that, since the program would have been told.
func TestSyncOnFullDisk(t *testing.T) {
	w := newWorld(t, options{})
	full := filepath.Join(w.tree, "full")
	must(t, os.Mkdir(full, 0o755))
	must(t, unix.Mount("tmpfs", full, "tmpfs", 0, "size=256k,uid=1000"))
	t.Cleanup(func() { unix.Unmount(full, unix.MNT_DETACH) })
	far := w.guest()
	start(t, helper(alice, "dirty", filepath.Join(far, "full/f"), fmt.Sprint(1<<20))).says("dirty")
	isKind(t, "Sync", w.roots.Sync(ctx(t), homeNode, job, 2), fault.Unavailable, "full/f: no space left on device")
}
