package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

const (
	// startTime is how long QEMU may take until its control socket answers.
	startTime = 30 * time.Second
	// quitTime is how long a machine that was told to quit may take.
	quitTime = 5 * time.Second
)

// Machine is a running machine. It is switched off when the process that
// started it ends, however that happens.
type Machine struct {
	Config
	process Process
	qmp     *qmp
	done    chan struct{} // closed when QEMU has ended
	err     error         // valid after done: how it ended
	kill    func()
}

// Start switches a machine on. ctx is only for starting it.
func Start(ctx context.Context, h Host, c Config, log *slog.Logger) (*Machine, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	m, err := start(ctx, h, c)
	if err != nil {
		return nil, fault.New(fault.Environment, "start machine", c.Name, err, "")
	}
	if log != nil {
		log.Debug("machine started", "name", c.Name, "pid", m.process.PID)
	}
	return m, nil
}

func start(ctx context.Context, h Host, c Config) (*Machine, error) {
	if c.firmware() == UEFI {
		if err := copyOnce(c.vars(), h.OVMFVars); err != nil {
			return nil, err
		}
	}
	// QEMU dials us, so its first word needs no polling.
	os.Remove(c.QMPSocket())
	listener, err := net.Listen("unix", c.QMPSocket())
	if err != nil {
		return nil, err
	}
	defer listener.Close()

	out, err := os.OpenFile(c.QEMULog(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	argv := c.Argv(h)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = c.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	m := &Machine{Config: c, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		// The death signal comes when the thread that forked ends, not
		// when its process does: so this goroutine keeps the thread.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			m.err = cmd.Wait()
			m.cleanup()
			close(m.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	m.kill = func() { cmd.Process.Kill() }
	if m.process, err = ProcessOf(cmd.Process.Pid); err != nil {
		// It ended already; the reason is found below.
		m.process = Process{PID: cmd.Process.Pid}
	}
	conn, err := m.accept(ctx, listener)
	if err != nil {
		m.kill()
		<-m.done
		return nil, err
	}
	return m, m.talk(ctx, conn)
}

// accept waits for QEMU's control connection, and closes the listener.
func (m *Machine) accept(ctx context.Context, l net.Listener) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	go func() {
		select {
		case <-m.done:
		case <-ctx.Done():
		}
		l.Close()
	}()
	conn, err := l.Accept()
	switch {
	case err == nil:
		return conn, nil
	case m.Err() != nil:
		return nil, m.Err()
	case ctx.Err() != nil:
		return nil, fmt.Errorf("QEMU did not answer: %w", context.Cause(ctx))
	}
	return nil, err
}

func (m *Machine) talk(ctx context.Context, conn net.Conn) error {
	q, err := newQMP(ctx, conn)
	if err != nil {
		m.kill()
		<-m.done
		if errors.Is(err, errQMPClosed) {
			return m.ended()
		}
		return err
	}
	m.qmp = q
	return nil
}

// ended says why QEMU is gone, with its own last words.
func (m *Machine) ended() error {
	last := strings.Join(Tail(m.QEMULog(), 3), "; ")
	if last == "" {
		last = "it said nothing"
	}
	if m.err == nil {
		return fmt.Errorf("QEMU ended: %s", last)
	}
	return fmt.Errorf("QEMU ended (%w): %s", m.err, last)
}

// cleanup removes the sockets that QEMU made and a kill leaves behind.
func (m *Machine) cleanup() {
	for _, s := range []string{m.ConsoleSocket(), m.LabSocket(), m.QMPSocket()} {
		os.Remove(s)
	}
}

// Process is the QEMU process.
func (m *Machine) Process() Process { return m.process }

// Done is closed when the machine is off.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Err is nil while the machine runs, and afterwards tells how it ended.
func (m *Machine) Err() error {
	select {
	case <-m.done:
		return m.ended()
	default:
		return nil
	}
}

// PowerOff pulls the plug: nothing in the guest gets a chance to save
// anything. It returns when the machine is off.
func (m *Machine) PowerOff() {
	ctx, cancel := context.WithTimeout(context.Background(), quitTime)
	defer cancel()
	if _, err := m.qmp.execute(ctx, "quit", nil); err == nil || errors.Is(err, errQMPClosed) {
		select {
		case <-m.done:
		case <-ctx.Done():
		}
	}
	m.kill()
	<-m.done
	m.qmp.close()
}

// PressPower presses the power button; what the guest makes of it is its own
// business.
func (m *Machine) PressPower(ctx context.Context) error { return m.do(ctx, "system_powerdown", nil) }

// Reset presses the reset button.
func (m *Machine) Reset(ctx context.Context) error { return m.do(ctx, "system_reset", nil) }

// Pause stops the machine's processors, as a host that swaps would; Resume
// lets them go on.
func (m *Machine) Pause(ctx context.Context) error { return m.do(ctx, "stop", nil) }

// Resume is the opposite of Pause.
func (m *Machine) Resume(ctx context.Context) error { return m.do(ctx, "cont", nil) }

// SetLink takes the network card's carrier away, or gives it back.
func (m *Machine) SetLink(ctx context.Context, up bool) error {
	return m.do(ctx, "set_link", map[string]any{"name": "n0", "up": up})
}

// Status is QEMU's word for what the machine does: running, paused,
// internal-error, guest-panicked ...; "off" when it is off.
func (m *Machine) Status(ctx context.Context) string {
	b, err := m.qmp.execute(ctx, "query-status", nil)
	var s struct {
		Status string `json:"status"`
	}
	switch {
	case errors.Is(err, errQMPClosed):
		return "off"
	case err != nil:
		return "not answering"
	case json.Unmarshal(b, &s) != nil || s.Status == "":
		return "unknown"
	}
	return s.Status
}

func (m *Machine) do(ctx context.Context, command string, args any) error {
	if _, err := m.qmp.execute(ctx, command, args); err != nil {
		return fault.New(fault.Unavailable, "control machine", m.Name, err, "")
	}
	return nil
}

// copyOnce copies a file unless the copy is there: a machine keeps its UEFI
// variables when it is switched on again.
func copyOnce(dst, src string) error {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		os.Remove(dst)
		return err
	}
	return out.Close()
}

// NewDisk makes an empty sparse raw image unless there is one already.
func NewDisk(name string, size int64) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Ftruncate(int(f.Fd()), size)
}
