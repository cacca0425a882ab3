package criu

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// bundle is a tree of unpacked Debian packages with CRIU, or the test skips.
func bundle(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("CRIU needs root")
	}
	if dir := os.Getenv("MOSIMG_CRIU"); dir != "" {
		return dir
	}
	if _, err := Find(""); err != nil {
		t.Skip("no CRIU here; MOSIMG_CRIU=DIR names an unpacked bundle")
	}
	return ""
}

func testLog(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// A node must know whether migration works before anybody relies on it.
func TestProbeTellsTheTruth(t *testing.T) {
	dir := bundle(t)
	began := time.Now()
	st := Probe(t.Context(), dir, t.TempDir(), testLog(t))
	t.Logf("%+v in %v", st, time.Since(began).Round(time.Millisecond))
	if st.Version == "" {
		t.Errorf("Probe found no version: %s", st.Reason)
	}
	if strings.HasPrefix(st.Version, "4.") && !st.Usable {
		t.Errorf("CRIU %s is unusable here: %s", st.Version, st.Reason)
	}
	if !st.Usable && st.Reason == "" {
		t.Error("unusable without a reason")
	}
}

// A CRIU that hangs must not hang the agent, and leave no process behind.
func TestHungCRIUIsGivenUp(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the probe needs root")
	}
	dir := t.TempDir()
	fake := filepath.Join(dir, "criu")
	script := "#!/bin/sh\n[ \"$1\" = --version ] && { echo Version: 9.9; exit 0; }\necho 'x (00.1) Error (criu/x.c:1): broken here' >\"$5/dump.log\"\nexec sleep 1000\n"
	if err := os.WriteFile(fake, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	err := try(t.Context(), Tool{Argv: []string{fake}}, dir, 500*time.Millisecond)
	if err == nil || !strings.Contains(err.Error(), "does not end") {
		t.Errorf("try with a hung criu = %v; want one that does not end", err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "criu-probe-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestNoCRIU(t *testing.T) {
	if _, err := Find(t.TempDir()); err == nil {
		t.Error("Find in an empty folder = no error")
	}
	if os.Geteuid() == 0 {
		if st := Probe(t.Context(), t.TempDir(), t.TempDir(), nil); st.Usable || st.Reason == "" {
			t.Errorf("Probe without criu = %+v; want a reason", st)
		}
	}
}

// The child is an ELF file of our own: if the kernel refuses it, every node
// would call its CRIU unusable.
func TestChildRuns(t *testing.T) {
	for name, write := range map[string]func(string) error{"amd64": writeChild64, "386": writeChild32} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			prog := filepath.Join(dir, "child")
			if err := write(prog); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, prog)
			cmd.Dir = dir
			err := cmd.Start()
			if errors.Is(err, unix.ENOEXEC) {
				t.Skip("this kernel runs no such programs")
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, goFile), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(filepath.Join(dir, doneFile)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestFirstError(t *testing.T) {
	log := `(00.000000) Version: 4.1.1 (gitid 0)
(00.003901) Warn  (criu/kerndat.c:1): x
(00.003905) Error (criu/rlimit.c:1): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.003910) Error (criu/vdso.c:1): Unexpected rt vDSO area bounds
(00.003917) Error (criu/cr-dump.c:2): Dumping FAILED.
`
	if got, want := firstError(log), "Unexpected rt vDSO area bounds"; got != want {
		t.Errorf("firstError = %q; want %q", got, want)
	}
}
