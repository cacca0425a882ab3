package runbench

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mosimg/agent/capsule/shim"
	"mosimg/internal/fault"
)

// TestMain makes this binary also the shims of capsules, and what computes in them.
func TestMain(m *testing.M) {
	if status, ours := shim.Dispatch(os.Args); ours {
		os.Exit(status)
	}
	if len(os.Args) == 4 && os.Args[1] == Verb {
		if err := Work(os.Args[2], os.Args[3]); err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// What is measured under mosrun must be a job, must have done its work, and must
// leave nothing behind.
func TestJobsAreMeasured(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to make capsules")
	}
	if testing.Short() {
		t.Skip("builds mosagent: not with -short")
	}
	agent := filepath.Join(t.TempDir(), "mosagent")
	if out, err := exec.Command("go", "build", "-o", agent, "mosimg/cmd/mosagent").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	b, err := New(t.Context(), agent)
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			b.Close()
		}
	}()
	const where = "cat /proc/self/cgroup"
	_, inJob, err := b.Job(t.Context(), "/bin/sh", "-c", where)
	if err != nil {
		t.Fatal(err)
	}
	_, outside, err := b.Plain(t.Context(), "/bin/sh", "-c", where)
	if err != nil {
		t.Fatal(err)
	}
	if name := filepath.Base(b.group); !strings.Contains(inJob, name) || strings.Contains(outside, name) {
		t.Errorf("groups: %q under mosrun, %q without; want only the first in %s", inJob, outside, name)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for kind := range kinds {
		_, out, err := b.Job(t.Context(), exe, Verb, kind, "2")
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := ParseWork(out); err != nil {
			t.Error(err)
		}
	}
	if _, _, err := b.Job(t.Context(), "/bin/sh", "-c", "echo no luck >&2; exit 3"); fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "no luck") {
		t.Errorf("Job of a program that fails = %v; want what it said", err)
	}
	closed = true
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	for _, p := range []string{b.dir, b.group} {
		if _, err := os.Lstat(p); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", p, err)
		}
	}
}

func TestNoAgentProgram(t *testing.T) {
	for _, path := range []string{"/no/such/mosagent", "/etc/passwd", t.TempDir()} {
		if got, err := findAgent(path); fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "--mosagent") {
			t.Errorf("findAgent(%s) = %s, %v; want a fault that names --mosagent", path, got, err)
		}
	}
}

// A program that says something else must not become a figure.
func TestParseWork(t *testing.T) {
	if cpu, wall, err := ParseWork("1.500000 2.250000\n"); cpu != 1.5 || wall != 2.25 || err != nil {
		t.Errorf("ParseWork = %v, %v, %v; want 1.5, 2.25", cpu, wall, err)
	}
	for _, text := range []string{"", "1.5\n", "0 1\n", "1 -1\n", "a b\n"} {
		if _, _, err := ParseWork(text); err == nil {
			t.Errorf("ParseWork(%q) gives no error", text)
		}
	}
}
