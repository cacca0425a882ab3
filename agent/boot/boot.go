// Package boot is process 1 of a machine that mosimg booted: of a diskless
// node, and of a head in a VM. It mounts what a node needs, loads the drivers
// for its hardware, starts the services and keeps them running, and ends the
// machine in order. It reads nothing from the network: that is left to
// services, whose failure costs a restart and not the machine.
package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/console"
	"mosimg/internal/api"
	"mosimg/internal/bootargs"
	"mosimg/internal/modlist"
	"mosimg/internal/version"
)

// Places in the image.
const (
	headTool   = "/usr/bin/mosimg"
	headImages = "/usr/share/mosimg/images"
	headConfig = "/etc/mosimg/cluster.yaml"
	// StateDir is where a head keeps what must survive a reboot.
	StateDir = "/var/lib/mosimg"
	logDir   = api.RunDir + "/log"
)

// lastWords is how long a message stays on the screen before a reboot that
// nobody asked for.
const lastWords = 10 * time.Second

// self, as a service's program, is this program under its own name.
const self = "mosagent"

// environ is what services and shells see.
var environ = []string{
	"PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:/bbin",
	"HOME=/root", "TERM=linux", "LANG=C.UTF-8",
}

// machine is the state of process 1.
type machine struct {
	args   bootargs.Args
	out    io.Writer // messages for people: the consoles once they are open
	tty    *console.Consoles
	log    *slog.Logger
	logDir string
	mods   *loader
	reaper *reaper

	fileMu sync.Mutex // guards writing to the following
	file   *logFile   // init's own log, nil until there is a place for it

	stateMounted bool
}

// Main is process 1. It does not return: it ends by reboot(2).
func Main() {
	m := &machine{out: os.Stderr, logDir: logDir, reaper: newReaper()}
	m.log = slog.New(&handler{out: m.say})
	defer m.guard("init")
	m.boot()
	how := m.serve()
	m.end(how)
}

// boot is everything up to the services, in order. Most failures leave a
// machine that can still say what is wrong with it, so boot goes on and the
// console tells.
func (m *machine) boot() {
	for _, s := range []struct {
		name string
		run  func() error
	}{
		{"make / a mount of its own", newRoot},
		{"mount file systems", mountAll},
		{"open consoles", m.openConsoles},
		{"set kernel parameters", setKernel},
		{"read kernel command line", m.readArgs},
		{"set host name", m.setHostname},
		{"bring up lo", loUp},
		{"load modules", m.loadModules},
		{"mount state", m.mountState},
	} {
		began := time.Now()
		if err := s.run(); err != nil {
			m.log.Error(s.name, "why", err)
			continue
		}
		m.log.Info(s.name, "took", time.Since(began).Round(time.Millisecond))
	}
}

func (m *machine) openConsoles() error {
	if err := os.MkdirAll(m.logDir, 0o755); err != nil {
		return err
	}
	devs := console.Active()
	if len(devs) == 0 {
		return errors.New("the kernel has no console (console=ttyS0 on its command line?)")
	}
	m.tty = console.Open(devs)
	m.out = m.tty
	fmt.Fprintf(m.out, "mosimg %s on Linux %s\n", version.String(), kernelRelease())
	file, err := openLog(filepath.Join(m.logDir, "init.log"))
	if err == nil {
		m.file = file
	}
	return err
}

// say shows a line of init's own on the consoles and keeps it.
func (m *machine) say(line string) {
	io.WriteString(m.out, line)
	m.fileMu.Lock()
	defer m.fileMu.Unlock()
	if m.file != nil {
		fmt.Fprintf(m.file, "%s %s", time.Now().Format(logTime), line)
	}
}

// setKernel keeps a fault of process 1 itself from ending silently: the Go
// runtime prints it, the kernel panics and reboots after lastWords.
func setKernel() error {
	// ctrl-alt-del comes to us as SIGINT instead of resetting the machine.
	return errors.Join(
		os.WriteFile("/proc/sys/kernel/panic", fmt.Appendf(nil, "%d", int(lastWords.Seconds())), 0o644),
		unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF),
	)
}

func (m *machine) readArgs() error {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	m.args = bootargs.Parse(string(line))
	if r := m.args.Role; r != "node" && r != "head" {
		m.args.Role = "node"
		return fmt.Errorf("mosimg.role=%s is neither node nor head; this machine is a node", r)
	}
	return nil
}

// setHostname gives the machine a name until the head has given it one.
func (m *machine) setHostname() error {
	name := "mosimg"
	if m.args.Role == "head" {
		name = "head"
	} else if mac := strings.ReplaceAll(m.args.BootMAC, ":", ""); mac != "" {
		name = "mosimg-" + mac[6:]
	}
	return unix.Sethostname([]byte(name))
}

func (m *machine) loadModules() error {
	l, err := newLoader(modlist.Path, m.log)
	if err != nil {
		return err
	}
	m.mods = l
	if r := kernelRelease(); l.list.Release != r {
		return fmt.Errorf("the image has modules for kernel %s, but %s runs", l.list.Release, r)
	}
	n := l.run(l.list.Always())
	n += l.hardware("/sys/devices")
	m.log.Info("kernel modules", "loaded", n)
	return nil
}

// services are what runs on this machine, in the order of start. They are
// stopped in the reverse order.
func (m *machine) services() []*service {
	fixed := func(argv ...string) func() ([]string, error) {
		return func() ([]string, error) { return argv, nil }
	}
	net := []string{self, "net"}
	agent := []string{self, "agent", "--own-machine", "--console"}
	var list []*service
	a := m.args
	if a.Debug {
		agent = append(agent, "--no-keys") // Enter belongs to the shells
	}
	if a.Role == "head" {
		net = append(net, "--card", a.Interface, "--address", a.Address)
		agent = append(agent, "--join", api.LocalJoin)
	} else {
		net = append(net, "--card", a.BootMAC)
		agent = append(agent, "--head", a.Head, "--ca", a.CA, "--nonce", a.Nonce)
	}
	agent = append(agent, "--image", a.Image)
	list = append(list, &service{name: "net", argv: fixed(net...)})
	if a.Role == "head" {
		list = append(list, &service{name: "head", argv: headArgv})
	}
	list = append(list, &service{name: "agent", argv: fixed(agent...)})
	if a.Debug {
		list = append(list, m.debugServices()...)
	}
	for _, s := range list {
		s.done = make(chan struct{})
	}
	return list
}

// serve runs the services until the machine shall end, and says how.
func (m *machine) serve() ending {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go m.guarded("reaper", func() { m.reaper.run(ctx) })
	if m.mods != nil {
		go m.guarded("drivers", func() {
			if err := m.watchDevices(ctx); err != nil {
				m.log.Warn("devices that appear later get no driver", "why", err)
			}
		})
	}

	list := m.services()
	stops := make([]context.CancelFunc, len(list))
	for i, s := range list {
		var sctx context.Context
		sctx, stops[i] = context.WithCancel(ctx)
		go m.guarded("service "+s.name, func() { m.keep(sctx, s) })
	}
	how, hurry := m.awaitEnd(ctx)
	m.leave(ctx, hurry)
	m.log.Info("stopping", "then", how.String())
	for i, s := range slices.Backward(list) {
		stops[i]()
		<-s.done
	}
	return how
}

// guarded runs f; a panic in it ends the machine, not without a word.
func (m *machine) guarded(what string, f func()) {
	defer m.guard(what)
	f()
}

// guard, deferred, turns a panic of process 1 into a message and a reboot.
func (m *machine) guard(what string) {
	r := recover()
	if r == nil {
		return
	}
	fmt.Fprintf(m.out, "\nmosimg: fault in %s: %v\n%s\nmosimg: rebooting in %v\n", what, r, debug.Stack(), lastWords)
	time.Sleep(lastWords)
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// exists reports whether path is there.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// firstOf is the first of the paths that exists, or "".
func firstOf(paths ...string) string {
	for _, p := range paths {
		if exists(p) {
			return p
		}
	}
	return ""
}
