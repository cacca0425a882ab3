package lab

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"mosimg/internal/fault"
	"mosimg/qemu-tests/vm"
	"mosimg/qemu-tests/vswitch"
)

// Machine is one machine of a lab, on or off.
type Machine struct {
	lab   *Lab
	cfg   vm.Config
	mac   vswitch.MAC
	port  *vswitch.Port
	stage atomic.Int32
	// reachedAt is when each stage was first seen since power on, in Unix
	// nanoseconds, 0 for never.
	reachedAt [len(stageNames)]atomic.Int64

	mu      sync.Mutex // guards the following
	vm      *vm.Machine
	on      time.Time
	joined  time.Duration // from power on to member, 0 before
	booting bool          // holds a token of lab.boots
}

// Name is the machine's name: head, n1, n2 ...
func (m *Machine) Name() string { return m.cfg.Name }

// MAC is the machine's address.
func (m *Machine) MAC() string { return m.cfg.MAC }

// Firmware is what the machine starts with.
func (m *Machine) Firmware() vm.Firmware {
	if m.cfg.Firmware == "" {
		return vm.BIOS
	}
	return m.cfg.Firmware
}

// Port is the machine's port at the switch.
func (m *Machine) Port() *vswitch.Port { return m.port }

// Stage is how far the machine is since it was switched on.
func (m *Machine) Stage() Stage { return Stage(m.stage.Load()) }

func (m *Machine) reached(s Stage) {
	m.reachedAt[s].CompareAndSwap(0, time.Now().UnixNano())
	for {
		old := m.stage.Load()
		if int32(s) <= old || m.stage.CompareAndSwap(old, int32(s)) {
			return
		}
	}
}

// VM is the running machine, or nil when it is off.
func (m *Machine) VM() *vm.Machine {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.vm
}

// PowerOn switches the machine on. Under emulation it first waits until few
// enough others are booting: machines that starve each other run into time
// limits of firmware and kernel that no real machine would meet.
func (m *Machine) PowerOn(ctx context.Context) error {
	if m.VM() != nil {
		return fault.New(fault.Usage, "switch on", m.Name(), "it is on", "")
	}
	select {
	case m.lab.boots <- struct{}{}:
	default:
		m.lab.Say("%s: waits for others to boot", m.Name())
		select {
		case m.lab.boots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	m.mu.Lock()
	m.booting = true
	m.mu.Unlock()
	m.lab.sw.ForgetFirst(m.mac)
	m.stage.Store(int32(Silent))
	for i := range m.reachedAt {
		m.reachedAt[i].Store(0)
	}
	running, err := vm.Start(ctx, m.lab.host, m.cfg, m.lab.log)
	if err != nil {
		m.stage.Store(int32(Off))
		m.settled()
		return err
	}
	m.mu.Lock()
	m.vm, m.on, m.joined = running, time.Now(), 0
	m.mu.Unlock()
	m.lab.Say("%s: switched on (%s)", m.Name(), m.describe())
	m.lab.save()
	return nil
}

func (m *Machine) describe() string {
	how := string(m.Firmware())
	if m.cfg.Kernel != "" {
		how = "direct kernel boot"
	}
	return fmt.Sprintf("%s, %d MiB", how, m.cfg.MemoryMB)
}

// settled tells that the machine has booted, or never will.
func (m *Machine) settled() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.booting {
		m.booting = false
		<-m.lab.boots
	}
}

// Since is how long ago the machine was switched on.
func (m *Machine) Since() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Since(m.on)
}

// Joined is how long the machine took from power on to being a member, 0
// while it is not.
func (m *Machine) Joined() time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.joined
}

// Took is how long the machine took from power on to a stage, 0 while it is
// not there.
func (m *Machine) Took(s Stage) time.Duration {
	at := m.reachedAt[s].Load()
	if at == 0 {
		return 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return time.Unix(0, at).Sub(m.on)
}

// AwaitStage waits until the machine is at a stage or beyond, or cannot get
// there any more.
func (m *Machine) AwaitStage(ctx context.Context, s Stage) error {
	ctx, cancel := context.WithTimeout(ctx, m.lab.limits.join)
	defer cancel()
	ctx, stop := m.failFast(ctx)
	defer stop()
	look := time.NewTicker(200 * time.Millisecond)
	defer look.Stop()
	for m.Stage() < s {
		select {
		case <-look.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s until it %s: %w; it %s", m.Name(), s, context.Cause(ctx), m.Stage())
		}
	}
	return nil
}

// PowerOff pulls the machine's plug. It may be off already.
func (m *Machine) PowerOff() {
	m.mu.Lock()
	running := m.vm
	m.vm = nil
	m.mu.Unlock()
	if running != nil {
		running.PowerOff()
	}
	m.stage.Store(int32(Off))
	m.settled()
	m.lab.save()
}

// Running is nil while the machine is on and has not crashed.
func (m *Machine) Running() error {
	running := m.VM()
	if running == nil {
		return errors.New("it is off")
	}
	if err := running.Err(); err != nil {
		return err
	}
	if text := vm.Panicked(m.cfg.ConsoleLog()); text != "" {
		return errors.New(text)
	}
	return nil
}

// awaitFirstPacket waits until the machine says anything at all.
func (m *Machine) awaitFirstPacket(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, m.lab.limits.first, errSilent)
	defer cancel()
	ctx, ended := context.WithCancelCause(ctx)
	defer ended(nil)
	if running := m.VM(); running != nil {
		go func() {
			select {
			case <-running.Done():
				ended(running.Err())
			case <-ctx.Done():
			}
		}()
	}
	_, err := m.lab.sw.AwaitFirstPacket(ctx, m.mac)
	return err
}

var errSilent = errors.New("it never sent a packet: it did not boot, or has no network")

// consoleLines is how much of a console goes into an error.
const consoleLines = 15

// explain tells all there is to know about a machine that failed.
func (m *Machine) explain(what string, err error) error {
	if errors.Is(err, context.Canceled) {
		return err // nobody waits for the story
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%v; stage: %s", err, m.Stage())
	if running := m.VM(); running != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		fmt.Fprintf(&b, "; on for %.0f s, QEMU says %s", m.Since().Seconds(), running.Status(ctx))
	}
	if lines := vm.Tail(m.cfg.ConsoleLog(), consoleLines); len(lines) > 0 {
		fmt.Fprintf(&b, "; its console ends:\n  | %s\n", strings.Join(lines, "\n  | "))
	} else {
		b.WriteString("; its console is empty")
	}
	return fault.New(fault.Unavailable, what, m.Name(), &told{text: b.String(), err: err}, "")
}

// told is an error with its whole story.
type told struct {
	text string
	err  error
}

func (t *told) Error() string { return t.text }
func (t *told) Unwrap() error { return t.err }

func (m *Machine) state() MachineState {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := MachineState{Name: m.cfg.Name, MAC: m.cfg.MAC, Firmware: m.cfg.Firmware, On: m.vm != nil,
		Console: m.cfg.ConsoleLog()}
	if s.Firmware == "" && m.cfg.Kernel == "" {
		s.Firmware = vm.BIOS
	}
	if m.vm != nil {
		s.Process = m.vm.Process()
	}
	return s
}
