package pxe

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mosimg/pxe/imagetest"
)

// Programs of distributions as the other side: they read the protocols in
// their own way.

func need(t *testing.T, program string) string {
	t.Helper()
	needNetwork(t)
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is not installed", program)
	}
	return path
}

// until runs a program inside the machine until its output has the text.
func (b *box) until(text, program string, args ...string) {
	b.t.Helper()
	b.in(func() {
		ctx, cancel := context.WithTimeout(b.t.Context(), 30*time.Second)
		defer cancel()
		out := new(logBuffer)
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			b.t.Error(err)
			return
		}
		ended := make(chan struct{})
		go func() { cmd.Wait(); close(ended) }()
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for running := true; running && !strings.Contains(out.String(), text); {
			select {
			case <-ended:
				running = false
			case <-tick.C:
			}
		}
		cancel()
		<-ended
		if !strings.Contains(out.String(), text) {
			b.t.Errorf("%s did not say %q:\n%s", program, text, out.String())
		}
	})
}

func TestDhclient(t *testing.T) {
	dhclient := need(t, "dhclient")
	b := cable(t, "h0", "10.77.0.1/24")
	start(t, config(t, "h0"))
	dir := t.TempDir()
	for range 2 { // the second time it asks for the address that it had
		b.until("bound to 10.77.0.128", dhclient, "-1", "-d", "-v", "-sf", "/bin/true",
			"-lf", filepath.Join(dir, "leases"), "-pf", filepath.Join(dir, "pid"), b.nic)
	}
}

func TestUdhcpc(t *testing.T) {
	udhcpc := need(t, "udhcpc")
	b := cable(t, "h0", "10.77.0.1/24")
	start(t, config(t, "h0"))
	b.until("lease of 10.77.0.128 obtained", udhcpc, "-f", "-n", "-q", "-i", b.nic, "-s", "/bin/true")
	// It may wish for a free address, and gets no one else's.
	b.until("lease of 10.77.0.128 obtained", udhcpc, "-f", "-n", "-q", "-i", b.nic, "-s", "/bin/true", "-r", "10.77.0.1")
}

func TestTFTPProgram(t *testing.T) {
	tftp := need(t, "tftp")
	b := cable(t, "h0", "10.77.0.1/24")
	cfg := config(t, "h0")
	files := imagetest.Files("one")
	files["boot/ipxe.efi"] = strings.Repeat("0123456789", 20_000)
	imagetest.Make(t, cfg.Images, "amd64", files)
	start(t, cfg)
	b.configure("10.77.0.200/24")
	got := filepath.Join(t.TempDir(), "got")
	b.in(func() {
		if out, err := exec.Command(tftp, "10.77.0.1", "-m", "binary", "-c", "get", "ipxe.efi", got).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		out, _ := exec.Command(tftp, "10.77.0.1", "-m", "binary", "-c", "get", "../vmlinuz", got+"2").CombinedOutput()
		if !strings.Contains(string(out), "file not found") {
			t.Errorf("get ../vmlinuz: %s", out)
		}
	})
	if data, err := os.ReadFile(got); err != nil || string(data) != files["boot/ipxe.efi"] {
		t.Errorf("got %d bytes, %v", len(data), err)
	}
}
