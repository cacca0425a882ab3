package native

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// janitorEnv turns this test binary into the janitor of the process that it names.
const janitorEnv = "MOSIMG_TEST_JANITOR"

// janitor cleans up after a test process that ended without doing it: killed by
// its time limit, by CI or by hand. It is a process of its own that reads folders
// to remove, one a line, and acts when the other end of the pipe is gone.
var janitor = sync.OnceValues(func() (io.Writer, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), janitorEnv+"="+strconv.Itoa(os.Getpid()))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what ends the test's group leaves it alone
	w, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	return w, cmd.Start()
})

// runJanitor is the janitor's process.
func runJanitor(ofPID string) {
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	var dirs []string
	for s := bufio.NewScanner(os.Stdin); s.Scan(); {
		dirs = append(dirs, s.Text())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	names, _ := filepath.Glob(filepath.Join("/run/netns", namespacePrefix(ofPID)+"*"))
	for _, path := range names {
		name := filepath.Base(path)
		endAll(ctx, name)
		_ = exec.CommandContext(ctx, "ip", "netns", "del", name).Run() // as far as it goes, here and below
	}
	_ = exec.CommandContext(ctx, "unshare", "--mount", "sh", "-c", "mount -t cgroup2 none /sys/fs/cgroup; "+removeGroups(groupPrefix(ofPID)+"*")).Run()
	for _, dir := range dirs {
		_ = exec.CommandContext(ctx, "rm", "-rf", "--one-file-system", dir).Run()
		_ = os.Remove(filepath.Dir(dir))
	}
}

// endAll kills all that runs in a network namespace, as a power cut does.
func endAll(ctx context.Context, namespace string) {
	for ctx.Err() == nil {
		out, err := exec.CommandContext(ctx, "ip", "netns", "pids", namespace).Output()
		pids := strings.Fields(string(out))
		if err != nil || len(pids) == 0 {
			return
		}
		for _, f := range pids {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
				_ = syscall.Kill(pid, syscall.SIGKILL) // gone already, or gone now
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// removeGroups is a shell script that ends what is in the control groups of this
// pattern and removes them, in a mount namespace that shows them.
func removeGroups(pattern string) string {
	return fmt.Sprintf(`for top in /sys/fs/cgroup/%s; do
	test -d "$top" || continue
	for g in $(find "$top" -depth -type d); do echo 1 >"$g/cgroup.kill"; done
	for try in 1 2 3 4 5; do find "$top" -depth -type d -exec rmdir {} \; 2>/dev/null; test -d "$top" || break; sleep 0.2; done
done`, pattern)
}

func namespacePrefix(pid string) string { return "mosimg" + pid + "-" }
func groupPrefix(pid string) string     { return "mosimg-test-" + pid + "-" }

// victimEnv makes TestKilledRunLeavesNothing the run that is killed.
const victimEnv = "MOSIMG_TEST_VICTIM"

// A test that a time limit kills must not leave namespaces, control groups and
// agents on the machine of whoever ran it.
func TestKilledRunLeavesNothing(t *testing.T) {
	if os.Getenv(victimEnv) != "" {
		w := newWorld(t)
		m := w.machine("a", 1)
		d := m.start("sh", "-c", "mkdir /sys/fs/cgroup/"+m.cgroup+" && echo $$ >/sys/fs/cgroup/"+m.cgroup+"/cgroup.procs && exec sleep 600")
		w.eventually(10*time.Second, "a process in its group", func() error {
			return m.command("grep", "-q", m.cgroup, fmt.Sprintf("/proc/%d/cgroup", d.cmd.Process.Pid)).Run()
		})
		fmt.Println("READY", w.dir)
		time.Sleep(time.Minute)
		return
	}
	w := newWorld(t) // skips where the victim would
	cmd := exec.Command(os.Args[0], "-test.run", "^TestKilledRunLeavesNothing$")
	cmd.Env = append(os.Environ(), victimEnv+"=1")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	dir := ""
	for s := bufio.NewScanner(out); dir == "" && s.Scan(); {
		dir, _ = strings.CutPrefix(s.Text(), "READY ")
		if dir == s.Text() {
			dir = ""
		}
	}
	cmd.Process.Kill()
	cmd.Wait()
	if dir == "" {
		t.Fatal("the run to be killed did not come up")
	}
	pid := strconv.Itoa(cmd.Process.Pid)
	h := w.machine("look", 1)
	w.eventually(30*time.Second, "nothing is left", func() error {
		if left, _ := filepath.Glob("/run/netns/" + namespacePrefix(pid) + "*"); len(left) > 0 {
			return fmt.Errorf("namespaces %v", left)
		}
		if left, _ := h.command("sh", "-c", "ls -d /sys/fs/cgroup/"+groupPrefix(pid)+"*").Output(); len(left) > 0 {
			return fmt.Errorf("control groups %s", left)
		}
		if _, err := os.Stat(filepath.Dir(dir)); err == nil {
			return fmt.Errorf("folder %s", dir)
		}
		return nil
	})
}
