package capsule_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/capsuletest"
	"mosimg/agent/capsule/control"
	"mosimg/internal/fault"
)

// thing is something a process has. make makes it before the move and
// returns what looks at it after.
type thing struct {
	name string
	make func(dir string) (check func() error, err error)
}

// want fails if got is another.
func want[T comparable](what string, got, want T) error {
	if got != want {
		return fmt.Errorf("%s = %v; want %v", what, got, want)
	}
	return nil
}

func readN(fd, n int) (string, error) {
	b := make([]byte, n)
	n, err := unix.Read(fd, b)
	return string(b[:max(n, 0)]), err
}

var things = []thing{
	{"unread pipe", func(string) (func() error, error) {
		var p [2]int
		if err := unix.Pipe2(p[:], 0); err != nil {
			return nil, err
		}
		unix.Write(p[1], []byte("unread"))
		return func() error {
			got, err := readN(p[0], 10)
			if err != nil {
				return err
			}
			return want("pipe", got, "unread")
		}, nil
	}},
	{"socket pair", func(string) (func() error, error) {
		s, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return nil, err
		}
		unix.Write(s[0], []byte("queued"))
		return func() error {
			got, err := readN(s[1], 10)
			if err != nil {
				return err
			}
			unix.Write(s[1], []byte("back"))
			back, _ := readN(s[0], 10)
			return want("socket", got+" "+back, "queued back")
		}, nil
	}},
	{"listening unix socket", func(string) (func() error, error) {
		l, err := net.Listen("unix", "/run/user/test.sock")
		if err != nil {
			return nil, err
		}
		return func() error {
			go func() {
				c, err := l.Accept()
				if err == nil {
					io.WriteString(c, "hello")
					c.Close()
				}
			}()
			c, err := net.Dial("unix", "/run/user/test.sock")
			if err != nil {
				return err
			}
			got, err := io.ReadAll(c)
			if err != nil {
				return err
			}
			return want("answer", string(got), "hello")
		}, nil
	}},
	{"open file", func(dir string) (func() error, error) {
		f, err := os.Create(filepath.Join(dir, "open"))
		if err != nil {
			return nil, err
		}
		f.WriteString("0123456789")
		f.Seek(4, io.SeekStart)
		return func() error {
			got, err := readN(int(f.Fd()), 3)
			if err != nil {
				return err
			}
			return want("file at its offset", got, "456")
		}, nil
	}},
	{"deleted file", func(dir string) (func() error, error) {
		f, err := os.Create(filepath.Join(dir, "deleted"))
		if err != nil {
			return nil, err
		}
		f.WriteString("still here")
		if err := os.Remove(f.Name()); err != nil {
			return nil, err
		}
		return func() error {
			b := make([]byte, 10)
			if _, err := f.ReadAt(b, 0); err != nil {
				return err
			}
			return want("deleted file", string(b), "still here")
		}, nil
	}},
	{"deleted name of a file with another", func(dir string) (func() error, error) {
		f, err := os.Create(filepath.Join(dir, "one"))
		if err != nil {
			return nil, err
		}
		f.WriteString("linked")
		if err := os.Link(f.Name(), filepath.Join(dir, "two")); err != nil {
			return nil, err
		}
		if err := os.Remove(f.Name()); err != nil {
			return nil, err
		}
		return func() error {
			b := make([]byte, 6)
			if _, err := f.ReadAt(b, 0); err != nil {
				return err
			}
			if err := want("file", string(b), "linked"); err != nil {
				return err
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "link_remap*")); len(left) > 0 {
				return fmt.Errorf("left behind: %v", left)
			}
			return nil
		}, nil
	}},
	{"shared mapping of a file", func(dir string) (func() error, error) {
		f, err := os.Create(filepath.Join(dir, "mapped"))
		if err != nil {
			return nil, err
		}
		f.Truncate(8192)
		m, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, err
		}
		m[5000] = 42
		return func() error {
			m[5001] = 43
			b := make([]byte, 2)
			if _, err := f.ReadAt(b, 5000); err != nil {
				return err
			}
			return want("file", string(b), "\x2a\x2b")
		}, nil
	}},
	{"shared anonymous memory", func(string) (func() error, error) {
		m, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANON)
		if err != nil {
			return nil, err
		}
		copy(m[700_000:], "shared")
		return func() error { return want("memory", string(m[700_000:700_006]), "shared") }, nil
	}},
	{"SysV shared memory", func(string) (func() error, error) {
		id, err := unix.SysvShmGet(4711, 8192, unix.IPC_CREAT|0o600)
		if err != nil {
			return nil, err
		}
		m, err := unix.SysvShmAttach(id, 0, 0)
		if err != nil {
			return nil, err
		}
		copy(m, "sysv")
		return func() error {
			again, err := unix.SysvShmGet(4711, 8192, 0)
			if err != nil {
				return err
			}
			return want("segment", fmt.Sprint(again, string(m[:4])), fmt.Sprint(id, "sysv"))
		}, nil
	}},
	{"POSIX shared memory", func(string) (func() error, error) {
		f, err := os.OpenFile("/dev/shm/test", os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		f.Truncate(1 << 20)
		m, err := unix.Mmap(int(f.Fd()), 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, err
		}
		copy(m[9000:], "posix")
		return func() error {
			m[9005] = '!'
			data, err := os.ReadFile("/dev/shm/test")
			if err != nil {
				return err
			}
			return want("object", string(data[9000:9006]), "posix!")
		}, nil
	}},
	{"memfd", func(string) (func() error, error) {
		fd, err := unix.MemfdCreate("test", 0)
		if err != nil {
			return nil, err
		}
		unix.Write(fd, []byte("memfd"))
		return func() error {
			b := make([]byte, 5)
			if _, err := unix.Pread(fd, b, 0); err != nil {
				return err
			}
			return want("memfd", string(b), "memfd")
		}, nil
	}},
	{"eventfd in epoll", func(string) (func() error, error) {
		efd, err := unix.Eventfd(3, unix.EFD_NONBLOCK)
		if err != nil {
			return nil, err
		}
		ep, err := unix.EpollCreate1(0)
		if err != nil {
			return nil, err
		}
		if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, efd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(efd)}); err != nil {
			return nil, err
		}
		return func() error {
			ev := make([]unix.EpollEvent, 4)
			n, err := unix.EpollWait(ep, ev, 1000)
			if err != nil || n != 1 {
				return fmt.Errorf("epoll: %d, %w", n, err)
			}
			got, err := readN(efd, 8)
			if err != nil {
				return err
			}
			return want("eventfd", got[0], 3)
		}, nil
	}},
	{"timerfd", func(string) (func() error, error) {
		fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, 0)
		if err != nil {
			return nil, err
		}
		if err := unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: unix.Timespec{Nsec: 20e6}, Value: unix.Timespec{Nsec: 20e6}}, nil); err != nil {
			return nil, err
		}
		return func() error { _, err := readN(fd, 8); return err }, nil
	}},
	{"interval timer and its signal", func(string) (func() error, error) {
		ch := make(chan os.Signal, 1)
		signal.Notify(ch, unix.SIGALRM)
		_, err := unix.Setitimer(unix.ITIMER_REAL, unix.Itimerval{Interval: unix.Timeval{Usec: 20000}, Value: unix.Timeval{Usec: 20000}})
		return func() error {
			for len(ch) > 0 {
				<-ch
			}
			select {
			case <-ch:
				return nil
			case <-time.After(2 * time.Second):
				return fmt.Errorf("no alarm")
			}
		}, err
	}},
	{"named pipe and lock in /run", func(string) (func() error, error) {
		if err := unix.Mkfifo("/run/lock/fifo", 0o600); err != nil {
			return nil, err
		}
		f, err := os.OpenFile("/run/lock/fifo", os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		f.WriteString("fifo")
		return func() error {
			got, err := readN(int(f.Fd()), 10)
			if err != nil {
				return err
			}
			return want("fifo", got, "fifo")
		}, nil
	}},
	{"monotonic clock", func(string) (func() error, error) {
		began := time.Now()
		return func() error {
			if d := time.Since(began); d < 0 || d > time.Minute {
				return fmt.Errorf("clock went %v", d)
			}
			return nil
		}, nil
	}},
	{"host name and directory", func(dir string) (func() error, error) {
		name, err := os.Hostname()
		return func() error {
			now, err := os.Hostname()
			if err != nil {
				return err
			}
			wd, err := os.Getwd()
			if err != nil {
				return err
			}
			return want("place", now+" "+wd, name+" "+dir)
		}, err
	}},
}

// contents is a job with one of each; it looks at them after each line of input.
func contents(args []string) int {
	var checks []func() error
	for _, th := range things {
		check, err := th.make(args[0])
		if err != nil {
			fmt.Printf("%s: make: %v\n", th.name, err)
			return 1
		}
		checks = append(checks, check)
	}
	fmt.Println("ready")
	bufio.NewReader(os.Stdin).ReadString('\n')
	for i, th := range things {
		if err := checks[i](); err != nil {
			fmt.Printf("%s: %v\n", th.name, err)
		} else {
			fmt.Printf("%s: ok\n", th.name)
		}
	}
	return 0
}

// What a process has, it has after a move.
func TestContentsMove(t *testing.T) {
	w := capsuletest.New(t)
	w.CRIU = capsuletest.CRIU(t)
	ctx := t.Context()
	c := w.Capsule(w.Home())
	if _, err := c.Run(ctx, w.Program("contents", w.Work)); err != nil {
		t.Fatal(err)
	}
	o, err := c.Output(ctx, control.Stdout, 0)
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(o).ReadString('\n')
	if err != nil || line != "ready\n" {
		t.Fatalf("the job says %q, %v", line, err)
	}
	o.Close()
	images := w.Images()
	if err := c.Dump(ctx, images, nil); err != nil {
		log, _ := os.ReadFile(filepath.Join(images.Name(), "dump.log"))
		t.Fatalf("%v\n%s", err, log)
	}
	to := w.Capsule(w.View())
	if err := to.Restore(ctx, images, w.Program("x").Owner()); err != nil {
		log, _ := os.ReadFile(filepath.Join(images.Name(), "restore.log"))
		t.Fatalf("%v\n%s", err, log)
	}
	if err := c.Finish(ctx, true); err != nil {
		t.Fatal(err)
	}
	if err := to.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	in, err := to.Input(ctx)
	if err != nil {
		t.Fatal(err)
	}
	in.Write([]byte("look\n"))
	in.CloseWrite()
	k := w.Collect(to, control.Stdout, uint64(len(line)))
	if st, err := to.Wait(ctx); err != nil || st.State != control.Ended {
		t.Errorf("the job ended as %+v, %v", st, err)
	}
	out, _ := k.Wait()
	for l := range strings.SplitSeq(strings.TrimSpace(string(out)), "\n") {
		if !strings.HasSuffix(l, ": ok") {
			t.Error(l)
		}
	}
	if n := strings.Count(string(out), "\n"); n != len(things) {
		t.Errorf("%d things were looked at; want %d", n, len(things))
	}
}

// pinned is a job with something that keeps it where it is.
func pinned(args []string) int {
	var err error
	switch args[0] {
	case "connection":
		var l net.Listener
		if l, err = net.Listen("tcp", "127.0.0.1:0"); err == nil {
			_, err = net.Dial("tcp", l.Addr().String())
		}
	case "lock":
		var f *os.File
		if f, err = os.Create(filepath.Join(args[1], "locked")); err == nil {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
	}
	if err != nil {
		return 1
	}
	fmt.Println("ready")
	time.Sleep(time.Hour)
	return 0
}

// locker is a program of transactions: it holds a lock nearly all of the time.
func locker(args []string) int {
	f, err := os.Create(filepath.Join(args[0], "transactions"))
	if err != nil {
		return 11
	}
	fmt.Println("ready")
	for n := 0; ; n++ {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			return 12
		}
		time.Sleep(2 * time.Millisecond)
		if _, err := f.WriteAt([]byte(strconv.Itoa(n)), 0); err != nil {
			return 13
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
			return 14
		}
		for t := time.Now(); time.Since(t) < 100*time.Microsecond; {
		}
	}
}

// A program that works in transactions holds a lock whenever somebody looks, and
// can be moved between two of them.
func TestMoveBetweenLocks(t *testing.T) {
	w := capsuletest.New(t)
	w.CRIU = capsuletest.CRIU(t)
	ctx := t.Context()
	c := w.Capsule(w.Home())
	if _, err := c.Run(ctx, w.Program("locker", w.Work)); err != nil {
		t.Fatal(err)
	}
	o, err := c.Output(ctx, control.Stdout, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(o, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	o.Close()
	if err := c.Dump(ctx, w.Images(), nil); err != nil {
		t.Fatalf("Dump: %v", err)
	}
	// It goes on after a move that is called off.
	if err := c.Finish(ctx, false); err != nil {
		t.Fatal(err)
	}
	count := func() string {
		data, err := os.ReadFile(filepath.Join(w.Work, "transactions"))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	was := count()
	for deadline := time.Now().Add(10 * time.Second); count() == was; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the job stands still after a move that was called off")
		}
	}
	w.Remove(c)
}

// A dump whose request ends at whatever moment leaves the job running: CRIU may
// have begun to seize it, and must not find it frozen for good.
func TestDumpIsCancelled(t *testing.T) {
	w := capsuletest.New(t)
	w.CRIU = capsuletest.CRIU(t)
	c := w.Capsule(w.Home())
	if _, err := c.Run(t.Context(), w.Program("locker", w.Work)); err != nil {
		t.Fatal(err)
	}
	count := func() string {
		data, _ := os.ReadFile(filepath.Join(w.Work, "transactions"))
		return string(data)
	}
	for round := range 60 {
		after := time.Duration(round) * time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), after)
		err := c.Dump(ctx, w.Images(), nil)
		cancel()
		if err == nil {
			err = c.Finish(t.Context(), false)
		} else if ctx.Err() == nil {
			t.Fatalf("after %v: %v", after, err)
		}
		// Its end may take a moment, but is an end.
		was := count()
		for deadline := time.Now().Add(15 * time.Second); count() == was; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				st, serr := c.Status(t.Context())
				t.Fatalf("a dump that was cancelled after %v (%v) left the job standing still: %+v, %v", after, err, st, serr)
			}
		}
	awaitRunning:
		for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(time.Millisecond) {
			st, err := c.Status(t.Context())
			switch {
			case err == nil && st.State == control.Running:
				break awaitRunning
			case time.Now().After(deadline):
				t.Fatalf("after %v: %+v, %v", after, st, err)
			}
		}
	}
	w.Remove(c)
}

// A dump that met a process just ending is told apart from what will not go by itself.
func TestDumpRaces(t *testing.T) {
	w := capsuletest.New(t)
	w.CRIU = capsuletest.CRIU(t)
	w.CRIU = w.Racy(w.CRIU, 1)
	ctx := t.Context()
	c := w.Capsule(w.Home())
	if _, err := c.Run(ctx, w.Program("locker", w.Work)); err != nil {
		t.Fatal(err)
	}
	err := c.Dump(ctx, w.Images(), nil)
	if fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), "Unable to detach from 1002") {
		t.Errorf("Dump that met a dying process = %v; want kind %d, with CRIU's word", err, fault.Unavailable)
	}
	if st, err := c.Status(ctx); err != nil || st.State != control.Running {
		t.Errorf("after it the job is %+v, %v; want it running", st, err)
	}
	if err := c.Dump(ctx, w.Images(), nil); err != nil {
		t.Errorf("the next dump: %v", err)
	}
	w.Remove(c)
}

// What cannot move is refused in words, and the job runs on.
func TestRefusalInWords(t *testing.T) {
	w := capsuletest.New(t)
	w.CRIU = capsuletest.CRIU(t)
	ctx := t.Context()
	for kind, want := range map[string]string{
		"connection": "(program) has a network socket (tcp)",
		"lock":       "(program) holds a lock on ",
	} {
		c := w.Capsule(w.Home())
		if _, err := c.Run(ctx, w.Program("pinned", kind, w.Work)); err != nil {
			t.Fatal(err)
		}
		o, err := c.Output(ctx, control.Stdout, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(o, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		o.Close()
		err = c.Dump(ctx, w.Images(), nil)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Dump with a %s = %v; want %q", kind, err, want)
		}
		if st, err := c.Status(ctx); err != nil || st.State != control.Running {
			t.Errorf("after a refusal the job is %+v, %v; want it running", st, err)
		}
		w.Remove(c)
	}
}
