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
func powerOn(sw *box, uefi bool) *pc {
	t := sw.t
	t.Helper()
	p := &pc{sw: sw, dir: t.TempDir(), uefi: uefi, ended: make(chan struct{})}
	nic := "virtio-net-pci,netdev=n,mac=" + pcMAC + ",bootindex=1"
	args := []string{"-nodefaults", "-display", "none", "-m", "640", "-machine", "q35,graphics=off,accel=kvm:tcg", "-cpu", "max,la57=off",
		"-device", "virtio-rng-pci", "-serial", "file:" + p.console(), "-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no",
		"-object", "filter-dump,id=dump,netdev=n,file=" + p.capture()}
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

// Real firmware beside a real DHCP server: a PC in an office, with the head as
// a guest of that network, from power-on to membership.
func TestVMJoinsBesideDnsmasq(t *testing.T) {
	images := os.Getenv("MOSIMG_IMAGES")
	if os.Getenv("MOSIMG_VM") != "1" || images == "" {
		t.Skip("boots virtual machines: set MOSIMG_VM=1 and MOSIMG_IMAGES=DIR (an image set from mosimg build)")
	}
	need(t, "qemu-system-x86_64")
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
			sw, boxes := lan(t, "h0", "10.77.0.1/24", "router")
			boxes[0].configure("10.77.0.66/24")
			boxes[0].dnsmasq("--dhcp-authoritative")
			cfg := config(t, "h0")
			cfg.Images, cfg.DHCP, cfg.Adopt = images, DHCPAuto, time.Hour
			r := start(t, cfg)
			p := powerOn(sw, tt.uefi)
			began := time.Now()
			for !strings.Contains(r.log.String(), "stage=member mac="+pcMAC) {
				select {
				case <-p.ended:
					t.Fatal("the machine is off")
				case <-time.After(200 * time.Millisecond):
				}
				if time.Since(began) > 8*time.Minute {
					t.Fatal("the machine does not join")
				}
			}
			t.Logf("a member after %.0f s", time.Since(began).Seconds())
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
