package media

import (
	"context"
	"debug/pe"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mosimg/internal/bootargs"
	"mosimg/internal/imageset"
	"mosimg/qemu-tests/vm"
	"mosimg/qemu-tests/vswitch"
)

// bootTime is ample for an emulated machine beside other work.
const bootTime = 4 * time.Minute

// TestBoot boots every medium in every way that a PC boots it. A machine has
// booted when our agent speaks on its console and names the head that the
// medium was built for.
func TestBoot(t *testing.T) {
	images := os.Getenv("MOSIMG_MEDIA")
	if os.Getenv("MOSIMG_VM") != "1" || images == "" {
		t.Skip("boots virtual machines: set MOSIMG_VM=1 and MOSIMG_MEDIA=DIR (from mosimg build --outputs uki,disk,iso --head URL --ca PIN)")
	}
	set, err := imageset.Open(images)
	if err != nil {
		t.Fatal(err)
	}
	abs, err := filepath.Abs(images)
	if err != nil {
		t.Fatal(err)
	}
	set.Dir = abs
	head := headOf(t, set.Path(imageset.UKI))
	stick := largerStick(t, set.Path(imageset.Disk))
	for _, tc := range []struct {
		name     string
		firmware vm.Firmware
		medium   vm.Medium
		file     string
	}{
		{"BIOS from CD", vm.BIOS, vm.CD, set.Path(imageset.ISO)},
		{"BIOS from disk", vm.BIOS, vm.HardDisk, set.Path(imageset.Disk)},
		{"BIOS from a larger stick", vm.BIOS, vm.Stick, stick},
		{"BIOS from a stick with the ISO", vm.BIOS, vm.Stick, set.Path(imageset.ISO)},
		{"UEFI from CD", vm.UEFI, vm.CD, set.Path(imageset.ISO)},
		{"UEFI from disk", vm.UEFI, vm.HardDisk, set.Path(imageset.Disk)},
		{"UEFI from a larger stick", vm.UEFI, vm.Stick, stick},
		{"UEFI from a stick with the ISO", vm.UEFI, vm.Stick, set.Path(imageset.ISO)},
		{"UEFI unified image", vm.UEFI, "", set.Path(imageset.UKI)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := vm.Config{Name: "n1", MAC: "52:54:00:77:02:01", MemoryMB: 512, Firmware: tc.firmware, Image: tc.file, Medium: tc.medium}
			if tc.medium == "" {
				c.Image, c.Kernel = "", tc.file // the firmware itself starts it, as an EFI program
			}
			boot(t, c, head)
		})
	}
}

// headOf is the head that a unified image tells its machine.
func headOf(t *testing.T, name string) string {
	t.Helper()
	f, err := pe.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmdline, err := f.Section(".cmdline").Data()
	if err != nil {
		t.Fatal(err)
	}
	head := bootargs.Parse(strings.TrimRight(string(cmdline), "\x00")).Head
	if head == "" {
		t.Fatalf("%s names no head: build it with --head and --ca", name)
	}
	return head
}

// largerStick is the disk image as it lies on a stick of 1 GiB: the copy of
// its partition table is not at the stick's end.
func largerStick(t *testing.T, disk string) string {
	t.Helper()
	in, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	name := filepath.Join(t.TempDir(), "stick")
	out, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Truncate(1 << 30); err != nil {
		t.Fatal(err)
	}
	return name
}

func boot(t *testing.T, c vm.Config, head string) {
	dir, err := os.MkdirTemp("", "media") // short, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c.Dir, c.SocketDir = dir, dir
	h, err := vm.FindHost([]vm.Config{c})
	if err != nil {
		t.Fatal(err)
	}
	s, err := vswitch.New(vswitch.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Listen(c.Name, c.NetSocket(), vswitch.Link{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), bootTime)
	defer cancel()
	began := time.Now()
	m, err := vm.Start(ctx, h, c, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.PowerOff()
	if err := await(ctx, m, `agent: level=INFO msg="criu works"`, head); err != nil {
		t.Fatalf("%v; console:\n%s", err, strings.Join(vm.Tail(c.ConsoleLog(), 30), "\n"))
	}
	t.Logf("the agent spoke after %.1f s", time.Since(began).Seconds())
}

// await waits until a machine's console has said all of the texts.
func await(ctx context.Context, m *vm.Machine, texts ...string) error {
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	for {
		said, err := os.ReadFile(m.ConsoleLog())
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		missing := ""
		for _, text := range texts {
			if !strings.Contains(string(said), text) {
				missing = text
			}
		}
		if missing == "" {
			return nil
		}
		select {
		case <-look.C:
		case <-m.Done():
			return m.Err()
		case <-ctx.Done():
			return fmt.Errorf("the machine has not said %q: %w", missing, ctx.Err())
		}
	}
}
