package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/internal/labport"
	"mosimg/qemu-tests/vm"
	"mosimg/qemu-tests/vswitch"
)

// Lab is a running lab. Its methods may be used concurrently.
type Lab struct {
	cfg      Config
	host     vm.Host
	set      *imageset.Set
	limits   limits
	folder   *folder
	log      *slog.Logger
	progress io.Writer
	started  time.Time

	sw       *vswitch.Switch
	machines []*Machine
	boots    chan struct{} // one token for each machine that may boot now
	port     *labport.Client
	relay    *relay
	watch    watch

	mu     sync.Mutex // guards the following and writes of lab.json
	phase  Phase
	failed error
	closed bool
}

// New checks everything, and makes a lab in which every machine is still off.
// Nothing is left behind when it fails. Progress is for people; nil is silent.
func New(c Config, progress io.Writer, log *slog.Logger) (*Lab, error) {
	if progress == nil {
		progress = io.Discard
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	set, host, err := check(c)
	if err != nil {
		return nil, err
	}
	f, err := openFolder(c.Dir)
	if err != nil {
		return nil, err
	}
	l := &Lab{cfg: c, host: host, set: set, limits: limitsFor(host), folder: f, log: log,
		progress: progress, started: time.Now(), phase: Starting}
	if err := l.build(); err != nil {
		l.Close(nil)
		return nil, err
	}
	return l, nil
}

// Check refuses what New would refuse for want of images, programs or memory.
func Check(c Config) error {
	_, _, err := check(c)
	return err
}

// check refuses what cannot work, before anything is made.
func check(c Config) (*imageset.Set, vm.Host, error) {
	set, err := openImages(c.Images)
	if err != nil {
		return nil, vm.Host{}, err
	}
	p, err := newPlan(c, set.Path(imageset.Kernel), "/", "/")
	if err != nil {
		return nil, vm.Host{}, err
	}
	host, err := vm.FindHost(p.machines)
	if err != nil {
		return nil, vm.Host{}, err
	}
	return set, host, vm.CheckMemory(p.machines)
}

// openImages opens an image set that a lab can boot.
func openImages(dir string) (*imageset.Set, error) {
	set, err := imageset.Open(dir)
	if err != nil {
		return nil, err
	}
	if set.Manifest.Arch != "amd64" {
		return nil, fault.New(fault.Usage, "use image set", dir, "it is for "+set.Manifest.Arch+", the lab's machines are amd64", "")
	}
	if _, ok := set.Manifest.File(imageset.HeadArchive); !ok {
		return nil, fault.New(fault.NotFound, "use image set", dir, "it has no "+imageset.HeadArchive+", so no head can boot from it", "build it with: mosimg build -o "+dir)
	}
	return set, nil
}

// Plan is the command lines of a lab, each machine's, without starting or
// making anything. What is missing on this computer is no error here.
func Plan(c Config) ([][]string, error) {
	dir := c.Dir
	if dir == "" {
		dir = filepath.Join(os.TempDir(), "mosimg-lab")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	images, err := filepath.Abs(c.Images)
	if err != nil {
		return nil, err
	}
	p, err := newPlan(c, filepath.Join(images, imageset.Kernel), dir, filepath.Join(dir, socketFolder))
	if err != nil {
		return nil, err
	}
	host, err := vm.FindHost(p.machines)
	if host.QEMU == "" {
		host.QEMU = "qemu-system-x86_64"
	}
	_ = err // a dry run shows what would be run, wherever it is run
	var lines [][]string
	for _, m := range p.machines {
		lines = append(lines, m.Argv(host))
	}
	return lines, nil
}

// build makes the switch and the files, and connects everything.
func (l *Lab) build() error {
	kernel, err := filepath.Abs(l.set.Path(imageset.Kernel))
	if err != nil {
		return err
	}
	p, err := newPlan(l.cfg, kernel, l.folder.dir, l.folder.sockets)
	if err != nil {
		return err
	}
	l.sw, err = vswitch.New(vswitch.Config{Pcap: l.folder.path(captureFile), Tap: l.tap, Log: l.log})
	if err != nil {
		return l.environment("start switch", err)
	}
	l.boots = make(chan struct{}, l.limits.boots)
	for i, c := range p.machines {
		mac, err := vswitch.ParseMAC(c.MAC)
		if err != nil {
			return err
		}
		m := &Machine{lab: l, cfg: c, mac: mac}
		// Before the port: frames may come as soon as it is there.
		l.machines = append(l.machines, m)
		if m.port, err = l.sw.Listen(c.Name, c.NetSocket(), p.links[i]); err != nil {
			return l.environment("add "+c.Name+" to the switch", err)
		}
	}
	head := l.Head()
	if err := writeHeadInitrd(head.cfg.Initrd, l.set, l.cfg.Cluster); err != nil {
		return l.environment("write the head's initramfs", err)
	}
	if err := vm.NewDisk(head.cfg.Disk, stateDiskSize); err != nil {
		return l.environment("make the head's state disk", err)
	}
	if err := l.writeCommands(); err != nil {
		return l.environment("write the command lines", err)
	}
	l.port = labport.Dial(head.cfg.LabSocket(), l.log)
	if l.relay, err = newRelay(filepath.Join(l.folder.sockets, execSocket), l.port, l.log); err != nil {
		return l.environment("listen for lab exec", err)
	}
	l.watch.init(l)
	l.save()
	return nil
}

func (l *Lab) environment(op string, err error) error {
	return fault.New(fault.Environment, op, "in "+l.folder.dir, err, "")
}

// writeCommands keeps each machine's command line as a shell script: with a
// failed lab it tells how to run one machine by hand.
func (l *Lab) writeCommands() error {
	var b strings.Builder
	b.WriteString("#!/bin/sh\n# The machines of this lab. The switch must listen on their sockets.\n")
	for _, m := range l.machines {
		fmt.Fprintf(&b, "\n# %s\n%s\n", m.cfg.Name, ShellQuote(m.cfg.Argv(l.host)))
	}
	return os.WriteFile(l.folder.path(commandsFile), []byte(b.String()), 0o644)
}

// ShellQuote is a command line that a shell reads as argv, one option a line.
func ShellQuote(argv []string) string {
	var b strings.Builder
	for i, a := range argv {
		switch {
		case i == 0:
		case strings.HasPrefix(a, "-"):
			b.WriteString(" \\\n  ")
		default:
			b.WriteByte(' ')
		}
		if a != "" && strings.IndexFunc(a, needsQuote) < 0 {
			b.WriteString(a)
		} else {
			b.WriteString("'" + strings.ReplaceAll(a, "'", `'\''`) + "'")
		}
	}
	return b.String()
}

func needsQuote(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("-_=./,:+@%", r)
}

// tap follows how far each machine is.
func (l *Lab) tap(port string, frame []byte) {
	for _, m := range l.machines {
		if m.cfg.Name == port {
			m.reached(stageOf(frame))
			return
		}
	}
}

// Head is the head's machine.
func (l *Lab) Head() *Machine { return l.machines[0] }

// Machine is the machine of that name, or nil.
func (l *Lab) Machine(name string) *Machine {
	for _, m := range l.machines {
		if m.cfg.Name == name {
			return m
		}
	}
	return nil
}

// Nodes are the diskless machines.
func (l *Lab) Nodes() []*Machine { return l.machines[1:] }

// Switch is the lab's network, to be slowed down or cut.
func (l *Lab) Switch() *vswitch.Switch { return l.sw }

// Set is the image set that the lab boots.
func (l *Lab) Set() *imageset.Set { return l.set }

// Dir is the lab's folder.
func (l *Lab) Dir() string { return l.folder.dir }

// KVM reports whether the machines run on hardware.
func (l *Lab) KVM() bool { return l.host.KVM }

// Say writes one line of progress, with the seconds since the start.
func (l *Lab) Say(format string, args ...any) {
	fmt.Fprintf(l.progress, "%7.1f  %s\n", time.Since(l.started).Seconds(), fmt.Sprintf(format, args...))
}

// SetPhase tells other processes what the lab is doing.
func (l *Lab) SetPhase(p Phase, err error) {
	l.mu.Lock()
	l.phase, l.failed = p, err
	l.mu.Unlock()
	l.save()
}

// save writes lab.json. Losing it only blinds `lab status`, so a failure is
// logged.
func (l *Lab) save() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	s := l.state()
	if err := s.write(l.folder.dir); err != nil {
		l.log.Warn("write lab state", "error", err)
	}
}

func (l *Lab) state() *State {
	self, _ := vm.ProcessOf(os.Getpid())
	s := &State{Version: stateVersion, Phase: l.phase, Process: self, Started: l.started, Images: l.set.Dir,
		Image: l.set.Manifest.ID, KVM: l.host.KVM, Sockets: l.folder.sockets}
	if l.failed != nil {
		s.Error = l.failed.Error()
	}
	for _, m := range l.machines {
		s.Machines = append(s.Machines, m.state())
	}
	return s
}

// Close switches every machine off and removes what the lab made. When failed
// is not nil, or the lab is to be kept, the evidence stays; Close returns its
// folder then, and "" otherwise.
func (l *Lab) Close(failed error) string {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return ""
	}
	l.mu.Unlock()
	keep := failed != nil || l.cfg.Keep
	if failed != nil {
		l.SetPhase(Failed, failed)
	}
	if l.relay != nil {
		l.relay.close()
	}
	if l.port != nil {
		l.port.Close()
	}
	var off sync.WaitGroup
	for _, m := range l.machines {
		off.Go(m.PowerOff)
	}
	off.Wait()
	if l.sw != nil {
		if err := l.sw.Close(); err != nil && keep {
			l.Say("note: %v", err)
		}
	}
	if keep {
		l.save()
	}
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.folder.close(keep)
	if !keep {
		return ""
	}
	return l.folder.dir
}

// relay lets other processes of this user run commands on the head.
type relay struct {
	listener net.Listener
	stop     context.CancelFunc
	wait     sync.WaitGroup
}

func newRelay(socket string, m labport.Machine, log *slog.Logger) (*relay, error) {
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &relay{listener: listener, stop: stop}
	r.wait.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					log.Warn("lab exec: accept", "error", err)
				}
				return
			}
			r.wait.Go(func() {
				defer conn.Close()
				if err := labport.ServeMachine(ctx, conn, m, log); err != nil {
					log.Debug("lab exec: connection ended", "error", err)
				}
			})
		}
	})
	return r, nil
}

func (r *relay) close() {
	r.listener.Close()
	r.stop()
	r.wait.Wait()
}
