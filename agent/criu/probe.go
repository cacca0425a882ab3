package criu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
)

// Time limits of one try. A try takes 0.2 s on real hardware and 1 s
// emulated. The first limit is short, because where hardware breakpoints are
// broken (some virtual machines) CRIU 4.1 hangs for ever; the second try works
// without them and gets time.
const (
	firstLimit  = 6 * time.Second
	secondLimit = 20 * time.Second
)

// noBreakpoints makes CRIU single-step instead of using hardware breakpoints
// (FI_NO_BREAKPOINTS in criu/include/fault-injection.h). It is slower by
// little and works everywhere.
const noBreakpoints = "CRIU_FAULT=130"

// Status is what a probe found out.
type Status struct {
	api.CRIUStatus
	// Tool runs CRIU in the way that worked; only valid when Usable.
	Tool Tool
}

// Probe dumps and restores a child of ours, in a folder that it makes below
// dir (which should be on tmpfs) and removes. It does not fail: what is wrong
// is in the Status.
func Probe(ctx context.Context, bundle, dir string, log *slog.Logger) Status {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	unusable := func(version string, err error) Status {
		return Status{CRIUStatus: api.CRIUStatus{Version: version, Reason: err.Error()}}
	}
	if os.Geteuid() != 0 {
		return unusable("", errors.New("the agent does not run as root"))
	}
	tool, err := Find(bundle)
	if err != nil {
		return unusable("", err)
	}
	version, err := tool.Version(ctx)
	if err != nil {
		return unusable("", err)
	}
	err = try(ctx, tool, dir, firstLimit)
	if err != nil && ctx.Err() == nil {
		log.Info("criu probe failed, trying without hardware breakpoints", "why", err)
		tool.Env = append(tool.Env, noBreakpoints)
		if err2 := try(ctx, tool, dir, secondLimit); err2 != nil {
			return unusable(version, fmt.Errorf("%w; without breakpoints: %w", err, err2))
		}
		err = nil
	}
	if err != nil {
		return unusable(version, err)
	}
	return Status{CRIUStatus: api.CRIUStatus{Usable: true, Version: version}, Tool: tool}
}

// try is one dump and restore within limit.
func try(ctx context.Context, tool Tool, parent string, limit time.Duration) (err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	dir, err := os.MkdirTemp(parent, "criu-probe-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	images := filepath.Join(dir, "images")
	if err := os.Mkdir(images, 0o700); err != nil {
		return err
	}
	prog := filepath.Join(dir, "child")
	write := writeChild64
	if runtime.GOARCH == "386" {
		write = writeChild32
	}
	if err := write(prog); err != nil {
		return err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	child := &exec.Cmd{
		Path: prog, Dir: dir, Env: []string{},
		Stdin: null, Stdout: null, Stderr: null,
		SysProcAttr: &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL},
	}
	if err := child.Start(); err != nil {
		return err
	}
	pid := child.Process.Pid
	waited := make(chan struct{})
	go func() { child.Wait(); close(waited) }()
	defer func() {
		if err != nil {
			child.Process.Kill()
			<-waited
		}
	}()

	common := []string{"--no-default-config", "--images-dir", images, "--manage-cgroups=ignore", "-v2"}
	dump := tool.command(ctx, append([]string{"dump", "--tree", strconv.Itoa(pid), "--log-file", "dump.log"}, common...)...)
	if err := run(ctx, dump, "dump", filepath.Join(images, "dump.log")); err != nil {
		return err
	}
	select { // CRIU kills what it has dumped
	case <-waited:
	case <-ctx.Done():
		return errors.New("criu dump: the process lived on")
	}

	// In the foreground criu is the parent of what it restored and waits for it.
	rctx, stop := context.WithCancel(ctx)
	defer stop()
	defer func() {
		if err != nil {
			killIfOurs(pid, prog)
		}
	}()
	restore := tool.command(rctx, append([]string{"restore", "--log-file", "restore.log"}, common...)...)
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, restore, "restore", filepath.Join(images, "restore.log")) }()
	if err := os.WriteFile(filepath.Join(dir, goFile), nil, 0o600); err != nil {
		return err
	}
	if err := <-ended; err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, doneFile)); err != nil {
		return errors.New("criu restore said success, but the process does not run")
	}
	return nil
}

// killIfOurs ends a restored child that outlived its criu. Its pid may belong
// to another process by now, so its program is looked at first.
func killIfOurs(pid int, prog string) {
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && strings.HasPrefix(exe, prog) {
		unix.Kill(pid, unix.SIGKILL)
	}
}

// run runs criu; its error says what criu's log says.
func run(ctx context.Context, cmd *exec.Cmd, what, logFile string) error {
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if ctx.Err() == context.DeadlineExceeded {
		err = errors.New("does not end")
	}
	why := ""
	if data, rerr := os.ReadFile(logFile); rerr == nil {
		why = firstError(string(data))
	}
	if why == "" {
		why = firstLine(out)
	}
	if why == "" {
		return fmt.Errorf("criu %s: %w", what, err)
	}
	return fmt.Errorf("criu %s: %w: %s", what, err, why)
}

// firstError is the first error in a log of criu's, without its time stamp
// and place: what follows it are consequences. That it may not raise its own
// limit of open files it calls an error too, and goes on.
func firstError(log string) string {
	for line := range strings.Lines(log) {
		if _, text, ok := strings.Cut(line, "Error ("); ok && !strings.Contains(text, "RLIMIT_NOFILE") {
			if _, after, ok := strings.Cut(text, "): "); ok {
				text = after
			}
			return strings.TrimSpace(text)
		}
	}
	return ""
}
