package vm

import (
	"bufio"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Host is what this computer has for running machines.
type Host struct {
	QEMU     string // qemu-system-x86_64
	KVM      bool   // /dev/kvm can be used
	ROMDir   string // iPXE ROMs
	OVMFCode string
	OVMFVars string // template, copied for each machine
	CPUs     int
}

// romNames are the iPXE ROMs that QEMU gives its cards. They serve BIOS and
// UEFI. Only when QEMU chooses the ROM by itself does it write the card's PCI
// id into it, without which the firmware ignores it: so no ROM is ever named
// on the command line, and these names only tell what has to be installed.
// QEMU has more cards; these are the ones that were booted from. Its pcnet
// stalls in the middle of a download by iPXE.
var romNames = map[string]string{
	"virtio-net-pci": "efi-virtio.rom",
	"e1000":          "efi-e1000.rom",
	"e1000e":         "efi-e1000e.rom",
	"rtl8139":        "efi-rtl8139.rom",
	"vmxnet3":        "efi-vmxnet3.rom",
}

// NICs are the network cards that machines can have.
func NICs() []string { return slices.Sorted(maps.Keys(romNames)) }

// Where Debian 12 and 13 (and their kin) keep the firmware.
var (
	romDirs   = []string{"/usr/lib/ipxe/qemu", "/usr/share/ipxe/qemu", "/usr/share/qemu"}
	ovmfFiles = [][2]string{
		{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},
		{"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"},
		{"/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"},
	}
)

// FindHost looks for all that the machines need, and reports everything that
// is missing with the Debian package that has it. MOSIMG_NO_KVM=1 in the
// environment forces emulation.
func FindHost(machines []Config) (Host, error) {
	h := Host{CPUs: runtime.NumCPU(), KVM: os.Getenv("MOSIMG_NO_KVM") != "1" && usableKVM()}
	var missing fault.List
	var packages []string
	lack := func(what, pkg string) {
		missing.Addf("%s is missing (Debian package %s)", what, pkg)
		if !slices.Contains(packages, pkg) {
			packages = append(packages, pkg)
		}
	}
	var err error
	if h.QEMU, err = exec.LookPath("qemu-system-x86_64"); err != nil {
		lack("qemu-system-x86_64", "qemu-system-x86")
	}
	for _, d := range romDirs {
		if isFile(filepath.Join(d, "efi-virtio.rom")) {
			h.ROMDir = d
			break
		}
	}
	for _, f := range ovmfFiles {
		if isFile(f[0]) && isFile(f[1]) {
			h.OVMFCode, h.OVMFVars = f[0], f[1]
			break
		}
	}
	told := make(map[string]bool)
	for _, c := range machines {
		what, pkg := "", ""
		switch rom := romName(c); {
		case c.firmware() == UEFI && h.OVMFCode == "":
			what, pkg = "the UEFI firmware OVMF", "ovmf"
		case rom != "" && !isFile(filepath.Join(h.ROMDir, rom)):
			what, pkg = "the iPXE ROM "+rom, "ipxe-qemu"
		}
		if what != "" && !told[what] {
			told[what] = true
			lack(what, pkg)
		}
	}
	return h, missing.Err(fault.Environment, "find", "the lab's programs", "apt-get install "+strings.Join(packages, " "))
}

// romName is the option ROM that a machine needs; "" is none. Only a boot from
// the network needs one, and OVMF has a virtio driver of its own.
func romName(c Config) string {
	if !c.networkBoot() || (c.firmware() == UEFI && c.nic() == "virtio-net-pci") {
		return ""
	}
	return romNames[c.nic()]
}

func (h Host) accel() string {
	if h.KVM {
		return "kvm:tcg"
	}
	return "tcg"
}

// cpu is the processor model. Emulated five-level page tables cost every
// page walk and give a small guest nothing.
func (h Host) cpu() string {
	if h.KVM {
		return "host"
	}
	return "max,la57=off"
}

func usableKVM() bool {
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

func isFile(name string) bool {
	st, err := os.Stat(name)
	return err == nil && st.Mode().IsRegular()
}

// overheadMB is what a QEMU process takes beside its guest's memory: its own
// pages, firmware, and the translation cache of emulation.
const overheadMB = 128

// CheckMemory refuses machines that would not fit into this computer's
// memory beside what runs now.
func CheckMemory(machines []Config) error {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return fault.New(fault.Environment, "check memory", "", err, "")
	}
	defer f.Close()
	avail, err := availableMB(bufio.NewScanner(f))
	if err != nil {
		return fault.New(fault.Environment, "check memory", "/proc/meminfo", err, "")
	}
	return checkMemory(machines, avail)
}

func checkMemory(machines []Config, availMB int) error {
	need := 0
	for _, c := range machines {
		need += c.MemoryMB + overheadMB
	}
	if need > availMB {
		return fault.New(fault.Environment, "start", fmt.Sprintf("%d machines", len(machines)),
			fmt.Sprintf("they need %d MiB of memory, %d MiB are available", need, availMB),
			"ask for fewer machines with -n, or smaller ones with --memory")
	}
	return nil
}

func availableMB(s *bufio.Scanner) (int, error) {
	for s.Scan() {
		if rest, ok := strings.CutPrefix(s.Text(), "MemAvailable:"); ok {
			kb, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
			return kb / 1024, err
		}
	}
	return 0, fmt.Errorf("no MemAvailable in it")
}
