package pxe

import (
	"context"
	"errors"
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

// A client that was given an address which somebody took meanwhile declines it
// and gets another one.
func TestUdhcpcDeclines(t *testing.T) {
	udhcpc := need(t, "udhcpc")
	_, boxes := lan(t, "h0", "10.77.0.1/24", "printer", "pc")
	r := start(t, config(t, "h0"))
	ask := []string{"-f", "-n", "-q", "-A", "1", "-a300", "-i", boxes[1].nic, "-s", "/bin/true"}
	boxes[1].until("lease of 10.77.0.128 obtained", udhcpc, ask...)
	boxes[0].configure("10.77.0.128/24")
	// The head does not look again, since the lease is good.
	boxes[1].until("lease of 10.77.0.129 obtained", udhcpc, ask...)
	if !strings.Contains(r.log.String(), "told by") {
		t.Error("the log does not say who declined")
	}
}

// A room that is switched on: perfdhcp's avalanche asks for all machines at
// once, as a relay, and asks again until each has its address.
func TestPerfdhcpAvalanche(t *testing.T) {
	perfdhcp := need(t, "perfdhcp")
	b := cable(t, "h0", "10.77.0.1/24")
	start(t, config(t, "h0"))
	b.configure("10.77.0.10/24")
	b.in(func() {
		out, err := exec.Command(perfdhcp, "-4", "-l", b.nic, "--scenario", "avalanche", "-R", "100").CombinedOutput()
		// 0: all were answered in the end (perfdhcp(8), exit status).
		if err != nil || !strings.Contains(string(out), "received packets: 100") {
			t.Errorf("perfdhcp: %v\n%s", err, out)
		}
	})
}

// Machines come, prolong and go. The wait for a lost packet is long, so that a
// busy test machine loses none.
func TestPerfdhcpRenewAndRelease(t *testing.T) {
	perfdhcp := need(t, "perfdhcp")
	b := cable(t, "h0", "10.77.0.1/24")
	r := start(t, config(t, "h0"))
	b.configure("10.77.0.10/24")
	b.in(func() {
		out, err := exec.Command(perfdhcp, "-4", "-l", b.nic, "-R", "60", "-r", "40", "-f", "10", "-F", "10", "-n", "120", "-d", "20", "-W", "5000000").CombinedOutput()
		// 3: drops, since nobody answers a RELEASE.
		var exit *exec.ExitError
		if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 3) {
			t.Errorf("perfdhcp: %v\n%s", err, out)
		}
		for _, exchange := range []string{"DISCOVER-OFFER", "REQUEST-ACK", "REQUEST-ACK (renewal)"} {
			_, part, found := strings.Cut(string(out), "Statistics for: "+exchange+"***")
			part, _, _ = strings.Cut(part, "***Statistics")
			for _, want := range []string{"\ndrops: 0\n", "\nrejected leases: 0\n", "\nnon unique addresses: 0\n"} {
				if !found || !strings.Contains(part, want) {
					t.Errorf("%s: no %q in:\n%s", exchange, want, out)
				}
			}
		}
	})
	if log := r.log.String(); strings.Contains(log, "level=ERROR") || strings.Contains(log, "wrong request") {
		t.Error("the head refused something that a good client sent")
	}
}

// systemd-networkd, and every client after it, gets the machine's one address:
// its client id is no MAC but a hash of the machine id.
func TestNetworkd(t *testing.T) {
	need(t, "unshare")
	const networkd = "/lib/systemd/systemd-networkd"
	if _, err := os.Stat(networkd); err != nil {
		t.Skipf("%s is not installed", networkd)
	}
	b := cable(t, "h0", "10.77.0.1/24")
	start(t, config(t, "h0"))
	// Mounts of its own hide the host's configuration and its /run; /sys is
	// read-only, so that it does not wait for udev.
	script := `set -e
mount --make-rprivate /
mount -t sysfs -o ro sysfs /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /etc/systemd
mkdir -p /run/systemd/network /run/systemd/netif/leases /run/systemd/netif/links /run/systemd/netif/lldp
chmod -R a+rwX /run/systemd/netif
printf '[Match]\nName=` + b.nic + `\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n' >/run/systemd/network/1.network
exec ` + networkd
	b.until("DHCPv4 address 10.77.0.128/24", "unshare", "--mount", "sh", "-c", script)
	b.until("lease of 10.77.0.128 obtained", need(t, "udhcpc"), "-f", "-n", "-q", "-i", b.nic, "-s", "/bin/true")
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
