// Package criu finds CRIU on this machine and tries out whether it works
// here: it dumps and restores a small process. Nothing less tells, because
// kernel, CPU, virtual machine and CRIU have to fit together.
package criu

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Bundle is where an image has CRIU with its libraries.
const Bundle = "/usr/lib/mosimg/criu"

// Tool is a CRIU that can be run.
type Tool struct {
	Argv []string // program and first arguments
	Env  []string // beside PATH; e.g. CRIU_FAULT
	// Bundle is the folder that all of Argv is below; "" for an installed CRIU.
	Bundle string
}

// Find looks for CRIU in a bundle: a tree of unpacked packages, whose own
// loader runs it, so that it does not matter which libraries the machine has.
// With dir "" it looks in Bundle, then for an installed criu.
func Find(dir string) (Tool, error) {
	if dir == "" {
		if t, err := Find(Bundle); err == nil {
			return t, nil
		}
		path, err := exec.LookPath("criu")
		if err != nil {
			return Tool{}, fault.New(fault.NotFound, "find", "criu", "neither "+Bundle+" nor an installed criu is here", "build the image with CRIU, or install it")
		}
		return Tool{Argv: []string{path}}, nil
	}
	program := first(dir, "usr/sbin/criu", "sbin/criu", "usr/bin/criu", "bin/criu", "criu")
	if program == "" {
		return Tool{}, fault.New(fault.NotFound, "find", "criu", "no criu in "+dir, "")
	}
	var ld string
	for _, pattern := range []string{"usr/lib64/ld-linux*.so.*", "lib64/ld-linux*.so.*", "usr/lib/*/ld-linux*.so.*", "lib/*/ld-linux*.so.*", "usr/lib/ld-linux*.so.*", "lib/ld-linux*.so.*"} {
		if found, _ := filepath.Glob(filepath.Join(dir, pattern)); len(found) > 0 {
			ld = found[0]
			break
		}
	}
	if ld == "" { // a static criu
		return Tool{Argv: []string{program}, Bundle: dir}, nil
	}
	var libs []string
	for _, pattern := range []string{"usr/lib/*-linux-gnu*", "lib/*-linux-gnu*", "usr/lib64", "lib64", "usr/lib", "lib"} {
		found, _ := filepath.Glob(filepath.Join(dir, pattern))
		libs = append(libs, found...)
	}
	return Tool{Argv: []string{ld, "--library-path", strings.Join(libs, ":"), program}, Bundle: dir}, nil
}

func first(dir string, names ...string) string {
	for _, n := range names {
		p := filepath.Join(dir, n)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() {
			return p
		}
	}
	return ""
}

// command is criu with these arguments. It dies with ctx, its children too.
func (t Tool) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, t.Argv[0], append(t.Argv[1:len(t.Argv):len(t.Argv)], args...)...)
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME="}, t.Env...)
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	return cmd
}

// Version is what criu says of itself, such as "4.1.1".
func (t Tool) Version(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := t.command(ctx, "--version").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w: %s", t.Argv[len(t.Argv)-1], err, firstLine(out))
	}
	v, ok := strings.CutPrefix(firstLine(out), "Version: ")
	if !ok {
		return "", fmt.Errorf("criu --version says %q", firstLine(out))
	}
	return v, nil
}

func firstLine(b []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	return line
}
