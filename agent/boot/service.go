package boot

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Restart delays: quick at first, since most failures are an order of start,
// and never quicker than a person can read the console.
const (
	minDelay = 200 * time.Millisecond
	maxDelay = 5 * time.Second
	// settled is the life after which a service counts as healthy again.
	settled = 30 * time.Second
	// stopGrace is how long a service may take to end after TERM.
	stopGrace = 5 * time.Second
)

// nextDelay is how long to wait before a service is started again that has
// lived for lived; last is the delay before its previous start, 0 at first.
func nextDelay(last, lived time.Duration) time.Duration {
	if last == 0 || lived >= settled {
		return minDelay
	}
	return min(2*last, maxDelay)
}

// service is one program that init keeps running.
type service struct {
	name string
	// argv says how to start it now; an error is shown and tried again.
	argv func() ([]string, error)
	// tty makes it a session on that terminal instead of a logged daemon.
	tty string

	done chan struct{} // closed when the service has ended for good
}

// keep runs s until ctx ends, then ends it: TERM, and KILL after stopGrace.
func (m *machine) keep(ctx context.Context, s *service) {
	defer close(s.done)
	var delay time.Duration
	var told string
	for {
		began := time.Now()
		status, err := m.runOnce(ctx, s)
		if ctx.Err() != nil {
			return
		}
		delay = nextDelay(delay, time.Since(began))
		what, text := "service ended", status
		if err != nil {
			what, text = "service not started", err.Error()
		}
		// A service that fails for the same reason again says so once.
		if text != told {
			m.log.Warn(what, "service", s.name, "why", text, "again_in", delay)
			told = text
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
	}
}

func (m *machine) runOnce(ctx context.Context, s *service) (string, error) {
	argv, err := s.argv()
	if err != nil {
		return "", err
	}
	files, after, err := m.stdio(s)
	if err != nil {
		return "", err
	}
	attr := &syscall.ProcAttr{
		Dir: "/",
		Env: environ,
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: s.tty != ""},
	}
	for _, f := range files {
		attr.Files = append(attr.Files, f.Fd())
	}
	pid, done, err := m.reaper.start(argv, attr)
	after()
	if err != nil {
		return "", err
	}
	select {
	case ws := <-done:
		return statusText(ws), nil
	case <-ctx.Done():
	}
	// TERM means "leave": a shell on a terminal heeds only HUP.
	unix.Kill(pid, unix.SIGTERM)
	if s.tty != "" {
		unix.Kill(pid, unix.SIGHUP)
	}
	select {
	case ws := <-done:
		return statusText(ws), nil
	case <-time.After(stopGrace):
		m.log.Warn("service does not end, killed", "service", s.name)
		unix.Kill(pid, unix.SIGKILL)
		return statusText(<-done), nil
	}
}

// stdio is what a service gets as files 0, 1, 2. after must be called once
// the service has started or failed to.
func (m *machine) stdio(s *service) (files [3]*os.File, after func(), err error) {
	if s.tty != "" {
		f, err := os.OpenFile(s.tty, os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			return files, nil, err
		}
		return [3]*os.File{f, f, f}, func() { f.Close() }, nil
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return files, nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		null.Close()
		return files, nil, err
	}
	go func() {
		defer m.guard("output of " + s.name)
		defer r.Close()
		m.copyLines(s.name, r)
	}()
	return [3]*os.File{null, w, w}, func() { null.Close(); w.Close() }, nil
}

// copyLines shows a service's output on the consoles with its name before
// each line, and keeps it in the service's log.
func (m *machine) copyLines(name string, r io.Reader) {
	file := io.Discard
	if l, err := openLog(filepath.Join(m.logDir, name+".log")); err == nil {
		defer func() { _ = l.Close() }()
		file = l
	}
	lines(r, func(line []byte) {
		fmt.Fprintf(m.out, "%s: %s\n", name, line)
		fmt.Fprintf(file, "%s %s\n", time.Now().Format(logTime), line)
	})
}

func statusText(ws syscall.WaitStatus) string {
	switch {
	case ws.Signaled():
		return "killed by " + ws.Signal().String()
	default:
		return fmt.Sprintf("exit status %d", ws.ExitStatus())
	}
}
