package labport

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// guest is a served unix socket whose guest can be rebooted.
type guest struct {
	socket string
	l      net.Listener
	cancel context.CancelFunc
	wait   sync.WaitGroup
}

// startGuest serves m on a socket, each connection as one boot of a guest.
func startGuest(t *testing.T, m Machine) (*guest, *Client) {
	t.Helper()
	dir, err := os.MkdirTemp("", "labport")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	g := &guest{socket: filepath.Join(dir, "p")}
	if g.l, err = net.Listen("unix", g.socket); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	g.cancel = cancel
	g.wait.Go(func() {
		for {
			conn, err := g.l.Accept()
			if err != nil {
				return
			}
			g.wait.Go(func() {
				defer conn.Close()
				ServeMachine(ctx, conn, m, nil)
			})
		}
	})
	c := Dial(g.socket, nil)
	t.Cleanup(func() {
		c.Close()
		cancel()
		g.l.Close()
		g.wait.Wait()
	})
	return g, c
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestRunCarriesStreamsAndStatus(t *testing.T) {
	_, c := startGuest(t, Local{})
	var out, errOut bytes.Buffer
	exit, err := c.Run(testContext(t), Cmd{
		Argv:   []string{"sh", "-c", "cat; echo $X >&2; pwd >&2; exit 7"},
		Env:    []string{"X=y"},
		Dir:    "/usr",
		Stdin:  strings.NewReader("hello\n"),
		Stdout: &out, Stderr: &errOut,
	})
	if err != nil || exit.Status != 7 || out.String() != "hello\n" || errOut.String() != "y\n/usr\n" {
		t.Errorf("Run = %v, %v, out %q, err %q; want status 7, hello, y and /usr", exit, err, &out, &errOut)
	}
}

func TestRunTellsSignalsAndMissingPrograms(t *testing.T) {
	_, c := startGuest(t, Local{})
	exit, err := c.Run(testContext(t), Cmd{Argv: []string{"sh", "-c", "kill -TERM $$"}})
	if err != nil || exit.Signal != "SIGTERM" || exit.Status != 143 {
		t.Errorf("Run = %v, %v; want SIGTERM, 143", exit, err)
	}
	if _, err = c.Run(testContext(t), Cmd{Argv: []string{"/no/such/program"}}); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("Run of a missing program = %v; want an error that names it", err)
	}
	if _, err = c.Run(testContext(t), Cmd{Argv: []string{"true"}, User: "no-such-user"}); err == nil || !strings.Contains(err.Error(), "no-such-user") {
		t.Errorf("Run as a missing user = %v; want an error that names it", err)
	}
}

func TestRunAsUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to become another user")
	}
	_, c := startGuest(t, Local{})
	var out bytes.Buffer
	if exit, err := c.Run(testContext(t), Cmd{Argv: []string{"id", "-un"}, User: "nobody", Stdout: &out}); err != nil || exit.Status != 0 || out.String() != "nobody\n" {
		t.Errorf("Run as nobody = %v, %v, %q; want nobody", exit, err, &out)
	}
}

// A cancelled command must not run on: scenarios would then fight with it.
func TestCancelKillsTheWholeCommand(t *testing.T) {
	_, c := startGuest(t, Local{})
	pidFile := filepath.Join(t.TempDir(), "pid")
	ctx, cancel := context.WithCancel(testContext(t))
	r, w := io.Pipe()
	go func() {
		io.ReadFull(r, make([]byte, 1))
		cancel()
		io.Copy(io.Discard, r)
	}()
	_, err := c.Run(ctx, Cmd{Argv: []string{"sh", "-c", "sleep 100 & echo $! >" + pidFile + "; echo x; wait"}, Stdout: w})
	w.Close()
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("Run = %v; want context.Canceled", err)
	}
	b, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	stat := "/proc/" + strings.TrimSpace(string(b)) + "/stat"
	// It was sent SIGKILL before Run returned; its end is up to the scheduler.
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(stat)
		if err != nil || strings.Contains(string(b), ") Z ") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the command's child still runs: %s", b)
		}
	}
}

// Large output must neither be lost nor block another command while its
// reader is slow.
func TestSlowReaderDoesNotBlockOthers(t *testing.T) {
	_, c := startGuest(t, Local{})
	const size = 4 << 20
	r, w := io.Pipe()
	result := make(chan error, 1)
	go func() {
		_, err := c.Run(testContext(t), Cmd{Argv: []string{"head", "-c", "4194304", "/dev/zero"}, Stdout: w})
		w.CloseWithError(err)
		result <- err
	}()
	for range 20 {
		if _, err := c.Run(testContext(t), Cmd{Argv: []string{"true"}}); err != nil {
			t.Fatal(err)
		}
	}
	n, err := io.Copy(io.Discard, r)
	if err != nil || n != size {
		t.Errorf("read %d bytes, %v; want %d", n, err, size)
	}
	if err := <-result; err != nil {
		t.Error(err)
	}
}

func TestStdinThatNeverEndsDoesNotHoldTheCommand(t *testing.T) {
	_, c := startGuest(t, Local{})
	r, w := io.Pipe()
	defer w.Close()
	if exit, err := c.Run(testContext(t), Cmd{Argv: []string{"true"}, Stdin: r}); err != nil || exit.Status != 0 {
		t.Errorf("Run = %v, %v; want status 0", exit, err)
	}
}

func TestPutIsWholeOrNothing(t *testing.T) {
	_, c := startGuest(t, Local{})
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	content := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	if err := c.Put(testContext(t), name, 0o640, bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, content) {
		t.Errorf("Put wrote %d bytes, %v; want %d", len(got), err, len(content))
	}
	broken := errors.New("source broke")
	err := c.Put(testContext(t), name, 0o640, io.MultiReader(strings.NewReader("half"), &failing{broken}))
	if !errors.Is(err, broken) {
		t.Errorf("Put of a broken source = %v; want %v", err, broken)
	}
	if err := c.Put(testContext(t), filepath.Join(dir, "no/such/f"), 0o600, strings.NewReader("x")); err == nil {
		t.Error("Put into a missing folder succeeded")
	}
	if got, _ := os.ReadFile(name); !bytes.Equal(got, content) {
		t.Error("a failed Put changed the file")
	}
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

// A reboot of the guest ends what runs, and the client finds the guest again.
func TestClientSurvivesGuestReboot(t *testing.T) {
	host, guestEnd := net.Pipe()
	dir, err := os.MkdirTemp("", "labport")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	// A stand-in for QEMU: the socket stays, the guest behind it changes.
	l, err := net.Listen("unix", filepath.Join(dir, "p"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go io.Copy(conn, host)
		io.Copy(host, conn)
	}()
	boot := func(ctx context.Context) { go ServeMachine(ctx, noClose{guestEnd}, Local{}, nil) }
	ctx1, reboot := context.WithCancel(t.Context())
	boot(ctx1)
	c := Dial(filepath.Join(dir, "p"), nil)
	defer c.Close()
	if err := c.Ready(testContext(t)); err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	r, w := io.Pipe()
	go func() {
		_, err := c.Run(testContext(t), Cmd{Argv: []string{"sh", "-c", "echo up; sleep 100"}, Stdout: w})
		result <- err
	}()
	io.ReadFull(r, make([]byte, 3))
	reboot()
	guestEnd.SetReadDeadline(time.Now()) // ends the old reader
	time.Sleep(50 * time.Millisecond)
	guestEnd.SetReadDeadline(time.Time{})
	guestEnd.Write([]byte(`{"op":"out","id":1,"da`)) // a line cut by the power
	boot(t.Context())
	if err := <-result; !errors.Is(err, ErrRestarted) && (err == nil || !strings.Contains(err.Error(), "context canceled")) {
		t.Errorf("Run across a reboot = %v; want %v", err, ErrRestarted)
	}
	exit, err := c.Run(testContext(t), Cmd{Argv: []string{"true"}})
	if errors.Is(err, ErrRestarted) { // sent before the news of the reboot came
		exit, err = c.Run(testContext(t), Cmd{Argv: []string{"true"}})
	}
	if err != nil || exit.Status != 0 {
		t.Errorf("Run after the reboot = %v, %v; want status 0", exit, err)
	}
}

type noClose struct{ net.Conn }

func (noClose) Close() error { return nil }

// The lab process holds the port; `mosimg lab exec` goes through its relay.
func TestRelay(t *testing.T) {
	_, direct := startGuest(t, Local{})
	_, c := startGuest(t, direct)
	var out bytes.Buffer
	exit, err := c.Run(testContext(t), Cmd{Argv: []string{"sh", "-c", "cat; exit 3"}, Stdin: strings.NewReader("through"), Stdout: &out})
	if err != nil || exit.Status != 3 || out.String() != "through" {
		t.Errorf("Run through a relay = %v, %v, %q; want status 3, through", exit, err, &out)
	}
}

func TestReadyTellsWhenNobodyAnswers(t *testing.T) {
	c := Dial(filepath.Join(t.TempDir(), "nobody"), nil)
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := c.Ready(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Ready = %v; want a deadline", err)
	}
}

func FuzzReadLines(f *testing.F) {
	f.Add([]byte("\n{\"op\":\"hello\",\"session\":\"x\"}\n{\"op\""))
	f.Add([]byte("{\"op\":\"run\",\"id\":-1,\"argv\":[\"x\"]}\n\n"))
	f.Add(bytes.Repeat([]byte("a"), maxLine+2))
	f.Fuzz(func(t *testing.T, data []byte) {
		n := 0
		if err := readLines(bytes.NewReader(data), func(m message) { n++ }); err != nil {
			t.Fatal(err)
		}
		if lines := bytes.Count(data, []byte("\n")); n > lines {
			t.Errorf("%d messages in %d lines", n, lines)
		}
	})
}

// A long line must not be taken for a message, nor swallow the next one.
func TestLongLineIsDropped(t *testing.T) {
	long := `{"op":"run","user":"` + strings.Repeat("x", maxLine) + `"}` + "\n" + `{"op":"ready"}` + "\n"
	var got []string
	if err := readLines(strings.NewReader(long), func(m message) { got = append(got, m.Op) }); err != nil || len(got) != 1 || got[0] != opReady {
		t.Errorf("readLines = %v, %v; want [ready]", got, err)
	}
}
