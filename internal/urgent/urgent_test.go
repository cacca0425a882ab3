package urgent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

const childEnv = "MOSIMG_TEST_URGENT"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		os.Exit(m.Run())
	}
	// Several threads, as an agent has.
	var started, done sync.WaitGroup
	end := make(chan struct{})
	for range 4 {
		started.Add(1)
		done.Go(func() {
			runtime.LockOSThread()
			started.Done()
			<-end
		})
	}
	started.Wait()
	// What may not be is said, and nothing else is left out for it: some containers'
	// root may not lower oom_score_adj.
	if err := Raise(); errors.Is(err, fs.ErrPermission) && strings.HasPrefix(err.Error(), "set oom_score_adj") {
		fmt.Println("memory -900 was refused")
	} else if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, t := range tasks {
		tid, _ := ownTID(t.Name())
		n, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
		fmt.Println("task", 20-n, err)
	}
	if out, err := exec.Command("nice").Output(); err == nil {
		fmt.Print("child ", string(out))
	}
	b, _ := os.ReadFile("/proc/self/autogroup")
	fmt.Println("session", string(b))
	if b, _ = os.ReadFile("/proc/self/oom_score_adj"); string(b) != "0\n" {
		fmt.Println("memory", string(b))
	}
	close(end)
	done.Wait()
	os.Exit(0)
}

func TestRaise(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to raise a priority")
	}
	for name, flags := range map[string]uintptr{"agent": 0, "shim": syscall.CLONE_NEWPID} {
		t.Run(name, func(t *testing.T) { raise(t, flags) })
	}
}

func raise(t *testing.T, flags uintptr) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: flags} // an autogroup of its own
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	tasks := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		switch {
		case len(f) > 1 && f[0] == "task":
			tasks++
			if f[1] != "-10" {
				t.Errorf("a thread has niceness %s", f[1])
			}
		case len(f) > 1 && f[0] == "child" && f[1] != "-10":
			t.Errorf("a child has niceness %s", f[1])
		case len(f) > 1 && f[0] == "session" && !strings.HasSuffix(strings.TrimSpace(line), "nice -10"):
			t.Errorf("the session: %s", line)
		case len(f) > 1 && f[0] == "memory" && f[1] != "-900":
			t.Errorf("oom_score_adj is %s", f[1])
		}
	}
	if tasks < 5 {
		t.Errorf("it had %d threads; want more, or nothing is tested", tasks)
	}
}
