package native

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/internal/api"
)

// What happens at an unlucky moment of a job's life or of its move is no worse
// than at any other.
func TestUnluckyMoments(t *testing.T) {
	c := newCluster(t)
	for _, x := range []struct {
		name string
		do   func(*cluster)
	}{
		{"little address space", (*cluster).littleMemory},
		{"mapped files at the end", (*cluster).mappingsComeHome},
		{"keeper in a move", (*cluster).keeperDiesInMove},
		{"locks", (*cluster).transactionsMove},
	} {
		if !t.Run(x.name, func(t *testing.T) {
			of := *c.world
			of.t = t
			d := *c
			d.world = &of
			x.do(&d)
		}) {
			return // a cluster after a failure is none
		}
	}
}

const mapper = `import ctypes, os, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
size = 96 << 20
fd = os.open("mapped", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, size)
at = libc.mmap(None, size, 3, 1, fd, 0)
os.close(fd)
print("ready", flush=True)
while not os.path.exists("go"): time.sleep(0.05)
ctypes.memset(at, ord("x"), size)
os._exit(0)
`

// What a guest wrote through a mapping, and never synced, is in the file when
// mosrun returns: the next command of a script reads it.
func (c *cluster) mappingsComeHome() {
	dir := c.folder("mapped")
	j := c.mosrun(c.all[0], dir, "python3", "-c", mapper)
	j.prints("ready\n")
	j.mustMigrate(2)
	c.goesOn("mapped")
	if status := j.ends(); status != 0 {
		c.t.Fatalf("mosrun ended with %d, %q", status, j.errs.String())
	}
	data, err := os.ReadFile(filepath.Join(dir, "mapped"))
	if n := bytes.Count(data, []byte("x")); err != nil || n != 96<<20 {
		c.t.Errorf("when mosrun returned %d bytes were at home, %v; want %d", n, err, 96<<20)
	}
}

// A keeper that dies while a job is leaving home costs the move, not the job.
func (c *cluster) keeperDiesInMove() {
	j, dir := c.counter(c.all[0])
	for round, delay := range []time.Duration{0, 50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond} {
		j.quiet()
		migrated := make(chan error, 1)
		go func() { migrated <- j.migrate(2) }()
		hit := waitFor(4*time.Second, func() bool {
			r, err := j.record()
			return err == nil && r.Next != nil
		})
		time.Sleep(delay)
		home := j.home.agent.cmd.Process
		if err := home.Signal(syscall.SIGSTOP); err != nil {
			c.t.Fatal(err)
		}
		time.Sleep(2 * time.Millisecond)
		r, err := j.record()
		hit = hit && err == nil && r.Next != nil && killAll(j.home.keepers())
		if err := home.Signal(syscall.SIGCONT); err != nil {
			c.t.Fatal(err)
		}
		merr := <-migrated
		at := j.quiet()
		c.t.Logf("round %d: keeper killed %v; on %d, migrate: %v", round, hit, at, merr)
		j.onlyCopy(at)
		j.goesOn(dir)
		if at != 1 {
			j.mustMigrate(1)
		}
	}
	j.counted(dir)
}

// A data base that is written to without a pause holds a lock whenever one
// looks; it moves between two transactions, and stays whole.
func (c *cluster) transactionsMove() {
	dir := c.folder("transactions")
	j := c.mosrun(c.all[0], dir, "sh", "-c", `sqlite3 db 'create table t(a integer primary key)'; echo ready
		(while ! test -e go; do echo 'insert into t values(null);'; done) | sqlite3 db; sqlite3 db 'pragma integrity_check; select count(*)=max(a) from t'`)
	j.prints("ready\n")
	for _, to := range []api.NodeID{2, 3, 1, 2, 1} {
		time.Sleep(300 * time.Millisecond)
		began := time.Now()
		// It is a matter of luck, which a busy machine has less of.
		c.eventually(40*time.Second, "it moves", func() error { return j.migrate(to) })
		c.t.Logf("to %d in %v", to, time.Since(began).Round(time.Millisecond))
	}
	c.goesOn("transactions")
	if status := j.ends(); status != 0 || !strings.HasSuffix(j.out.String(), "\nok\n1\n") {
		c.t.Errorf("it ended with %d, %q, %q", status, j.out.String(), j.errs.String())
	}
}

// A limit of the address space comes through mosrun to the program. (mosrun itself
// needs some of it, with cgo as it is built here 2 GiB.)
func (c *cluster) littleMemory() {
	const limit, show = "ulimit -v 3000000", `ulimit -v; ulimit -d; grep 'address space' /proc/self/limits`
	native, err := c.shell(c.all[0], c.dir, limit, "sh", "-c", show).Output()
	if err != nil {
		c.t.Fatal(stderrOf(err))
	}
	for range 3 {
		j := c.mosrunFrom(c.all[0], c.dir, limit, nil, "sh", "-c", show)
		if status := j.ends(); status != 0 || j.out.String() != string(native) {
			c.t.Errorf("it ended with %d, %q, %q; natively %q", status, j.out.String(), j.errs.String(), native)
		}
	}
}
