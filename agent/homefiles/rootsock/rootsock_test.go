package rootsock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

type word struct{ Word string }

// TestMain is also a program that asks.
func TestMain(m *testing.M) {
	if os.Getenv("ROOTSOCK_ASK") == "" {
		os.Exit(m.Run())
	}
	c, err := net.Dial("unix", os.Args[1])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	io.WriteString(c, "{\"Word\":\"secret\"}\n") // it may be closed already
	got, _ := io.ReadAll(io.LimitReader(c, 6))   // as above
	fmt.Printf("got %q\n", got)
}

// listen serves what echoes the first line's word and then all that follows.
func listen(t *testing.T, path string) {
	t.Helper()
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, l, slog.New(slog.DiscardHandler), func(_ context.Context, c net.Conn, first word) {
			defer c.Close()
			io.WriteString(c, first.Word)
			io.Copy(c, c)
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
}

// What follows the first line must reach the one who serves it whole: it is the
// beginning of a session. Job names make paths that are longer than sockets' may be.
func TestFirstLineThenBytes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: others are refused")
	}
	path := filepath.Join(t.TempDir(), strings.Repeat("long", 30), "s")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(context.Background(), path, word{}); !errors.Is(err, ErrNobody) {
		t.Errorf("Dial before anybody listens: %v", err)
	}
	listen(t, path)
	c, err := Dial(context.Background(), path, word{"first"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "second")
	c.(*net.UnixConn).CloseWrite()
	got, err := io.ReadAll(c)
	if string(got) != "firstsecond" || err != nil {
		t.Errorf("answer %q, %v", got, err)
	}
}

// A user of the machine who gets hold of the socket must not reach others' files.
func TestUsersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to act as a user")
	}
	dir, err := os.MkdirTemp("", "rootsock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	path := filepath.Join(dir, "s")
	listen(t, path)
	ask := func() string {
		cmd := exec.Command("/proc/self/exe", path)
		cmd.Env = append(os.Environ(), "ROOTSOCK_ASK=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	if got := ask(); !strings.Contains(got, "permission denied") {
		t.Errorf("a user connects: %s", got)
	}
	os.Chmod(path, 0o666)
	if got := ask(); got != "got \"\"\n" {
		t.Errorf("a user who can connect: %s; want no answer", got)
	}
}

// Too many open files, for a moment, must not end who has all open files of all guests.
func TestAcceptGoesOn(t *testing.T) {
	l := &failing{fail: make(chan error, 1), closed: make(chan struct{})}
	l.fail <- syscall.EMFILE
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, l, slog.New(slog.DiscardHandler), func(context.Context, net.Conn, word) {})
	}()
	select {
	case err := <-served:
		t.Fatalf("Serve ended: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	cancel()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
}

type failing struct {
	net.Listener
	fail   chan error
	closed chan struct{}
}

func (l *failing) Accept() (net.Conn, error) {
	select {
	case err := <-l.fail:
		return nil, err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *failing) Close() error {
	select {
	case <-l.closed:
	default:
		close(l.closed)
	}
	return nil
}

func FuzzReadLine(f *testing.F) {
	for _, s := range []string{"", "\n", "{}\n", `{"Word":"x"}` + "\nrest", `{"Word":`, "null\n\n", strings.Repeat("x", 100) + "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		var v word
		if err := ReadLine(r, &v); err != nil {
			return
		}
		line, rest, ok := bytes.Cut(data, []byte("\n"))
		if !ok || r.Len() != len(rest) {
			t.Errorf("ReadLine(%q) left %d bytes; want %d, all after line %q", data, r.Len(), len(rest), line)
		}
	})
}

// A connection is handed to another process whole; what is no connection is an
// error, and no descriptor stays behind.
func TestHandAndTake(t *testing.T) {
	pair := func() (a, b *net.UnixConn) {
		t.Helper()
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		var ends [2]*net.UnixConn
		for i, fd := range fds {
			f := os.NewFile(uintptr(fd), "pair")
			defer f.Close()
			c, err := net.FileConn(f)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			ends[i] = c.(*net.UnixConn)
		}
		return ends[0], ends[1]
	}
	from, to := pair()
	x, y := pair()
	if err := Hand(from, x); err != nil {
		t.Fatal(err)
	}
	got, err := Take(to)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	x.Close()
	if _, err := io.WriteString(got, "still here"); err != nil {
		t.Error(err)
	}
	if b := make([]byte, 10); true {
		if _, err := io.ReadFull(y, b); err != nil || string(b) != "still here" {
			t.Errorf("%q, %v", b, err)
		}
	}

	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	before := descriptors(t)
	for name, rights := range map[string][]byte{
		"nothing": nil, "no socket": syscall.UnixRights(int(file.Fd())),
		"two at once": syscall.UnixRights(int(file.Fd()), int(file.Fd())),
	} {
		if _, _, err := from.WriteMsgUnix([]byte{0}, rights, nil); err != nil {
			t.Fatal(err)
		}
		if c, err := Take(to); err == nil {
			t.Errorf("%s: %v was taken", name, c)
		}
	}
	from.Close()
	if c, err := Take(to); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v, %v; want io.EOF", c, err)
	}
	if after := descriptors(t); after > before-1 {
		t.Errorf("%d descriptors are open, %d were before and one was closed", after, before)
	}
	if _, err := Take(nil); err == nil {
		t.Error("Take from nobody")
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
