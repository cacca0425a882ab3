package home_test

import (
	"bytes"
	"crypto/sha256"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var (
	fsxSeed = flag.Uint64("fsx.seed", 1, "seed of the random file test")
	fsxOps  = flag.Int("fsx.ops", 1500, "operations of the random file test")
)

func init() { helpers["fsx"] = fsxHelper }

const fsxSize = 256 << 10

// fsxHelper does random operations on one file, through two descriptors and a
// shared mapping, and compares each read with what memory says it must be.
// Its model is exact, so a difference is a fault of the file system under it.
func fsxHelper(args []string) error {
	seed, _ := strconv.ParseUint(args[1], 10, 64)
	ops, _ := strconv.Atoi(args[2])
	rnd := rand.New(rand.NewPCG(seed, 0))
	fd, err := unix.Open(args[0], unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	var want []byte
	for i := range ops {
		op := rnd.IntN(100)
		off := rnd.IntN(fsxSize)
		n := 1 + rnd.IntN(min(fsxSize-off, 1<<rnd.IntN(18)))
		fail := func(err error) error {
			return fmt.Errorf("seed %d, operation %d (%d at %d, %d bytes, size %d): %w", seed, i, op, off, n, len(want), err)
		}
		grow := func(size int) {
			if size > len(want) {
				want = append(want, make([]byte, size-len(want))...)
			}
		}
		switch {
		case op < 30: // write
			b := make([]byte, n)
			for j := range b {
				b[j] = byte(rnd.Uint32())
			}
			if m, err := unix.Pwrite(fd, b, int64(off)); m != n || err != nil {
				return fail(fmt.Errorf("pwrite = %d, %w", m, err))
			}
			grow(off + n)
			copy(want[off:], b)
		case op < 60: // read
			b := make([]byte, n)
			m, err := unix.Pread(fd, b, int64(off))
			if err != nil {
				return fail(err)
			}
			exp := want[min(off, len(want)):min(off+n, len(want))]
			if !bytes.Equal(b[:m], exp) {
				return fail(fmt.Errorf("read %d bytes that differ from the %d expected", m, len(exp)))
			}
		case op < 68: // truncate
			if err := unix.Ftruncate(fd, int64(off)); err != nil {
				return fail(err)
			}
			grow(off)
			want = want[:off:off]
		case op < 76: // write through a mapping
			if len(want) == 0 {
				continue
			}
			m, err := unix.Mmap(fd, 0, len(want), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return fail(err)
			}
			a := rnd.IntN(len(want))
			z := a + rnd.IntN(min(len(want)-a, 20000))
			for j := a; j < z; j++ {
				m[j] = byte(i)
				want[j] = byte(i)
			}
			if rnd.IntN(2) == 0 {
				unix.Msync(m, unix.MS_SYNC)
			}
			unix.Munmap(m)
		case op < 82: // read through a mapping
			if len(want) == 0 {
				continue
			}
			m, err := unix.Mmap(fd, 0, len(want), unix.PROT_READ, unix.MAP_SHARED)
			if err != nil {
				return fail(err)
			}
			same := bytes.Equal(m, want)
			unix.Munmap(m)
			if !same {
				return fail(fmt.Errorf("mapping differs"))
			}
		case op < 86: // punch a hole
			if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n)); err != nil {
				return fail(err)
			}
			if off < len(want) {
				clear(want[off:min(off+n, len(want))])
			}
		case op < 90:
			if err := unix.Fallocate(fd, 0, int64(off), int64(n)); err != nil {
				return fail(err)
			}
			grow(off + n)
		case op < 93:
			if err := unix.Fsync(fd); err != nil {
				return fail(err)
			}
		case op < 96: // close and open
			unix.Close(fd)
			if fd, err = unix.Open(args[0], unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
				return fail(err)
			}
		default:
			var st unix.Stat_t
			if err := unix.Fstat(fd, &st); err != nil || st.Size != int64(len(want)) {
				return fail(fmt.Errorf("size %d, want %d, %w", st.Size, len(want), err))
			}
		}
	}
	unix.Close(fd)
	fmt.Printf("%x", sha256.Sum256(want))
	return nil
}

func TestRandomFileOperations(t *testing.T) {
	p := newPair(t, options{})
	cmd := helper(deadline(t, 2*time.Minute), alice, "fsx", filepath.Join(p.mnt, "f"), fmt.Sprint(*fsxSeed), fmt.Sprint(*fsxOps))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(p.dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(b)); got != string(out) {
		t.Errorf("home's file has checksum %s; the job wrote %s (seed %d)", got, out, *fsxSeed)
	}
}
