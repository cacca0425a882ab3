// Package gobuild builds the Go programs of an image from a checkout of
// mosimg: static, for the oldest processor of their architecture, and
// reproducible, whatever the builder's own Go settings are. It also says from
// which sources a program is made, so that it is built only when one of them
// changed.
package gobuild

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"

	"mosimg/internal/fault"
)

// Source is this package's code: results in the build cache depend on it.
//
//go:embed *.go
var Source embed.FS

// Toolchain builds programs from one checkout.
type Toolchain struct {
	Dir     string // root of the checkout
	Version string // "go1.26.8"
	Arch    string // GOARCH of the programs
}

// module is the name in go.mod by which a checkout of mosimg is known.
const module = "mosimg"

// Find looks for a Go command and a checkout: at source, or around the
// current folder when source is "".
func Find(ctx context.Context, source, arch string) (*Toolchain, error) {
	if _, err := exec.LookPath("go"); err != nil {
		return nil, fault.New(fault.Environment, "find", "the Go toolchain", "there is no go command in PATH", "the node's programs are built from source; install Go 1.25 or newer")
	}
	t := &Toolchain{Dir: source, Arch: arch}
	if source == "" {
		t.Dir = "."
	} else if st, err := os.Stat(source); err != nil || !st.IsDir() {
		return nil, fault.New(fault.Usage, "find", "the sources in "+source, "there is no such folder", "--source names a checkout of mosimg")
	}
	out, err := t.run(ctx, nil, "env", "-json", "GOMOD", "GOVERSION")
	if err != nil {
		return nil, fault.New(fault.Environment, "ask", "the Go toolchain", err, "is it Go 1.25 or newer?")
	}
	var env struct{ GOMOD, GOVERSION string }
	if err := json.Unmarshal(out, &env); err != nil {
		return nil, fault.New(fault.Environment, "ask", "the Go toolchain", err, "")
	}
	mod, err := os.ReadFile(env.GOMOD)
	if name, _, _ := strings.Cut(string(mod), "\n"); err != nil || strings.TrimSpace(name) != "module "+module {
		where := "the current folder is not inside a checkout of mosimg"
		if source != "" {
			where = source + " is not a checkout of mosimg"
		}
		return nil, fault.New(fault.Usage, "find", "the sources of mosagent", where, "run this in the checkout, or name it with --source DIR")
	}
	t.Dir, t.Version = filepath.Dir(env.GOMOD), env.GOVERSION
	return t, nil
}

// environ is the environment of every go command. What a user may have set
// to build other things must not get into an image.
func (t *Toolchain) environ(extra []string) []string {
	env := append(os.Environ(), "GOFLAGS=", "GOWORK=off", "GOEXPERIMENT=", "GO111MODULE=on", "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+t.Arch)
	switch t.Arch {
	case "amd64":
		env = append(env, "GOAMD64=v1")
	case "386":
		env = append(env, "GO386=softfloat")
	}
	return append(env, extra...)
}

// native is for programs that run during the build.
var native = []string{"GOOS=", "GOARCH="}

// killDelay is how long a cancelled command may take to end by itself.
const killDelay = 3 * time.Second

// run runs the go command in the checkout and returns its standard output.
func (t *Toolchain) run(ctx context.Context, env []string, args ...string) ([]byte, error) {
	return t.command(ctx, t.Dir, env, "go", args...)
}

// command runs a program in a process group of its own, so that a cancelled
// build takes the compilers along that the program started.
func (t *Toolchain) command(ctx context.Context, dir string, env []string, name string, args ...string) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	c := exec.CommandContext(ctx, name, args...)
	c.Dir, c.Env, c.Stdout, c.Stderr = dir, t.environ(env), &stdout, &stderr
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGTERM) }
	c.WaitDelay = killDelay
	err := c.Run()
	if ctx.Err() != nil {
		if c.Process != nil {
			_ = syscall.Kill(-c.Process.Pid, syscall.SIGKILL) // who ignored the first signal
		}
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, &commandError{cmd: name + " " + strings.Join(args, " "), output: strings.TrimSpace(stderr.String()), err: err}
	}
	return stdout.Bytes(), nil
}

// commandError carries what a failed command printed.
type commandError struct {
	cmd, output string
	err         error
}

// maxOutput is how much of a compiler's complaints an error shows.
const maxOutput = 4000

func (e *commandError) Error() string {
	out := e.output
	if len(out) > maxOutput {
		out = out[:maxOutput] + " ..."
	}
	if out == "" {
		return fmt.Sprintf("%s: %v", e.cmd, e.err)
	}
	return fmt.Sprintf("%s: %v\n%s", e.cmd, e.err, out)
}

// Unwrap finds a full disk in the output, which is all that go leaves of it.
func (e *commandError) Unwrap() error {
	if strings.Contains(e.output, syscall.ENOSPC.Error()) {
		return syscall.ENOSPC
	}
	return e.err
}

// Program builds one command of the checkout into the file out. release is
// what version.Release is set to. tmp is a folder for unfinished work.
func (t *Toolchain) Program(ctx context.Context, pkg, release, out, tmp string) error {
	_, err := t.run(ctx, []string{"TMPDIR=" + tmp}, "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -buildid= -X mosimg/internal/version.Release="+release, "-o", out, pkg)
	if err != nil {
		return buildFault(pkg, err)
	}
	return nil
}

// utilities is the module that makes the utilities' archive.
const utilities = "initramfs/uroot"

// Utilities builds u-root's commands into the cpio archive out.
func (t *Toolchain) Utilities(ctx context.Context, commands []string, out, tmp string) error {
	dir := filepath.Join(t.Dir, utilities)
	env := []string{"TMPDIR=" + tmp}
	tool := filepath.Join(tmp, "uroot")
	if _, err := t.command(ctx, dir, append(env, native...), "go", "build", "-buildvcs=false", "-o", tool, "."); err != nil {
		return buildFault("the utilities' builder", err)
	}
	work := filepath.Join(tmp, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		return err
	}
	args := append([]string{"-o", out, "-tmp", work, "-arch", t.Arch}, commands...)
	if _, err := t.command(ctx, dir, env, tool, args...); err != nil {
		return buildFault("the utilities", err)
	}
	return nil
}

func buildFault(object string, err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fault.New(fault.Environment, "build", object, err, "")
}

// listed is what "go list -json" says about a package.
type listed struct {
	ImportPath, Dir                     string
	Standard                            bool
	Module                              *struct{ Path, Version, Dir string }
	GoFiles, SFiles, HFiles, EmbedFiles []string
}

// Sources gives what a command of the checkout is made from: for files of the
// checkout their content's hash by relative name, for other modules their
// version, and the toolchain. Equal maps mean an equal program.
func (t *Toolchain) Sources(ctx context.Context, pkg string) (map[string]string, error) {
	out, err := t.run(ctx, nil, "list", "-deps", "-json=ImportPath,Dir,Standard,Module,GoFiles,SFiles,HFiles,EmbedFiles", pkg)
	if err != nil {
		return nil, fault.New(fault.Environment, "list the sources of", pkg, err, "")
	}
	in := map[string]string{"go": t.Version}
	var files []string
	dec := json.NewDecoder(bytes.NewReader(out))
	for {
		var p listed
		if err := dec.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			return nil, fmt.Errorf("read the output of go list: %w", err)
		}
		switch {
		case p.Standard:
		case p.Module != nil && p.Module.Version != "" && !strings.HasPrefix(p.Module.Dir, t.Dir):
			in["module "+p.Module.Path] = p.Module.Version // its content is pinned by go.sum
		default:
			for _, list := range [][]string{p.GoFiles, p.SFiles, p.HFiles, p.EmbedFiles} {
				for _, f := range list {
					files = append(files, filepath.Join(p.Dir, f))
				}
			}
		}
	}
	files = append(files, filepath.Join(t.Dir, "go.mod")) // its go line decides about language and defaults
	return in, t.hashInto(in, files)
}

// UtilitySources is Sources for the utilities.
func (t *Toolchain) UtilitySources() (map[string]string, error) {
	in := map[string]string{"go": t.Version}
	var files []string
	err := filepath.WalkDir(filepath.Join(t.Dir, utilities), func(path string, d fs.DirEntry, err error) error {
		switch filepath.Ext(path) {
		case ".go", ".mod", ".sum":
			files = append(files, path)
		}
		return err
	})
	if err != nil {
		return nil, fault.New(fault.Environment, "read", "the sources of the utilities", err, "is the checkout complete?")
	}
	return in, t.hashInto(in, files)
}

func (t *Toolchain) hashInto(in map[string]string, files []string) error {
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			return fault.New(fault.Environment, "read", "source file", err, "")
		}
		name, err := filepath.Rel(t.Dir, f)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(data)
		in[filepath.ToSlash(name)] = hex.EncodeToString(sum[:])
	}
	return nil
}

// Module is one module that is linked into a program.
type Module struct{ Path, Version, Sum string }

// Modules reads the modules that are linked into the program in file.
func Modules(file string) ([]Module, error) {
	info, err := buildinfo.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var list []Module
	for _, d := range info.Deps {
		if d.Replace != nil {
			d = d.Replace
		}
		list = append(list, Module{d.Path, d.Version, d.Sum})
	}
	return list, nil
}

// UtilityModules is the modules from which the utilities are made, by what
// the packages behind them need. A busybox binary records none itself.
func (t *Toolchain) UtilityModules(ctx context.Context, commands []string) ([]Module, error) {
	args := []string{"list", "-deps", "-tags", "commands", "-f", "{{with .Module}}{{.Path}} {{.Version}} {{.Sum}}{{end}}"}
	for _, c := range commands {
		args = append(args, "github.com/u-root/u-root/cmds/core/"+c)
	}
	out, err := t.command(ctx, filepath.Join(t.Dir, utilities), nil, "go", args...)
	if err != nil {
		return nil, buildFault("the utilities' list of modules", err)
	}
	seen := make(map[Module]bool)
	var list []Module
	for line := range strings.Lines(string(out)) {
		w := strings.Fields(line)
		if len(w) < 2 {
			continue
		}
		m := Module{Path: w[0], Version: w[1]}
		if len(w) > 2 {
			m.Sum = w[2]
		}
		if !seen[m] {
			seen[m] = true
			list = append(list, m)
		}
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Path < list[j].Path })
	return list, nil
}
