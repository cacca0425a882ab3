package boot

import (
	"context"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/unixhttp"
)

// ending is what the machine does last.
type ending int

const (
	restart ending = iota
	powerOff
	halt
)

func (e ending) String() string {
	return [...]string{"reboot", "power off", "halt"}[e]
}

// endings are the signals that end the machine; they are those of busybox
// init, so that its tools work too. SIGINT is ctrl-alt-del, SIGPWR a UPS.
var endings = map[os.Signal]ending{
	unix.SIGTERM: restart,
	unix.SIGINT:  restart,
	unix.SIGUSR1: halt,
	unix.SIGUSR2: powerOff,
	unix.SIGPWR:  powerOff,
}

// SignalFor is the signal to process 1 for "reboot", "poweroff" or "halt".
var SignalFor = map[string]unix.Signal{
	"reboot": unix.SIGTERM, "poweroff": unix.SIGUSR2, "halt": unix.SIGUSR1,
}

// awaitEnd waits until somebody wants the machine to end. A value comes from again
// when somebody wants it once more.
func (m *machine) awaitEnd(ctx context.Context) (how ending, again <-chan struct{}) {
	sig := make(chan os.Signal, 4)
	for s := range endings {
		signal.Notify(sig, s)
	}
	button := make(chan struct{}, 1)
	go m.guarded("power button", func() { watchButtons(ctx, "/dev/input", button) })
	select {
	case s := <-sig:
		m.log.Info("asked to end", "by", s)
		how = endings[s]
	case <-button:
		m.log.Info("power button pressed")
		how = powerOff
	}
	hurry := make(chan struct{}, 1)
	go m.guarded("power button", func() {
		select {
		case <-sig:
		case <-button:
		case <-ctx.Done():
			return
		}
		hurry <- struct{}{}
	})
	return how, hurry
}

// leave sends this machine's guests away, until leaveLimit or somebody is in a hurry.
func (m *machine) leave(ctx context.Context, hurry <-chan struct{}) {
	ctx, cancel := context.WithTimeout(ctx, leaveLimit)
	defer cancel()
	go func() {
		select {
		case <-hurry:
			cancel()
		case <-ctx.Done():
		}
	}()
	sendGuestsAway(ctx, unixhttp.New(api.AgentSocket, "agent"), m.log)
}

// end stops what is left, makes the state durable and ends the machine.
func (m *machine) end(how ending) {
	// Whoever is left (a shell's children, orphans) gets a second.
	unix.Kill(-1, unix.SIGTERM)
	time.Sleep(500 * time.Millisecond)
	unix.Kill(-1, unix.SIGKILL)
	time.Sleep(100 * time.Millisecond)
	unix.Sync()
	if m.stateMounted {
		if err := unix.Unmount(StateDir, 0); err != nil {
			m.log.Warn("state not unmounted, it is made read-only", "why", err)
			if err := unix.Mount("", StateDir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				m.log.Warn("state not made read-only", "why", err)
			}
		}
		unix.Sync()
	}
	m.log.Info("end", "now", how.String())
	if m.tty != nil {
		m.tty.Flush(2 * time.Second)
	}
	cmd := map[ending]uint32{
		restart:  unix.LINUX_REBOOT_CMD_RESTART,
		powerOff: unix.LINUX_REBOOT_CMD_POWER_OFF,
		halt:     unix.LINUX_REBOOT_CMD_HALT,
	}[how]
	if err := unix.Reboot(int(int32(cmd))); err != nil { // the kernel takes 32 bits
		m.log.Error("reboot", "why", err)
		time.Sleep(lastWords)
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	select {} // process 1 must not return
}

// IsInit reports whether process 1 of this machine is ours: it listens for
// exactly our signals and runs our program.
func IsInit() bool {
	one, err1 := os.Stat("/proc/1/exe")
	own, err2 := os.Stat("/proc/self/exe")
	return err1 == nil && err2 == nil && os.SameFile(one, own)
}
