// Package lab is a whole cluster on one computer: a userspace switch, a head
// in a virtual machine, and diskless nodes that boot from it over the
// network. It needs no root.
//
// The head boots the node's own kernel and initramfs directly, with the head
// archive and a small configuration behind them, as a head on real hardware
// boots from its disk. The nodes have nothing but firmware and a network
// card. Everything is asked through the front door: `mosimg node` and
// `mosmon`, run on the head.
//
// A lab leaves nothing behind: no process, no socket, no folder. Only when it
// fails are its consoles, its capture and its command lines kept, and their
// folder is named.
package lab

import (
	"fmt"
	"path/filepath"
	"runtime"
	"time"

	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/qemu-tests/vm"
	"mosimg/qemu-tests/vswitch"
)

const (
	// HeadName is the head's machine.
	HeadName = "head"
	// HeadAddress is where the head is on the lab's network.
	HeadAddress = "10.77.0.1/24"

	// The head holds its image, the nodes' image set and a root file system
	// in memory; a node holds its image, and what it unpacks from it.
	defaultHeadMB = 768
	defaultNodeMB = 512
	// stateDiskSize is the head's state disk, sparse.
	stateDiskSize = 512 << 20
	// maxNodes is where the lab's own address plan ends.
	maxNodes = 99
)

// NodeConfig is one diskless machine. The zero value is a BIOS machine of
// the default size on a perfect link.
type NodeConfig struct {
	Name     string       // "" is n1, n2 ... by its place in the list
	Firmware vm.Firmware  // "" is BIOS
	MemoryMB int          // 0 is 512
	CPUs     int          // 0 is 1
	NIC      string       // "" is virtio-net-pci
	Link     vswitch.Link // zero is unlimited
	// Args is a kernel command line. With it the machine is given kernel
	// and initramfs by QEMU and boots without firmware and network: what a
	// network boot is compared with. "" boots by PXE.
	Args string
}

// Config is a lab. Images is needed, everything else has a default.
type Config struct {
	Images   string // image set: the output folder of mosimg build
	Dir      string // state folder, made when missing; "" is a temporary one
	Nodes    []NodeConfig
	HeadMB   int          // MiB, 0 is 768
	HeadCPUs int          // 0 is 1
	Link     vswitch.Link // of the head
	Cluster  []byte       // cluster.yaml for the head, nil is the head's own defaults
	Keep     bool         // keep consoles, capture and command lines on success, too
}

// Nodes is n machines of one kind.
func Nodes(n int, one NodeConfig) []NodeConfig {
	all := make([]NodeConfig, n)
	for i := range all {
		all[i] = one
	}
	return all
}

// NodeMAC is the address of the lab's i-th node, from 1.
func NodeMAC(i int) string { return mac(1, i) }

// headMAC is the head's address. It is no constant: this program is on the
// lab's heads too, and the search of images for what only a head may know
// must not find it there.
func headMAC() string { return mac(0, 1) }

func mac(kind, i int) string { return fmt.Sprintf("52:54:00:77:%02x:%02x", kind, i) }

// plan is what a Config means: every machine in full, the head first.
type plan struct {
	machines []vm.Config
	links    []vswitch.Link
}

// newPlan lays a lab out in dir. It is pure: dry runs print it.
func newPlan(c Config, kernel, dir, sockets string) (plan, error) {
	var l fault.List
	if len(c.Nodes) > maxNodes {
		l.Addf("%d nodes are more than %d", len(c.Nodes), maxNodes)
	}
	var p plan
	add := func(m vm.Config, link vswitch.Link) {
		m.Dir, m.SocketDir = dir, sockets
		for _, other := range p.machines {
			if other.Name == m.Name {
				l.Addf("two machines are called %s", m.Name)
			}
		}
		l.Add(m.Validate())
		p.machines, p.links = append(p.machines, m), append(p.links, link)
	}
	add(vm.Config{
		Name: HeadName, MAC: headMAC(),
		MemoryMB: orDefault(c.HeadMB, defaultHeadMB), CPUs: c.HeadCPUs,
		Kernel: kernel, Initrd: filepath.Join(dir, headInitrd), Append: headArgs,
		Disk: filepath.Join(dir, stateDisk), LabPort: true,
	}, c.Link)
	for i, n := range c.Nodes {
		if n.Name == "" {
			n.Name = fmt.Sprintf("n%d", i+1)
		}
		m := vm.Config{
			Name: n.Name, MAC: NodeMAC(i + 1), Firmware: n.Firmware,
			MemoryMB: orDefault(n.MemoryMB, defaultNodeMB), CPUs: n.CPUs, NIC: n.NIC,
		}
		if n.Args != "" {
			m.Kernel, m.Initrd, m.Append = kernel, filepath.Join(filepath.Dir(kernel), imageset.Initramfs), n.Args
		}
		add(m, n.Link)
	}
	return p, l.Err(fault.Usage, "lay out lab", "", "")
}

// headArgs is the head's kernel command line (internal/bootargs).
const headArgs = "console=ttyS0 mosimg.role=head mosimg.address=" + HeadAddress + " mosimg.state=/dev/vda mosimg.debug"

func orDefault(n, def int) int {
	if n == 0 {
		return def
	}
	return n
}

// limits are how long things may take. Emulation is 10 to 20 times slower
// than hardware, and the machines share this computer's processors.
type limits struct {
	head  time.Duration // power on until the head answers
	first time.Duration // power on until a machine's first frame
	join  time.Duration // power on until it is a member, or pending
	boots int           // machines that may boot at once
}

func limitsFor(h vm.Host) limits {
	if h.KVM {
		return limits{head: time.Minute, first: 30 * time.Second, join: 2 * time.Minute, boots: max(2*runtime.NumCPU(), 4)}
	}
	return limits{head: 4 * time.Minute, first: 2 * time.Minute, join: 6 * time.Minute, boots: max(runtime.NumCPU(), 1)}
}
