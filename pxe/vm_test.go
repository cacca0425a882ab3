package pxe

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"mosimg/internal/api"
)

// pc is a virtual machine on a switch that boots from its network card.
type pc struct {
	sw     *box
	dir    string
	uefi   bool
	ended  chan struct{}
	cancel context.CancelFunc
}

const pcMAC = "52:54:00:77:99:01"

// powerOn starts QEMU inside the switch's namespace, with a tap device as the
// cable. UEFI uses OVMF's own network driver, so that its PXE client is EDK2's;
// a BIOS has QEMU's ROM, which is iPXE.
func powerOn(sw *box, uefi bool, more ...string) *pc {
	t := sw.t
	t.Helper()
	p := &pc{sw: sw, dir: t.TempDir(), uefi: uefi, ended: make(chan struct{})}
	args := append([]string{"-nodefaults", "-display", "none", "-m", "640", "-machine", "q35,graphics=off,accel=kvm:tcg", "-cpu", "max,la57=off",
		"-device", "virtio-rng-pci", "-serial", "file:" + p.console(), "-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no",
		"-object", "filter-dump,id=dump,netdev=n,file=" + p.capture()}, more...)
	nic := "virtio-net-pci,netdev=n,mac=" + pcMAC + ",bootindex=1"
	if uefi {
		const code, vars = "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
		b, err := os.ReadFile(vars)
		if err != nil {
			t.Skipf("needs OVMF: %v", err)
		}
		own := filepath.Join(p.dir, "vars.fd")
		if err := os.WriteFile(own, b, 0o600); err != nil {
			t.Fatal(err)
		}
		nic += ",romfile="
		args = append(args, "-drive", "if=pflash,format=raw,readonly=on,file="+code, "-drive", "if=pflash,format=raw,file="+own)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.cancel = cancel
	sw.in(func() {
		ip(t, "tuntap", "add", "tap0", "mode", "tap")
		ip(t, "link", "set", "tap0", "master", sw.nic)
		ip(t, "link", "set", "tap0", "up")
	})
	go func() {
		defer close(p.ended)
		// The thread lives as long as the machine, which dies with it: no
		// machine outlives a test that was killed.
		sw.in(func() {
			cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append(args, "-device", nic)...)
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			out, err := cmd.CombinedOutput()
			if ctx.Err() == nil {
				t.Errorf("QEMU ended: %v\n%s", err, out)
			}
		})
	}()
	t.Cleanup(func() {
		p.cancel()
		<-p.ended
		if b, err := os.ReadFile(p.console()); err == nil && t.Failed() {
			t.Logf("the machine's console:\n%s", b[max(0, len(b)-8000):])
		}
	})
	return p
}

func (p *pc) console() string { return filepath.Join(p.dir, "console") }
func (p *pc) capture() string { return filepath.Join(p.dir, "capture.pcap") }

// await waits for something that the machine causes.
func (p *pc) await(done func() bool, otherwise string) {
	t := p.sw.t
	t.Helper()
	began := time.Now()
	for !done() {
		select {
		case <-p.ended:
			t.Fatal("the machine is off")
		case <-time.After(200 * time.Millisecond):
		}
		if time.Since(began) > 5*time.Minute {
			t.Fatal(otherwise)
		}
	}
	t.Logf("after %.0f s", time.Since(began).Seconds())
}

func vmImages(t *testing.T) string {
	images := os.Getenv("MOSIMG_IMAGES")
	if os.Getenv("MOSIMG_VM") != "1" || images == "" {
		t.Skip("boots virtual machines: set MOSIMG_VM=1 and MOSIMG_IMAGES=DIR (an image set from mosimg build)")
	}
	need(t, "qemu-system-x86_64")
	return images
}

// office is a network with a router that runs dnsmasq, and the head as a guest.
func office(t *testing.T, images string, adopt time.Duration) (*running, *box) {
	t.Helper()
	sw, boxes := lan(t, "h0", "10.77.0.1/24", "router")
	boxes[0].configure("10.77.0.66/24")
	boxes[0].dnsmasq("--dhcp-authoritative")
	cfg := config(t, "h0")
	cfg.Images, cfg.DHCP, cfg.Adopt = images, DHCPAuto, adopt
	return start(t, cfg), sw
}

// bootSector writes a word to the serial port and stops:
//
//	xor ax,ax; mov ds,ax; mov si,msg
//	next: lodsb; test al,al; jz stop; mov dx,0x3f8; out dx,al; jmp next
//	stop: hlt; jmp stop
//	msg:
const bootSector = "\x31\xc0\x8e\xd8\xbe\x15\x7c\xac\x84\xc0\x74\x06\xba\xf8\x03\xee\xeb\xf5\xf4\xeb\xfd" + ownDisk + "\x00"

const ownDisk = "booted from its own disk"

// A PC in that office that is set to boot from the network, and that nobody
// asked to join, goes on to what comes next in its boot order.
func TestVMStrangerGoesOn(t *testing.T) {
	images := vmImages(t)
	t.Run("BIOS", func(t *testing.T) {
		r, sw := office(t, images, 0)
		disk := filepath.Join(t.TempDir(), "disk")
		sector := make([]byte, 1<<20)
		copy(sector, bootSector)
		copy(sector[510:], "\x55\xaa")
		if err := os.WriteFile(disk, sector, 0o600); err != nil {
			t.Fatal(err)
		}
		p := powerOn(sw, false, "-drive", "if=none,id=d,format=raw,file="+disk, "-device", "virtio-blk-pci,drive=d,bootindex=2")
		p.await(func() bool {
			b, err := os.ReadFile(p.console())
			return err == nil && strings.Contains(string(b), ownDisk)
		}, "it does not get to its disk")
		if !strings.Contains(r.log.String(), "its own disk") {
			t.Error("the head's log does not say why")
		}
	})
	t.Run("UEFI", func(t *testing.T) {
		r, sw := office(t, images, 0)
		p := powerOn(sw, true)
		// After PXE comes HTTP boot. Firmware whose boot option ends with
		// success stops at its menu instead (UEFI 2.10 section 3.1.1).
		p.await(func() bool {
			_, after, left := strings.Cut(r.log.String(), "unknown machine is sent to its own disk")
			return left && strings.Contains(after, "vendor=HTTPClient")
		}, "the firmware does not go on to the next boot option")
	})
}

// Real firmware beside a real DHCP server: a PC in an office, with the head as
// a guest of that network, from power-on to membership.
func TestVMJoinsBesideDnsmasq(t *testing.T) {
	images := vmImages(t)
	for _, tt := range []struct {
		name string
		uefi bool
		// passes are the stages that the firmware must have gone through.
		passes []string
	}{
		{"BIOS", false, []string{"stage=offer mac=" + pcMAC + " boot=http", "mode=proxy", "stage=script"}},
		{"UEFI", true, []string{"stage=offer mac=" + pcMAC + " boot=snponly.efi mode=proxy", "stage=boot-server mac=" + pcMAC + " boot=snponly.efi", "stage=tftp", "stage=script"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, sw := office(t, images, time.Hour)
			p := powerOn(sw, tt.uefi)
			p.await(func() bool { return strings.Contains(r.log.String(), "stage=member mac="+pcMAC) }, "it does not join")
			for _, want := range tt.passes {
				if !strings.Contains(r.log.String(), want) {
					t.Errorf("no %q in the head's log", want)
				}
			}
			var recs []api.NodeRecord
			if err := r.admin().Get(t.Context(), api.PathNodes, &recs); err != nil || len(recs) != 1 || recs[0].State != api.Approved || !strings.HasPrefix(recs[0].Address, "10.77.0.7") && recs[0].Address != "10.77.0.80" {
				t.Errorf("records %+v, %v; want one member at an address from dnsmasq", recs, err)
			}
			if keep := os.Getenv("MOSIMG_KEEP"); keep != "" {
				if err := exec.Command("cp", p.capture(), filepath.Join(keep, tt.name+".pcap")).Run(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
