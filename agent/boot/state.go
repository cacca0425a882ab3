package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// stateLabel is the ext4 label by which we know our own state disk.
const stateLabel = "mosimg-state"

// deviceWait is how long a head waits for its state disk to appear.
const deviceWait = 10 * time.Second

// content is what a block device holds, as far as we need to know.
type content int

const (
	blank   content = iota // nothing at all: we may format it
	ours                   // our state
	foreign                // anything else: never touched
)

// edge is how much of each end of a device must be zero for it to count as
// blank. Partition tables, file systems and swap sign at the start; RAID,
// GPT's copy and ZFS at the end.
const edge = 1 << 20

// Offsets from Documentation/filesystems/ext4/super.rst: the superblock is at
// 1024; the magic at 0x38 in it, the label (16 bytes) at 0x78.
const (
	superBlock = 1024
	magicAt    = superBlock + 0x38
	labelAt    = superBlock + 0x78
	extMagic   = 0xEF53
)

// classify says what is on a device, from its first and its last mebibyte.
// For anything foreign it also says what that looks like.
func classify(head, tail []byte) (content, string) {
	if len(head) >= labelAt+16 && binary.LittleEndian.Uint16(head[magicAt:]) == extMagic {
		label := string(bytes.TrimRight(head[labelAt:labelAt+16], "\x00"))
		if label == stateLabel {
			return ours, ""
		}
		return foreign, fmt.Sprintf("an ext file system labelled %q", label)
	}
	switch {
	case len(head) >= 512 && head[510] == 0x55 && head[511] == 0xAA:
		return foreign, "a partition table or boot sector"
	case !zero(head):
		return foreign, "data in its first MiB"
	case !zero(tail):
		return foreign, "data in its last MiB"
	}
	return blank, ""
}

func zero(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }

func inspect(dev string) (content, string, error) {
	f, err := os.Open(dev)
	if err != nil {
		return foreign, "", err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Mode()&os.ModeDevice == 0 || fi.Mode()&os.ModeCharDevice != 0 {
		return foreign, "", errors.New("not a block device")
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return foreign, "", err
	}
	const smallest = 16 << 20
	if size < smallest {
		return foreign, "", fmt.Errorf("%d bytes are too small for a state disk, give it %d or more", size, smallest)
	}
	head, tail := make([]byte, edge), make([]byte, edge)
	if _, err := f.ReadAt(head, 0); err != nil {
		return foreign, "", err
	}
	if _, err := f.ReadAt(tail, size-edge); err != nil {
		return foreign, "", err
	}
	c, what := classify(head, tail)
	return c, what, nil
}

// mountState gives a head the place for what must survive a reboot: its state
// disk, or memory with a warning. A disk that is neither blank nor ours is
// not touched.
func (m *machine) mountState() error {
	if m.args.Role != "head" {
		return nil
	}
	if err := os.MkdirAll(StateDir, 0o700); err != nil {
		return err
	}
	if m.args.State == "" {
		m.log.Warn("no mosimg.state: nodes, approvals and the cluster's CA are in memory and lost at power-off")
		return mountTmpState()
	}
	if err := m.mountDisk(m.args.State); err != nil {
		m.log.Error("state disk not used; the head's state is in memory and lost at power-off", "disk", m.args.State, "why", err)
		return mountTmpState()
	}
	return nil
}

func mountTmpState() error {
	return unix.Mount("tmpfs", StateDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700")
}

func (m *machine) mountDisk(dev string) error {
	if m.mods != nil {
		plan, _ := m.mods.list.Named("ext4")
		m.mods.run(plan)
	}
	if err := m.awaitDevice(dev); err != nil {
		return err
	}
	what, like, err := inspect(dev)
	if err != nil {
		return fault.New(fault.Environment, "read state disk", dev, err, "")
	}
	switch what {
	case foreign:
		return fault.New(fault.Refused, "use state disk", dev, "it holds "+like, "give a blank disk, or wipe this one by hand")
	case blank:
		mkfs := firstOf("/usr/sbin/mke2fs", "/sbin/mke2fs", "/usr/sbin/mkfs.ext4", "/sbin/mkfs.ext4")
		if mkfs == "" {
			return fault.New(fault.Environment, "format state disk", dev, "there is no mke2fs in the head archive", "")
		}
		m.log.Info("formatting blank state disk", "disk", dev)
		if err := m.command(mkfs, "-q", "-t", "ext4", "-L", stateLabel, dev); err != nil {
			return fault.New(fault.Environment, "format state disk", dev, err, "")
		}
	case ours:
		// Replaying the journal is the kernel's work; this mends what a dying disk broke.
		if fsck := firstOf("/usr/sbin/e2fsck", "/sbin/e2fsck"); fsck != "" {
			if err := m.command(fsck, "-p", dev); err != nil {
				m.log.Warn("e2fsck", "disk", dev, "why", err)
			}
		}
	}
	if err := unix.Mount(dev, StateDir, "ext4", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, ""); err != nil {
		return fault.New(fault.Environment, "mount state disk", dev, err, "its file system may be broken: run e2fsck on it by hand")
	}
	m.stateMounted = true
	return nil
}

func (m *machine) awaitDevice(dev string) error {
	for began := time.Now(); !exists(dev); time.Sleep(100 * time.Millisecond) {
		if time.Since(began) > deviceWait {
			return fault.New(fault.NotFound, "find state disk", dev, fmt.Sprintf("no such device after %v", deviceWait), "check mosimg.state")
		}
		if m.mods != nil {
			m.mods.hardware("/sys/devices")
		}
	}
	return nil
}

// command runs a program of the image to its end, its output on the consoles.
// It may only be used before serve: it collects children by itself.
func (m *machine) command(argv ...string) error {
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{Dir: "/", Env: environ, Files: []uintptr{null.Fd(), w.Fd(), w.Fd()}})
	w.Close()
	if err != nil {
		return fmt.Errorf("start %s: %w", argv[0], err)
	}
	var said []string
	lines(r, func(line []byte) {
		fmt.Fprintf(m.out, "%s: %s\n", argv[0], line)
		said = append(said, string(line))
	})
	var ws syscall.WaitStatus
	for {
		if _, err = syscall.Wait4(pid, &ws, 0, nil); !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err == nil && ws.ExitStatus() != 0 {
		err = fmt.Errorf("%s: %s: %s", argv[0], statusText(ws), strings.Join(said, "; "))
	}
	return err
}
