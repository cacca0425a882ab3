package gobuild

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/internal/fault"
)

// checkout makes a module that looks like mosimg.
func checkout(t *testing.T, files map[string]string) string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("there is no go command here")
	}
	dir := t.TempDir()
	all := map[string]string{
		"go.mod":                  "module mosimg\n\ngo 1.25\n",
		"cmd/mosagent/main.go":    "package main\n\nimport (\n\t_ \"embed\"\n\n\t\"mosimg/lib\"\n)\n\n//go:embed data.txt\nvar data string\n\nfunc main() { println(lib.Name, data) }\n",
		"cmd/mosagent/data.txt":   "data",
		"cmd/mosagent/x_test.go":  "package main\n",
		"lib/lib.go":              "package lib\n\nvar Name = \"lib\"\n",
		"other/other.go":          "package other\n",
		"initramfs/uroot/go.mod":  "module mosimg/initramfs/uroot\n\ngo 1.25\n",
		"initramfs/uroot/main.go": "package main\n\nfunc main() {}\n",
	}
	maps.Copy(all, files)
	for name, text := range all {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func find(t *testing.T, dir string) *Toolchain {
	t.Helper()
	tc, err := Find(t.Context(), dir, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	return tc
}

func TestFind(t *testing.T) {
	dir := checkout(t, nil)
	tc := find(t, filepath.Join(dir, "cmd", "mosagent")) // anywhere inside will do
	if tc.Dir != dir || !strings.HasPrefix(tc.Version, "go1.") {
		t.Errorf("Find = %+v; want the checkout %s", tc, dir)
	}
	other := checkout(t, map[string]string{"go.mod": "module example.com/other\n\ngo 1.25\n"})
	t.Chdir(other)
	for _, tcase := range []struct{ source, want string }{
		{other, "is not a checkout of mosimg"},
		{t.TempDir(), "is not a checkout of mosimg"},
		{"", "the current folder is not inside a checkout"},
		{"/nonexistent", "no such folder"},
		{filepath.Join(other, "go.mod"), "no such folder"},
	} {
		if _, err := Find(t.Context(), tcase.source, "amd64"); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), tcase.want) {
			t.Errorf("Find(%q) = %v; want %q", tcase.source, err, tcase.want)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := Find(t.Context(), dir, "amd64"); fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "install Go") {
		t.Errorf("Find without go = %v", err)
	}
}

func TestSourcesAreJustWhatTheProgramIsMadeFrom(t *testing.T) {
	tc := find(t, checkout(t, nil))
	in, err := tc.Sources(t.Context(), "./cmd/mosagent")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"cmd/mosagent/data.txt", "cmd/mosagent/main.go", "go", "go.mod", "lib/lib.go"}
	if got := slices.Sorted(maps.Keys(in)); !slices.Equal(got, want) {
		t.Errorf("Sources = %q; want %q", got, want)
	}
	if _, err := tc.Sources(t.Context(), "./cmd/none"); err == nil {
		t.Error("Sources of a program that does not exist")
	}
}

// The node's program must run on any machine of its architecture, with no
// library, and be the same wherever and whoever built it.
func TestProgram(t *testing.T) {
	t.Setenv("GOFLAGS", "-tags=odd")
	t.Setenv("GOAMD64", "v3")
	t.Setenv("CGO_ENABLED", "1")
	var builds [][]byte
	for range 2 {
		tc := find(t, checkout(t, nil))
		out := filepath.Join(t.TempDir(), "agent")
		if err := tc.Program(t.Context(), "./cmd/mosagent", "1.2", out, t.TempDir()); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		builds = append(builds, data)
		if libs, err := mustELF(t, data).ImportedLibraries(); err != nil || len(libs) != 0 {
			t.Errorf("the program needs %v, %v; want a static one", libs, err)
		}
		info, err := exec.Command("go", "version", "-m", out).CombinedOutput()
		if err != nil || !strings.Contains(string(info), "GOAMD64=v1") {
			t.Errorf("go version -m: %s, %v; want GOAMD64=v1", info, err)
		}
		if mods, err := Modules(out); err != nil || len(mods) != 0 {
			t.Errorf("Modules = %v, %v", mods, err)
		}
	}
	if !bytes.Equal(builds[0], builds[1]) {
		t.Error("two checkouts give two programs")
	}
}

func mustELF(t *testing.T, data []byte) *elf.File {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestCompilerFaultIsShown(t *testing.T) {
	tc := find(t, checkout(t, map[string]string{"lib/lib.go": "package lib\n\nvar Name = nothing\n"}))
	err := tc.Program(t.Context(), "./cmd/mosagent", "dev", filepath.Join(t.TempDir(), "x"), t.TempDir())
	if fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "undefined: nothing") {
		t.Errorf("Program = %v; want the compiler's words", err)
	}
}

func TestFullDiskIsRecognised(t *testing.T) {
	err := error(&commandError{cmd: "go build", output: "link: write /tmp/x: no space left on device", err: errors.New("exit status 1")})
	if !errors.Is(buildFault("x", err), syscall.ENOSPC) {
		t.Error("a full disk in the linker's output is not recognised")
	}
}

// The builder of the utilities takes no context. Ctrl-C must end it all the
// same, with the processes that it started.
func TestCancelEndsTheWholeProcessGroup(t *testing.T) {
	dir := checkout(t, map[string]string{"initramfs/uroot/main.go": `package main

import (
	"os"
	"os/exec"
	"strconv"
	"time"
)

func main() {
	c := exec.Command("sleep", "600")
	if err := c.Start(); err != nil {
		panic(err)
	}
	if err := os.WriteFile(os.Args[2]+".tmp", []byte(strconv.Itoa(c.Process.Pid)), 0o644); err != nil {
		panic(err)
	}
	os.Rename(os.Args[2]+".tmp", os.Args[2])
	time.Sleep(time.Hour)
}
`})
	tc := find(t, dir)
	out := filepath.Join(t.TempDir(), "pid") // the fake takes -o for the place of its child's pid
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- tc.Utilities(ctx, []string{"ls"}, out, t.TempDir()) }()
	var pid int
	for pid == 0 {
		select {
		case err := <-ended:
			t.Fatalf("Utilities ended early: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
		if data, err := os.ReadFile(out); err == nil {
			pid, _ = strconv.Atoi(string(data))
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Utilities = %v; want context.Canceled", err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for running(pid) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d outlived the build", pid)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// running says whether pid is there and not only waiting to be reaped.
func running(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func TestUtilitySources(t *testing.T) {
	dir := checkout(t, map[string]string{"initramfs/uroot/uroot": "a built program", "initramfs/uroot/go.sum": ""})
	in, err := find(t, dir).UtilitySources()
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"go", "initramfs/uroot/go.mod", "initramfs/uroot/go.sum", "initramfs/uroot/main.go"}
	if got := slices.Sorted(maps.Keys(in)); !slices.Equal(got, want) {
		t.Errorf("UtilitySources = %q; want %q", got, want)
	}
}
