package mounts_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/agent/capsule/control"
	"mosimg/agent/homefiles/mounts"
	"mosimg/agent/migrate"
	"mosimg/internal/fault"
)

// appends is a program that appends lines as fast as it can and reads them again.
const appends = `
echo going
i=0
while [ ! -e stop ]; do i=$((i+1)); echo $i >>log; test "$(tail -n 1 log)" = $i; done
echo done $i`

// An agent that is killed and started again is nothing to a program: its files go on
// where they were, each write is done once, and the next agent knows the mounts.
func TestAgentIsKilled(t *testing.T) {
	w := newWorld(t, options{})
	far := w.guest()
	p := shell(t, far, appends)
	p.says("going")
	for range 3 {
		time.Sleep(200 * time.Millisecond) // amid its writes, wherever that is
		w.killAgent()
		time.Sleep(300 * time.Millisecond)
		w.startAgent(options{})
	}
	next, err := mounts.New(mounts.Config{Dir: w.path("files"), Self: thisNode, Socket: w.path("agent.sock")})
	must(t, err)
	before := w.forwarder(2)
	again, err := next.Open(ctx(t), homeNode, job, 2)
	must(t, err)
	if w.forwarder(2) != before || filepath.Join(again.Dir, w.tree) != far {
		t.Errorf("the next agent opens %q by another process; want what is there", again.Dir)
	}
	must(t, next.Lost(homeNode, job, 2))
	must(t, os.WriteFile(filepath.Join(w.tree, "stop"), nil, 0o644))
	var last int
	select {
	case line := <-p.out:
		if _, err := fmt.Sscanf(line, "done %d", &last); err != nil {
			t.Fatalf("the program says %q: %v", line, err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the program does not go on")
	}
	var want strings.Builder
	for i := range last {
		fmt.Fprintln(&want, i+1)
	}
	w.content("log", want.String())
	must(t, next.Sync(ctx(t), homeNode, job, 2))
	must(t, next.Close(ctx(t), homeNode, job, 2))
}

// While there is no agent a program waits, also one that begins; the mount is not lost.
func TestNoAgentForAWhile(t *testing.T) {
	w := newWorld(t, options{})
	far := w.guest()
	w.killAgent()
	p := shell(t, far, "echo late >late; echo written")
	p.silent()
	if err := w.roots.Lost(homeNode, job, 2); err != nil {
		t.Errorf("Lost in a cut: %v", err)
	}
	short, cancel := context.WithTimeout(ctx(t), 300*time.Millisecond)
	defer cancel()
	isKind(t, "Sync in a cut", w.roots.Sync(short, homeNode, job, 2), fault.Unavailable, "the home")
	w.startAgent(options{})
	p.says("written")
	w.content("late", "late\n")
}

// left is what there is of a mount: its folder, its mount, its process.
func (w *world) left(epoch uint64, pid int) (all []string) {
	dir := w.path(fmt.Sprintf("files/%s.%d", job, epoch))
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		all = append(all, dir)
	}
	all = append(all, fuseMounts(w.t, dir)...)
	if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && len(data) > 0 {
		all = append(all, fmt.Sprintf("process %d", pid))
	}
	return all
}

// Close leaves nothing of a mount, whatever has become of its process and however
// often it is asked; programs that are left in it get an answer.
func TestCloseLeavesNothing(t *testing.T) {
	kill := func(sig syscall.Signal) func(*world, int) {
		return func(w *world, pid int) {
			must(w.t, syscall.Kill(pid, sig))
			if sig == syscall.SIGKILL {
				for until := time.Now().Add(5 * time.Second); w.roots.Lost(homeNode, job, 2) == nil; {
					if time.Now().After(until) {
						w.t.Fatal("that the process of a mount is gone is not seen")
					}
					time.Sleep(10 * time.Millisecond)
				}
				isKind(w.t, "Lost", w.roots.Lost(homeNode, job, 2), fault.Unavailable, "gone")
			}
		}
	}
	for name, harm := range map[string]func(*world, int){
		"well":    func(*world, int) {},
		"killed":  kill(syscall.SIGKILL),
		"stopped": kill(syscall.SIGSTOP),
		"without an agent": func(w *world, _ int) {
			w.killAgent()
		},
		"while a program waits": func(w *world, _ int) {
			w.killAgent()
			p := shell(w.t, "/", "cat "+w.path("files/job-1.2/root")+w.tree+"/none 2>&1 || echo ended")
			p.silent()
		},
		"unmounted by hand": func(w *world, _ int) {
			must(w.t, syscall.Unmount(w.path("files/job-1.2/root"), syscall.MNT_DETACH))
		},
		"half begun": func(w *world, pid int) {
			must(w.t, os.WriteFile(w.path("files/job-1.2/process.json.new"), []byte("{"), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, options{})
			w.guest()
			pid := w.forwarder(2)
			harm(w, pid)
			for range 2 {
				must(t, w.roots.Close(ctx(t), homeNode, job, 2))
				if left := w.left(2, pid); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			}
		})
	}
}

// A mount that the home refuses is told so in its words, and leaves nothing.
func TestOpenFails(t *testing.T) {
	w := newWorld(t, options{})
	w.admit(2)
	_, err := w.roots.Open(ctx(t), homeNode, job, 3)
	isKind(t, "Open of an epoch that nobody has prepared", err, fault.Unavailable, "no such capsule for this node")
	_, err = w.roots.Open(ctx(t), homeNode, "../job", 2)
	isKind(t, "Open of a job that is a path", err, fault.Usage, "no name of a file")
	w.killAgent()
	short, cancel := context.WithTimeout(ctx(t), 500*time.Millisecond)
	defer cancel()
	_, err = w.roots.Open(short, homeNode, job, 2)
	isKind(t, "Open without an agent", err, fault.Unavailable, "the home does not answer")
	if left, _ := os.ReadDir(w.path("files")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// At home a job sees the machine's own files, and there is nothing to do about them.
func TestAtHome(t *testing.T) {
	r, err := mounts.New(mounts.Config{Dir: t.TempDir(), Self: homeNode})
	must(t, err)
	root, err := r.Open(ctx(t), homeNode, job, 1)
	must(t, err)
	if (root != control.Root{Dir: "/"}) {
		t.Errorf("Open at home: %+v", root)
	}
	for _, err := range []error{r.Sync(ctx(t), homeNode, job, 1), r.Lost(homeNode, job, 1), r.Close(ctx(t), homeNode, job, 1)} {
		must(t, err)
	}
}

// A home that is silent for longer than the lease has given the job up: so do we, and
// say why, also when the process is long gone.
func TestLeaseEnds(t *testing.T) {
	w := newWorld(t, options{lease: time.Second})
	w.guest()
	pid := w.forwarder(2)
	w.killAgent()
	for until := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/fd/0", pid)); err != nil {
			break
		}
		if time.Now().After(until) {
			t.Fatal("the mount outlives its lease")
		}
	}
	isKind(t, "Lost after the lease", w.roots.Lost(homeNode, job, 2), fault.Unavailable, "no link for")
	isKind(t, "Sync after the lease", w.roots.Sync(ctx(t), homeNode, job, 2), fault.Unavailable, "no link for")
	must(t, w.roots.Close(ctx(t), homeNode, job, 2))
}

// A keeper that is killed has lost its guests' open files. They are told at once, and
// the next job is served.
func TestKeeperIsKilled(t *testing.T) {
	w := newWorld(t, options{})
	far := w.guest()
	p := shell(t, far, "exec 3>open; echo ready; read x; echo more >&3 2>/dev/null || echo failed")
	p.says("ready")
	keeper := w.keeper()
	must(t, syscall.Kill(keeper, syscall.SIGKILL))
	p.tell("go on")
	p.says("failed")
	isKind(t, "Lost", w.roots.Lost(homeNode, job, 2), fault.Unavailable, "no such capsule")
	must(t, w.files.Settle(ctx(t), job)) // of what the new one does not know
	const other = migrate.JobID("job-2")
	must(t, w.files.Prepare(ctx(t), other, at(homeNode, 1), at(thisNode, 2)))
	root, err := w.roots.Open(ctx(t), homeNode, other, 2)
	must(t, err)
	shell(t, filepath.Join(root.Dir, w.tree), "echo other >other; echo written").says("written")
	w.content("other", "other\n")
	must(t, w.files.Remove(ctx(t), other))
}

// keeper is the process that listens on the keeper's socket.
func (w *world) keeper() int {
	w.t.Helper()
	dirs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, d := range dirs {
		data, _ := os.ReadFile(d) // it may have ended
		if args := strings.Split(string(data), "\x00"); len(args) > 2 && args[1] == "homefiles-keeper" && args[2] == w.path("keeper.sock") {
			var pid int
			fmt.Sscanf(d, "/proc/%d/", &pid)
			return pid
		}
	}
	w.t.Fatal("there is no keeper")
	return 0
}

// A user of the home must not get at other users' files by the keeper, nor one of the
// node by the way to it.
func TestUsersCannotConnect(t *testing.T) {
	w := newWorld(t, options{})
	w.guest()
	must(t, os.Chmod(w.path("files/job-1.2"), 0o755))
	for _, sock := range []string{"keeper.sock", "agent.sock", "files/job-1.2/control"} {
		cmd := helper(alice, "connect", w.path(sock))
		out, _ := cmd.Output()
		if !strings.Contains(string(out), "permission denied") {
			t.Errorf("a user connects to %s: %s", sock, out)
		}
	}
}

func init() {
	helpers["connect"] = func(args []string) error {
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
		if err == nil {
			err = syscall.Connect(fd, &syscall.SockaddrUnix{Name: args[0]})
		}
		fmt.Println(err)
		return nil
	}
}

// What an earlier agent of another version has left as a record must not hang or crash
// the next.
func TestBrokenRecord(t *testing.T) {
	w := newWorld(t, options{})
	w.guest()
	pid := w.forwarder(2)
	record := w.path("files/job-1.2/process.json")
	for _, broken := range []string{"", "{", "[1]", `{"PID":-1,"Start":5}`} {
		must(t, os.WriteFile(record, []byte(broken), 0o600))
		_ = w.roots.Lost(homeNode, job, 2)
	}
	data, err := json.Marshal(struct{ PID int }{pid})
	must(t, err)
	must(t, os.WriteFile(record, data, 0o600)) // another process of that number, by its start
	must(t, w.roots.Close(ctx(t), homeNode, job, 2))
	for range 500 { // unmounted, it ends by itself
		if len(w.left(2, pid)) == 0 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("left: %v", w.left(2, pid))
}
