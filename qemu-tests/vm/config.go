// Package vm runs one QEMU machine: a documented configuration becomes an
// exact command line (Argv, a pure function, which is also what a dry run
// prints), and that becomes a running process with a console log, a control
// socket (QMP) and a place on the lab's switch.
//
// A machine never outlives the process that started it, needs no root, and
// uses KVM when this host has it.
package vm

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	"mosimg/internal/fault"
	"mosimg/internal/labport"
	"mosimg/qemu-tests/vswitch"
)

// Firmware is what a machine starts with.
type Firmware string

const (
	// BIOS is SeaBIOS with the network card's iPXE ROM: the common old PC.
	BIOS Firmware = "bios"
	// UEFI is OVMF, which boots by PXE with drivers of its own.
	UEFI Firmware = "uefi"
)

// ParseFirmware reads a firmware's name.
func ParseFirmware(s string) (Firmware, error) {
	switch f := Firmware(s); f {
	case BIOS, UEFI:
		return f, nil
	}
	return "", fmt.Errorf("no firmware %q; there are bios and uefi", s)
}

// Medium is what a boot image is put into a machine as.
type Medium string

const (
	// HardDisk is a disk on the machine's SATA controller.
	HardDisk Medium = "disk"
	// CD is a disc in a drive on the same controller.
	CD Medium = "cd"
	// Stick is a USB stick.
	Stick Medium = "stick"
)

// bootDevices are QEMU's devices for the media. The image is never written.
var bootDevices = map[Medium][]string{
	HardDisk: {"-device", "ide-hd,drive=boot0,bootindex=1"},
	CD:       {"-device", "ide-cd,drive=boot0,bootindex=1"},
	Stick:    {"-device", "qemu-xhci", "-device", "usb-storage,drive=boot0,bootindex=1"},
}

// Config is one machine. A machine with a Kernel boots it directly, one with
// an Image boots that, and one with neither boots from the network.
type Config struct {
	Name     string   // letters, digits, dashes; names its files
	MAC      string   // of its only network card
	MemoryMB int      // MiB
	CPUs     int      // 0 is 1
	Firmware Firmware // "" is BIOS
	NIC      string   // QEMU device name: virtio-net-pci ("" too), e1000, e1000e, rtl8139 ...

	Kernel string // file, or "" to boot from the network
	Initrd string // file, with a Kernel
	Append string // kernel command line, with a Kernel

	Image  string // raw image file to boot, "" is none
	Medium Medium // of an Image

	Disk    string // raw image file, "" is no disk
	LabPort bool   // give it the port of package labport

	Dir       string // for its logs and firmware variables; absolute
	SocketDir string // for its sockets; absolute and short
}

// sockets of a machine, in SocketDir.
const (
	netSuffix     = ".net"
	qmpSuffix     = ".qmp"
	consoleSuffix = ".con"
	labSuffix     = ".lab"
)

// NetSocket is where the switch listens for this machine.
func (c Config) NetSocket() string { return c.socket(netSuffix) }

// QMPSocket is where Start listens for QEMU's control connection.
func (c Config) QMPSocket() string { return c.socket(qmpSuffix) }

// ConsoleSocket is where QEMU offers the serial console to one client.
func (c Config) ConsoleSocket() string { return c.socket(consoleSuffix) }

// LabSocket is where QEMU offers the lab port.
func (c Config) LabSocket() string { return c.socket(labSuffix) }

// ConsoleLog is the file with everything the serial console said.
func (c Config) ConsoleLog() string { return filepath.Join(c.Dir, c.Name+".console") }

// QEMULog is the file with what QEMU itself said.
func (c Config) QEMULog() string { return filepath.Join(c.Dir, c.Name+".qemu") }

// vars is the machine's own copy of the UEFI variables.
func (c Config) vars() string { return filepath.Join(c.Dir, c.Name+".vars") }

func (c Config) socket(suffix string) string { return filepath.Join(c.SocketDir, c.Name+suffix) }

var nameForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9-]{0,30}$`)

// Validate reports every fault of the configuration.
func (c Config) Validate() error {
	var l fault.List
	if !nameForm.MatchString(c.Name) {
		l.Addf("name %q is not 1 to 31 letters, digits and dashes", c.Name)
	}
	if _, err := vswitch.ParseMAC(c.MAC); err != nil {
		l.Addf("MAC %w", err)
	}
	if c.MemoryMB < 32 || c.MemoryMB > 1<<20 {
		l.Addf("memory of %d MiB is not within 32 and 1048576", c.MemoryMB)
	}
	if c.CPUs < 0 || c.CPUs > 64 {
		l.Addf("%d CPUs are not within 1 and 64", c.CPUs)
	}
	if _, err := ParseFirmware(string(c.firmware())); err != nil {
		l.Add(err)
	}
	if romNames[c.nic()] == "" {
		l.Addf("no network card %q with an iPXE ROM; there are %s", c.NIC, strings.Join(NICs(), ", "))
	}
	if c.Kernel == "" && (c.Initrd != "" || c.Append != "") {
		l.Add(errors.New("an initrd or kernel arguments without a kernel"))
	}
	if (c.Image != "") != (bootDevices[c.Medium] != nil) || c.Image != "" && c.Kernel != "" {
		l.Addf("image %q as medium %q: an image needs one of %s, %s and %s, and no kernel", c.Image, c.Medium, HardDisk, CD, Stick)
	}
	if !filepath.IsAbs(c.Dir) || !filepath.IsAbs(c.SocketDir) {
		l.Addf("folders %q and %q must be absolute", c.Dir, c.SocketDir)
	}
	if s := c.socket(consoleSuffix); len(s) > vswitch.MaxSocketPath {
		l.Addf("socket path %s has %d bytes, %d are possible", s, len(s), vswitch.MaxSocketPath)
	}
	return l.Err(fault.Usage, "check machine", c.Name, "")
}

func (c Config) networkBoot() bool { return c.Kernel == "" && c.Image == "" }

func (c Config) firmware() Firmware {
	if c.Firmware == "" {
		return BIOS
	}
	return c.Firmware
}

func (c Config) nic() string {
	if c.NIC == "" {
		return "virtio-net-pci"
	}
	return c.NIC
}

// Argv is the command line, program first. It depends on nothing but c and h.
func (c Config) Argv(h Host) []string {
	a := []string{h.QEMU, "-name", c.Name, "-no-user-config", "-nodefaults",
		"-uuid", c.uuid(),
		// Without graphics SeaBIOS and iPXE speak on the serial port.
		"-display", "none", "-vga", "none",
		"-machine", "q35,graphics=off,accel=" + h.accel(),
		"-cpu", h.cpu(),
		"-smp", fmt.Sprint(max(c.CPUs, 1)),
		"-m", fmt.Sprint(c.MemoryMB),
		"-rtc", "base=utc",
		"-device", "virtio-rng-pci",
		"-chardev", "socket,id=qmp,path=" + comma(c.QMPSocket()) + ",server=off",
		"-mon", "chardev=qmp,mode=control",
		"-chardev", "socket,id=con,path=" + comma(c.ConsoleSocket()) + ",server=on,wait=off,logfile=" + comma(c.ConsoleLog()) + ",logappend=on",
		"-serial", "chardev:con",
		"-netdev", "stream,id=n0,server=off,addr.type=unix,addr.path=" + comma(c.NetSocket()),
	}
	nic := c.nic() + ",netdev=n0,mac=" + c.MAC
	if romName(c) == "" {
		nic += ",romfile="
	}
	if c.networkBoot() {
		// A machine that finds no server tries again, as a PC does
		// whose owner presses the button.
		nic += ",bootindex=1"
		a = append(a, "-boot", "strict=on,reboot-timeout=3000")
	}
	a = append(a, "-device", nic)
	if c.firmware() == UEFI {
		a = append(a,
			"-drive", "if=pflash,format=raw,readonly=on,file="+comma(h.OVMFCode),
			"-drive", "if=pflash,format=raw,file="+comma(c.vars()))
	}
	if c.Kernel != "" {
		a = append(a, "-kernel", c.Kernel)
		if c.Initrd != "" {
			a = append(a, "-initrd", c.Initrd)
		}
		if c.Append != "" {
			a = append(a, "-append", c.Append)
		}
	}
	if c.Image != "" {
		access := "snapshot=on"
		if c.Medium == CD {
			access = "readonly=on"
		}
		a = append(a, "-drive", "if=none,id=boot0,format=raw,"+access+",file="+comma(c.Image))
		a = append(a, bootDevices[c.Medium]...)
	}
	if c.Disk != "" {
		a = append(a,
			"-drive", "if=none,id=disk0,format=raw,discard=unmap,file="+comma(c.Disk),
			"-device", "virtio-blk-pci,drive=disk0")
	}
	if c.LabPort {
		a = append(a,
			"-chardev", "socket,id=lab,path="+comma(c.LabSocket())+",server=on,wait=off",
			"-device", "virtio-serial-pci",
			"-device", "virtserialport,chardev=lab,name="+labport.PortName)
	}
	return a
}

// uuid is a machine's SMBIOS UUID, which PXE sends along: made from its MAC,
// so that it is the same each time.
func (c Config) uuid() string {
	return "6d6f7369-6d67-4c61-8000-" + strings.ReplaceAll(c.MAC, ":", "")
}

// comma doubles commas, which QEMU's option syntax needs inside values.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }
