package pxe

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests of this package that need a network run in one of their own: the
// test binary starts itself again in a fresh network namespace, and machines
// are further namespaces at the other ends of veth pairs.
const inNamespace = "MOSIMG_TEST_NETNS"

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(inNamespace) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		if cmd.ProcessState == nil {
			fmt.Fprintln(os.Stderr, "no network namespace to be had:", err)
			os.Exit(m.Run()) // the tests that need one skip
		}
		os.Exit(cmd.ProcessState.ExitCode())
	}
	os.Exit(0)
}

// needNetwork skips where the test has no namespace of its own.
func needNetwork(t *testing.T) {
	t.Helper()
	if os.Getenv(inNamespace) == "" {
		t.Skip("needs root, for a network namespace")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs ip of iproute2")
	}
}

// box is the network namespace of one machine, with the interface nic.
type box struct {
	t   *testing.T
	fd  int
	nic string
}

// cable makes a veth pair: the head's end with its address here, the other in
// a namespace of its own.
func cable(t *testing.T, headIf, headAddr string) *box {
	t.Helper()
	b := newBox(t, "b"+headIf)
	headEnd(t, headIf, headAddr, b.nic)
	b.take(b.nic)
	return b
}

// lan joins the head and some machines by a switch, which is a bridge in a
// namespace of its own; that comes back, too.
func lan(t *testing.T, headIf, headAddr string, machines ...string) (sw *box, boxes []*box) {
	t.Helper()
	sw = newBox(t, "br0")
	sw.in(func() {
		ip(t, "link", "add", sw.nic, "type", "bridge")
		ip(t, "link", "set", sw.nic, "up")
	})
	join := func(port string) {
		sw.take(port)
		sw.in(func() { ip(t, "link", "set", port, "master", sw.nic) })
	}
	headEnd(t, headIf, headAddr, "p"+headIf)
	join("p" + headIf)
	for _, name := range machines {
		b := newBox(t, name)
		ip(t, "link", "add", name, "type", "veth", "peer", "name", "p"+name)
		b.take(name)
		join("p" + name)
		boxes = append(boxes, b)
	}
	return sw, boxes
}

// headEnd makes a veth pair with its one end here.
func headEnd(t *testing.T, headIf, headAddr, peer string) {
	t.Helper()
	ip(t, "link", "add", headIf, "type", "veth", "peer", "name", peer)
	t.Cleanup(func() { exec.Command("ip", "link", "del", headIf).Run() })
	ip(t, "link", "set", "lo", "up")
	ip(t, "link", "set", headIf, "up")
	ip(t, "addr", "add", headAddr, "dev", headIf)
}

// newBox makes a namespace; nic is the interface that it will have.
func newBox(t *testing.T, nic string) *box {
	t.Helper()
	b := &box{t: t, nic: nic}
	// A namespace lives as long as something refers to it: here our fd.
	errs := make(chan error)
	go func() {
		// The thread is never unlocked, so it ends with the goroutine.
		runtime.LockOSThread()
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			b.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		errs <- err
	}()
	if err := <-errs; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(b.fd) })
	b.in(func() { ip(t, "link", "set", "lo", "up") })
	return b
}

// take moves an interface into the machine and sets it up.
func (b *box) take(nic string) {
	b.t.Helper()
	ip(b.t, "link", "set", nic, "netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), b.fd))
	b.in(func() { ip(b.t, "link", "set", nic, "up") })
}

// in runs f inside the machine's namespace. Sockets and processes made there
// stay there.
func (b *box) in(f func()) {
	b.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(b.fd, unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		f()
		done <- nil
	}()
	if err := <-done; err != nil {
		b.t.Fatal(err)
	}
}

// dial opens a TCP connection from the machine.
func (b *box) dial(ctx context.Context, network, addr string) (c net.Conn, err error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	b.in(func() { c, err = d.DialContext(ctx, network, addr) })
	return c, err
}

func (b *box) http() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: b.dial, DisableKeepAlives: true}, Timeout: 10 * time.Second}
}

// configure gives the machine an address, as its DHCP client would.
func (b *box) configure(addr string) {
	b.in(func() {
		ip(b.t, "addr", "flush", "dev", b.nic)
		ip(b.t, "addr", "add", addr, "dev", b.nic)
	})
}

func (b *box) mac() string {
	var mac string
	b.in(func() {
		out, err := exec.Command("cat", "/sys/class/net/"+b.nic+"/address").Output()
		if err == nil {
			mac = strings.TrimSpace(string(out))
			return
		}
		// /sys shows the namespace that it was mounted in.
		ifi, err := net.InterfaceByName(b.nic)
		if err != nil {
			b.t.Error(err)
			return
		}
		mac = ifi.HardwareAddr.String()
	})
	return mac
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}
