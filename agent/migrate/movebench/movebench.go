// Package movebench measures a move beside what one would do by hand with the
// same CRIU: dump to a folder, tar over the same kind of connection, restore.
// Both sides of each move are on this machine, so that only the way is
// measured; what is moved is a process with memory that does not compress, and
// it measures itself how long it stood still.
package movebench

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/criu"
	"mosimg/internal/fault"
)

// Verb is the first argument that makes a program which calls Ticker the
// process that is moved; the second is its size in bytes.
const Verb = "bench-ticker"

// tick is how often the process looks at the clock; a pause of more than
// pauseMin is told.
const (
	tick     = time.Millisecond
	pauseMin = 10 * time.Millisecond
)

// Ticker is the process that is moved. It writes "ready", and then a line for
// each pause, until it is killed: begin and end, in Unix microseconds.
func Ticker(size string) error {
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil || n < 1 {
		return fault.New(fault.Usage, "read", "size "+size, "not a number of bytes", "")
	}
	memory := make([]byte, n)
	if _, err := io.ReadFull(rand.Reader, memory); err != nil {
		return err
	}
	fmt.Println("ready")
	for last := time.Now(); ; {
		time.Sleep(tick)
		now := time.Now()
		if pause := now.Sub(last); pause > pauseMin {
			fmt.Println(last.UnixMicro(), now.UnixMicro())
		}
		last = now
		memory[int(now.UnixNano())%len(memory)]++ // it stays in use
	}
}

// Result is one move.
type Result struct {
	// Downtime is how long the process saw no time pass; Total from the order to
	// the end of all work.
	Downtime, Total time.Duration
}

// Bench is a place to measure in. Make it with New.
type Bench struct {
	criu control.CRIU
	// version is CRIU's.
	version string
	dir     string // on tmpfs
	group   string
	exe     string
}

// New tries CRIU out and makes room for images. bundle is as for criu.Find; it
// must be a bundle. It needs root.
func New(ctx context.Context, bundle string) (*Bench, error) {
	if os.Geteuid() != 0 {
		return nil, fault.New(fault.Refused, "measure", "moves", "only root can dump and restore processes", "run this as root")
	}
	dir, err := os.MkdirTemp("/dev/shm", "mosimg-bench-")
	if err != nil {
		return nil, fault.New(fault.Environment, "make a folder in", "/dev/shm", err, "a tmpfs is needed there")
	}
	b := &Bench{dir: dir}
	if err := b.setUp(ctx, bundle); err != nil {
		os.RemoveAll(dir)
		return nil, err
	}
	return b, nil
}

func (b *Bench) setUp(ctx context.Context, bundle string) error {
	st := criu.Probe(ctx, bundle, b.dir, nil)
	if !st.Usable {
		return fault.New(fault.Environment, "use", "criu", st.Reason, "see: mosimg criu --help")
	}
	if st.Tool.Bundle == "" {
		return fault.New(fault.Environment, "use", st.Tool.Argv[0], "capsules need CRIU as a bundle", "see: mosimg criu --help")
	}
	bundle, err := filepath.Abs(st.Tool.Bundle)
	if err != nil {
		return err
	}
	b.criu = control.CRIU{Bundle: bundle, Env: st.Tool.Env}
	for _, a := range st.Tool.Argv {
		b.criu.Argv = append(b.criu.Argv, strings.ReplaceAll(a, st.Tool.Bundle, bundle))
	}
	b.version = st.Version
	mount, err := cgroup.Mount()
	if err != nil {
		return err
	}
	b.group = filepath.Join(mount, filepath.Base(b.dir))
	b.exe, err = os.Executable()
	return err
}

// Close removes what New made.
func (b *Bench) Close() error {
	if err := os.Remove(b.group); err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.RemoveAll(b.dir)
}

// Copy is how long size bytes take over a plain TCP connection.
func Copy(size int64) (time.Duration, error) {
	from, to, err := tcpPair()
	if err != nil {
		return 0, err
	}
	defer from.Close()
	defer to.Close()
	data := make([]byte, 1<<20)
	if _, err := io.ReadFull(rand.Reader, data); err != nil {
		return 0, err
	}
	began := time.Now()
	sent := make(chan error, 1)
	go func() {
		var err error
		for left := size; left > 0 && err == nil; left -= int64(len(data)) {
			_, err = from.Write(data[:min(left, int64(len(data)))])
		}
		sent <- err
	}()
	buf := make([]byte, 1<<20)
	for got := int64(0); got < size; {
		n, err := to.Read(buf)
		if err != nil {
			return 0, err
		}
		got += int64(n)
	}
	took := time.Since(began)
	return took, <-sent
}

func tcpPair() (a, b net.Conn, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		return nil, nil, err
	}
	if b, err = l.Accept(); err != nil {
		a.Close()
	}
	return a, b, err
}

// ByHand moves a process with criu dump, tar over TLS, and criu restore.
func (b *Bench) ByHand(ctx context.Context, size int64) (r Result, err error) {
	work, err := os.MkdirTemp(b.dir, "hand-")
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(work)
	src, dst := filepath.Join(work, "src"), filepath.Join(work, "dst")
	for _, d := range []string{src, dst} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return r, err
		}
	}
	out, err := os.Create(filepath.Join(work, "out"))
	if err != nil {
		return r, err
	}
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return r, err
	}
	defer null.Close()
	cmd := exec.Command(b.exe, Verb, strconv.FormatInt(size, 10))
	cmd.Dir, cmd.Env = "/", []string{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return r, err
	}
	pid := cmd.Process.Pid
	// The restored process has the same number, and is not our child.
	defer unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // it may be gone
	if err := await(ctx, func() (bool, error) { return hasLine(out.Name(), "ready") }); err != nil {
		return r, err
	}
	began := time.Now()
	dump := b.command(ctx, "dump", "-t", strconv.Itoa(pid), "-D", src, "-o", "dump.log")
	if text, err := dump.CombinedOutput(); err != nil {
		return r, fmt.Errorf("criu dump: %w: %s", err, text)
	}
	_ = cmd.Wait()       // killed by the dump
	within := time.Now() // the process is gone, and not there yet
	if err := tarOver(src, dst); err != nil {
		return r, err
	}
	restore := b.command(ctx, "restore", "-d", "-D", dst, "-o", "restore.log")
	if text, err := restore.CombinedOutput(); err != nil {
		return r, fmt.Errorf("criu restore: %w: %s", err, text)
	}
	r.Total = time.Since(began)
	err = await(ctx, func() (ok bool, err error) {
		r.Downtime, ok, err = pauseAt(out.Name(), within)
		return ok, err
	})
	return r, err
}

func (b *Bench) command(ctx context.Context, args ...string) *exec.Cmd {
	argv := append(append([]string{}, b.criu.Argv...), args...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, b.criu.Env...)
	return cmd
}

// await asks until the answer is yes.
func await(ctx context.Context, ask func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if ok, err := ask(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func hasLine(name, want string) (bool, error) {
	data, err := os.ReadFile(name)
	return strings.Contains(string(data), want+"\n"), err
}

// pauseAt is the pause that a ticker has told of in which a moment lies.
func pauseAt(name string, within time.Time) (time.Duration, bool, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return 0, false, err
	}
	d, ok := findPause(string(data), within.UnixMicro())
	return d, ok, nil
}

// findPause reads what Ticker writes; the last line may be cut.
func findPause(text string, within int64) (time.Duration, bool) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 2 || !strings.HasSuffix(line, "\n") {
			continue
		}
		begin, err1 := strconv.ParseInt(f[0], 10, 64)
		end, err2 := strconv.ParseInt(f[1], 10, 64)
		if err1 == nil && err2 == nil && begin <= within && within <= end {
			return time.Duration(end-begin) * time.Microsecond, true
		}
	}
	return 0, false
}
