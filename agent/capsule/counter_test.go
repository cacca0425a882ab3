package capsule_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/capsuletest"
	"mosimg/agent/capsule/control"
	"mosimg/internal/fault"
)

// counter is a job with all that a move has to carry: threads, a pipe with
// data in it, an open file with an offset, stdin, and a daemonised child. It counts
// until its stdin ends.
func counter(args []string) int {
	dir := args[0]
	file, err := os.Create(filepath.Join(dir, "count"))
	if err != nil {
		return 11
	}
	if err := exec.Command("/proc/self/exe", "test-program", "daemonise", dir).Run(); err != nil {
		return 12
	}
	r, w, err := os.Pipe()
	if err != nil {
		return 13
	}
	var stop sync.WaitGroup
	ended := make(chan struct{})
	for range 4 { // threads that work
		stop.Go(func() {
			runtime.LockOSThread()
			for x := uint64(1); ; x = x*6364136223846793005 + 1442695040888963407 {
				select {
				case <-ended:
					return
				default:
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	stop.Go(func() {
		defer w.Close()
		for i := 0; ; i++ {
			select {
			case <-ended:
				return
			case <-time.After(time.Millisecond):
			}
			fmt.Fprintln(w, i)
		}
	})
	var mu sync.Mutex
	stop.Go(func() {
		sc := bufio.NewScanner(r)
		for sc.Scan() {
			mu.Lock()
			fmt.Println("n", sc.Text())
			mu.Unlock()
			fmt.Fprintln(file, sc.Text())
		}
	})
	sc := bufio.NewScanner(os.Stdin)
	for sc.Scan() {
		mu.Lock()
		fmt.Println("line", sc.Text())
		mu.Unlock()
	}
	close(ended)
	stop.Wait()
	os.WriteFile(filepath.Join(dir, "stop"), nil, 0o644)
	return 42
}

// daemonise starts a daemon and ends, so that the daemon loses its parent.
func daemonise(args []string) int {
	cmd := exec.Command("/proc/self/exe", "test-program", "daemon", args[0])
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 1
	}
	return 0
}

func daemon(args []string) int {
	file, err := os.Create(filepath.Join(args[0], "daemon"))
	if err != nil {
		return 1
	}
	for i := 0; ; i++ {
		fmt.Fprintln(file, i)
		if _, err := os.Stat(filepath.Join(args[0], "stop")); err == nil {
			return 0
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// exact checks that lines are 0, 1, 2 ... to their end.
func exact(lines []string) error {
	for i, l := range lines {
		if l != strconv.Itoa(i) {
			return fmt.Errorf("line %d is %q", i, l)
		}
	}
	if len(lines) == 0 {
		return fmt.Errorf("no lines")
	}
	return nil
}

// A program does not notice that it is dumped, killed and restored elsewhere
// ten times: every number exactly once, in order, in its output and in its
// files, and every line of input seen once.
func TestTenMoves(t *testing.T) {
	w := capsuletest.New(t)
	w.CRIU = capsuletest.CRIU(t)
	ctx := t.Context()
	views := []control.Root{w.Home(), w.View(), w.View()}
	c := w.Capsule(views[0])
	if _, err := c.Run(ctx, w.Program("counter", w.Work)); err != nil {
		t.Fatal(err)
	}
	var output []byte
	var wrote []byte
	const moves = 10
	for i := range moves {
		k := w.Collect(c, control.Stdout, uint64(len(output)))
		in, err := c.Input(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if int(in.Offset) > len(wrote) {
			t.Fatalf("move %d: the shim has %d bytes of stdin; %d were written", i, in.Offset, len(wrote))
		}
		wrote = append(wrote, fmt.Sprintf("%d\n", i)...)
		if _, err := in.Write(wrote[in.Offset:]); err != nil {
			t.Fatal(err)
		}
		for got := in.Offset; got < uint64(len(wrote)); {
			if got, err = in.Acknowledged(); err != nil {
				t.Fatal(err)
			}
		}
		in.Close()
		time.Sleep(30 * time.Millisecond) // the job gets some way; nothing waits for it

		images := w.Images()
		began := time.Now()
		if err := c.Dump(ctx, images, nil); err != nil {
			log, _ := os.ReadFile(filepath.Join(images.Name(), "dump.log"))
			t.Fatalf("move %d: %v\n%s", i, err, log)
		}
		dumped := time.Now()
		// It would not be in the images.
		if err := c.Signal(ctx, unix.SIGUSR1, false); fault.KindOf(err) != fault.Refused {
			t.Errorf("a signal to a job that is being moved: %v; want it refused, to be sent again", err)
		}
		output = append(output, k.Stop()...)
		to := w.Capsule(views[(i+1)%len(views)])
		made := time.Now()
		if err := to.Restore(ctx, images, w.Program("x").Owner()); err != nil {
			log, _ := os.ReadFile(filepath.Join(images.Name(), "restore.log"))
			t.Fatalf("move %d: %v\n%s", i, err, log)
		}
		if err := c.Finish(ctx, true); err != nil {
			t.Fatal(err)
		}
		if err := to.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		t.Logf("move %d: dump %v, capsule %v, restore and commit %v", i, dumped.Sub(began).Round(time.Millisecond), made.Sub(dumped).Round(time.Millisecond), time.Since(made).Round(time.Millisecond))
		w.Remove(c)
		c = to
	}
	k := w.Collect(c, control.Stdout, uint64(len(output)))
	in, err := c.Input(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := in.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	st, err := c.Wait(ctx)
	if err != nil || st.State != control.Ended || st.Exit != 42 {
		t.Errorf("the job ended as %+v, %v; want exit 42", st, err)
	}
	rest, err := k.Wait()
	if !errors.Is(err, io.EOF) {
		t.Errorf("stdout ended with %v", err)
	}
	output = append(output, rest...)

	var numbers, lines []string
	for l := range strings.Lines(string(output)) {
		kind, n, _ := strings.Cut(strings.TrimSpace(l), " ")
		switch kind {
		case "n":
			numbers = append(numbers, n)
		case "line":
			lines = append(lines, n)
		default:
			t.Errorf("output has %q", l)
		}
	}
	if err := exact(numbers); err != nil {
		t.Errorf("stdout: %v", err)
	}
	if err := exact(lines); err != nil || len(lines) != moves {
		t.Errorf("stdin: %v, %d lines; want %d", err, len(lines), moves)
	}
	for _, name := range []string{"count", "daemon"} {
		data, err := os.ReadFile(filepath.Join(w.Work, name))
		if err != nil {
			t.Fatal(err)
		}
		got := strings.Fields(string(data))
		if err := exact(got); err != nil {
			t.Errorf("file %s: %v", name, err)
		}
		if name == "count" && !slices.Equal(got, numbers) {
			t.Errorf("file has %d numbers, stdout %d", len(got), len(numbers))
		}
		t.Logf("%s: %d numbers", name, len(got))
	}
}
