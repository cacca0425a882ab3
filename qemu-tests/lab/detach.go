package lab

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// A detached lab is a process of its own that outlives the command that
// started it. The two talk while it comes up:
//
//	command -> lab   standard input: the Config as one line of JSON; its end,
//	                 before the lab is up, means that the command is gone
//	lab -> command   descriptor 3: lines of JSON (report); its end without
//	                 a verdict means that the lab crashed
const reportFD = 3

// detachedEnv marks the lab's process. A program that does not know the verb
// it was started with, such as a test, may come back to Detach: that must not
// start another process, and so on.
const detachedEnv = "MOSIMG_LAB_DETACHED"

// report is one line from a lab that comes up.
type report struct {
	Say   string `json:"say,omitempty"`
	Up    bool   `json:"up,omitempty"`
	Error string `json:"error,omitempty"`
	Kind  int    `json:"kind,omitempty"`
	Kept  string `json:"kept,omitempty"` // folder with the evidence
}

// Detach starts a lab in a process of its own, by the command argv, which
// must end in Serve, and waits until it is up. When ctx ends before that the
// lab is taken down again. It returns the folder in which a failed lab kept
// its evidence, or "".
func Detach(ctx context.Context, argv []string, c Config, progress io.Writer) (kept string, err error) {
	const op = "start lab"
	if os.Getenv(detachedEnv) != "" {
		return "", fault.New(fault.Refused, op, c.Dir, "this process is a detached lab itself", "")
	}
	r, w, err := os.Pipe()
	if err != nil {
		return "", fault.New(fault.Environment, op, "", err, "")
	}
	defer r.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), detachedEnv+"=1")
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	w.Close()
	if err != nil {
		return "", fault.New(fault.Environment, op, argv[0], err, "")
	}
	defer stdin.Close()
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(os.Interrupt) })
	defer stop()
	line, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	_, _ = stdin.Write(append(line, '\n')) // a lab that died says so on the pipe

	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var m report
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			continue
		}
		switch {
		case m.Say != "":
			io.WriteString(progress, m.Say)
		case m.Up:
			return "", cmd.Process.Release()
		case m.Error != "":
			cmd.Wait()
			if ctx.Err() != nil {
				return "", context.Cause(ctx)
			}
			return m.Kept, &failure{fault.Kind(m.Kind), m.Error}
		}
	}
	state := cmd.Wait()
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	return "", fault.New(fault.Internal, op, c.Dir, fmt.Sprintf("its process ended without a word (%v)", state), "see "+logFile+" in its folder")
}

// failure is a fault of the lab's process, as this one tells it.
type failure struct {
	kind fault.Kind
	text string
}

func (f *failure) Error() string { return f.text }

// As gives the failure the exit status that it had in the lab's process.
func (f *failure) As(target any) bool {
	e, ok := target.(**fault.Error)
	if ok {
		*e = fault.New(f.kind, "start lab", "", f.text, "")
	}
	return ok
}

// reporter sends progress to the starting command for as long as it listens,
// and to the lab's log.
type reporter struct {
	mu   sync.Mutex
	pipe *os.File // nil when nobody listens any more
	log  io.Writer
}

func (r *reporter) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.log != nil {
		_, _ = r.log.Write(p) // a full disk must not end the lab
	}
	r.send(report{Say: string(p)})
	return len(p), nil
}

// send writes one report; r.mu is held.
func (r *reporter) send(m report) {
	if r.pipe == nil {
		return
	}
	b, err := json.Marshal(m)
	if err == nil {
		_, err = r.pipe.Write(append(b, '\n'))
	}
	if err != nil {
		r.pipe = nil
	}
}

// verdict sends the last report.
func (r *reporter) verdict(m report) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.send(m)
	if r.pipe != nil {
		r.pipe.Close()
		r.pipe = nil
	}
}

// Serve is the detached lab's process: it reads its Config from in, brings
// the lab up, and keeps it up until ctx ends.
func Serve(ctx context.Context, in io.Reader) error {
	unix.CloseOnExec(reportFD)
	rep := &reporter{pipe: os.NewFile(reportFD, "report")}
	err := serve(ctx, in, rep)
	if err != nil {
		rep.verdict(report{Error: err.Error(), Kind: int(fault.KindOf(err))})
	}
	return err
}

func serve(ctx context.Context, in io.Reader, rep *reporter) error {
	input := bufio.NewReader(in)
	line, err := input.ReadBytes('\n')
	if err != nil {
		return fault.New(fault.Usage, "start lab", "", "no configuration on standard input", "start it with: mosimg lab up")
	}
	var c Config
	if err := json.Unmarshal(line, &c); err != nil {
		return fault.New(fault.Usage, "start lab", "", err, "")
	}
	starting, abandoned := context.WithCancelCause(ctx)
	defer abandoned(nil)
	go func() {
		_, _ = input.ReadByte()
		abandoned(fmt.Errorf("the command that started it is gone: %w", context.Canceled))
	}()

	lb, err := New(c, rep, nil)
	if err != nil {
		return err
	}
	log, err := lb.ownLog()
	if err != nil {
		lb.Close(nil)
		return err
	}
	defer log.Close()
	rep.mu.Lock()
	rep.log = log
	rep.mu.Unlock()
	lb.log = slog.New(slog.NewTextHandler(log, nil))

	if err := lb.BringUp(starting); err != nil {
		if Interrupted(err) {
			lb.Close(nil)
			return err
		}
		rep.verdict(report{Kept: lb.Close(err), Error: err.Error(), Kind: int(fault.KindOf(err))})
		return err
	}
	rep.verdict(report{Up: true})
	<-ctx.Done()
	lb.SetPhase(Stopping, nil)
	lb.Close(nil)
	return nil
}

// ownLog makes the lab's log file this process's standard output and error,
// so that a crash leaves its trace there.
func (l *Lab) ownLog() (*os.File, error) {
	f, err := os.OpenFile(l.folder.path(logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, l.environment("open log", err)
	}
	if err := errors.Join(unix.Dup3(int(f.Fd()), 1, 0), unix.Dup3(int(f.Fd()), 2, 0)); err != nil {
		f.Close()
		return nil, l.environment("open log", err)
	}
	return f, nil
}
