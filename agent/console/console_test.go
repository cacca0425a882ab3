package console

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
)

func TestBlock(t *testing.T) {
	s := api.AgentStatus{
		State: api.StatePending, Address: "10.77.0.9", MAC: "52:54:00:00:00:01", Fingerprint: "aaaa-bbbb-cccc-dddd",
		Head: "https://10.77.0.1:4660", CRIU: api.CRIUStatus{Reason: "no CRIU"},
	}
	got := Block(s)
	for _, want := range []string{"pending", "10.77.0.9 52:54:00:00:00:01", "mosimg node approve aaaa-bbbb-cccc-dddd", "only jobs placed at start: no CRIU"} {
		if !strings.Contains(got, want) {
			t.Errorf("block lacks %q:\n%s", want, got)
		}
	}
	s.State, s.Node, s.Name = api.StateMember, 3, "node3"
	if got := Block(s); !strings.Contains(got, "node 3, node3: member") || strings.Contains(got, "approve") {
		t.Errorf("block of a member:\n%s", got)
	}
}

// text collects what is shown.
type text struct {
	mu sync.Mutex
	n  int
}

func (x *text) Write(p []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.n++
	return len(p), nil
}

func (x *text) count() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.n
}

// The block appears when something changed and on Enter, and a stuck Enter
// key does not fill the screen.
func TestShow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		changed, enter := make(chan struct{}, 1), make(chan struct{}, 1)
		var out text
		var mu sync.Mutex
		st := api.AgentStatus{State: api.StateStarting}
		set := func(s api.AgentState) {
			mu.Lock()
			st.State = s
			mu.Unlock()
			select {
			case changed <- struct{}{}:
			default:
			}
		}
		src := Source{
			Status:  func() api.AgentStatus { mu.Lock(); defer mu.Unlock(); return st },
			Members: func() api.MemberTable { return api.MemberTable{} },
		}
		go Show(ctx, &out, src, changed, enter)
		set(api.StateNoHead)
		set(api.StatePending)
		time.Sleep(time.Second)
		if out.count() != 1 {
			t.Errorf("two changes at once: %d blocks; want 1", out.count())
		}
		set(api.StatePending)
		time.Sleep(time.Second)
		if out.count() != 1 {
			t.Errorf("no change: %d blocks; want 1", out.count())
		}
		for range 50 {
			enter <- struct{}{}
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(time.Second)
		if n := out.count(); n != 2 {
			t.Errorf("Enter held down: %d blocks; want 2", n)
		}
		cancel()
		synctest.Wait()
	})
}

// A serial line that nobody reads must not hold up process 1.
func TestSlowConsoleDoesNotBlock(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	c := new(Consoles)
	c.add("pipe", w)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 1000 {
			c.Write([]byte(strings.Repeat("x", 1000) + "\n"))
		}
		c.Flush(50 * time.Millisecond)
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("the writer is blocked")
	}
	// Now somebody reads: what is there, and how much is not.
	c.Close()
	var b strings.Builder
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		b.Write(buf[:n])
		if err != nil {
			break
		}
	}
	if !strings.Contains(b.String(), "lost: this console is slow") {
		t.Error("the loss is not told")
	}
	if b.Len() > 200<<10 {
		t.Errorf("%d bytes were kept; want a bounded queue", b.Len())
	}
}

// A user ends the shell on a console: the kernel hangs the terminal up, and
// messages must still appear there.
func TestConsoleSurvivesHangup(t *testing.T) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip("no pseudo terminals: ", err)
	}
	far := os.NewFile(uintptr(fd), "ptmx")
	defer far.Close()
	unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	c := Open([]string{fmt.Sprintf("/dev/pts/%d", n)})
	defer c.Close()
	c.Write([]byte("before\n"))
	awaitText(t, far, "before")
	// What a hangup leaves behind: a file that only fails.
	old := c.outs[0].f
	dead, err := os.Open(os.DevNull) // not open for writing
	if err != nil {
		t.Fatal(err)
	}
	c.Flush(time.Second)
	c.outs[0].f = dead
	defer old.Close()
	c.Write([]byte("after\n"))
	awaitText(t, far, "after")
}

func awaitText(t *testing.T, f *os.File, want string) {
	t.Helper()
	var seen strings.Builder
	buf := make([]byte, 1024)
	f.SetReadDeadline(time.Now().Add(10 * time.Second))
	for !strings.Contains(seen.String(), want) {
		n, err := f.Read(buf)
		if err != nil {
			t.Fatalf("%v after %q; want %q", err, seen.String(), want)
		}
		seen.Write(buf[:n])
	}
}
