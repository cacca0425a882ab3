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
)

func init() { helpers["dirty"] = dirtyHelper }

// dirtyHelper writes into a file through a shared mapping, closes the file,
// says so and waits with the mapping: "FILE SIZE".
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
	if err := unix.Close(fd); err != nil {
		return err
	}
	for i := range m {
		m[i] = 'd'
	}
	fmt.Println("dirty")
	io.Copy(io.Discard, os.Stdin)
	return nil
}

// What a job has written into a mapped file is in its node's cache only, and
// would be lost with it when the job moves on: Sync returns when all of it is
// at home, also over a link that needs seconds for it, and also of a file that
// is closed and deleted.
func TestSyncBringsMappedPagesHome(t *testing.T) {
	const size = 3 << 20
	w := newWorld(t, options{rate: 1 << 20})
	far := w.guest()
	start(t, helper(alice, "dirty", filepath.Join(far, "mapped"), fmt.Sprint(size))).says("dirty")
	began := time.Now()
	must(t, w.roots.Sync(ctx(t), homeNode, job, 2))
	data, err := os.ReadFile(filepath.Join(w.tree, "mapped"))
	must(t, err)
	if n := bytes.Count(data, []byte("d")); n != size {
		t.Errorf("Sync returned after %v; at home are %d of %d bytes that the job had written", time.Since(began), n, size)
	}
}
