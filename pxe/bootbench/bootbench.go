// Package bootbench measures the head's TFTP and HTTP servers beside those that
// others use for it: dnsmasq and tftpd-hpa, and nginx with sendfile. The same
// client fetches the same file from each by turns, over loopback and over a
// link of a given delay and 1 Gbit/s, which is a relay in this program.
//
// Servers and clients are in namespaces that end with the measurement, however
// it ends, so nothing is reached from outside, nothing is left, and the ports
// are the usual ones. Each server is a process of its own, ours as well.
package bootbench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Verbs that make a program which calls Main or ServerMain the one that
// measures, or our server; one argument, in JSON.
const (
	Verb       = "bench-serving-inside"
	ServerVerb = "bench-serving-server"
)

// Kinds of measurement.
const (
	TFTP = "tftp"
	HTTP = "http"
)

// MaxLink bounds a link's round-trip time: with more, a round takes hours.
const MaxLink = 100 * time.Millisecond

// Config says what to measure.
type Config struct {
	Kind  string          // TFTP or HTTP
	Links []time.Duration // round-trip times; 0 is loopback as it is
	Runs  int             // rounds for each link
	KiB   int             // size of the file
	Dir   string          // temporary folder; Run makes it
}

// Sample is one figure of ours beside a peer's, measured next to each other.
type Sample struct {
	Name string  // what was measured, with the link
	Unit string  // MB/s: more is better; s/GB: less is
	Peer string  // with what it granted
	Ours float64 // in Unit
	That float64 // the peer's
}

func (c Config) check() error {
	var bad fault.List
	if c.Runs < 1 {
		bad.Addf("--runs must be 1 or more")
	}
	if c.KiB < 1 || c.KiB > 1<<22 {
		bad.Addf("--kib must be 1 to %d", 1<<22)
	}
	if len(c.Links) == 0 {
		bad.Addf("--link names no link")
	}
	for _, l := range c.Links {
		if l < 0 || l > MaxLink {
			bad.Addf("--link %v: a round trip takes 0 to %v", l, MaxLink)
		}
	}
	return bad.Err(fault.Usage, "read flags of", "mosimg bench "+c.Kind, "")
}

// peers of each kind, and the Debian packages that they come from.
var peers = map[string][]struct{ program, pkg string }{
	TFTP: {{"dnsmasq", "dnsmasq-base"}, {"in.tftpd", "tftpd-hpa"}},
	HTTP: {{"nginx", "nginx"}},
}

// look finds a program in PATH and where daemons are.
func look(program string) (string, error) {
	if p, err := exec.LookPath(program); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed", program)
}

// Run measures, and hands over each sample when it is there. It needs root.
func Run(ctx context.Context, conf Config, messages io.Writer, each func(Sample)) (err error) {
	op, object := "measure", conf.Kind
	if err := conf.check(); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return fault.New(fault.Refused, op, object, "only root can make network namespaces", "run this as root")
	}
	var missing, pkgs []string
	for _, p := range peers[conf.Kind] {
		if _, err := look(p.program); err != nil {
			missing, pkgs = append(missing, p.program), append(pkgs, p.pkg)
		}
	}
	if len(missing) > 0 {
		return fault.New(fault.Environment, op, object, "not found: "+strings.Join(missing, ", "),
			"apt-get install "+strings.Join(pkgs, " ")+", and see that no daemon of it goes on running")
	}
	if conf.Dir, err = os.MkdirTemp("", "mosimg-bench-"); err != nil {
		return fault.New(fault.Environment, op, object, err, "")
	}
	defer func() { err = errors.Join(err, os.RemoveAll(conf.Dir)) }()
	if err := os.Chmod(conf.Dir, 0o755); err != nil { // peers read it as nobody
		return err
	}
	data, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	// The signal at the parent's death comes when the thread that is the parent ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", Verb, string(data))
	cmd.Stdout, cmd.Stderr = w, messages
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET,
		Setsid:     true, Pdeathsig: syscall.SIGKILL,
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fault.New(fault.Environment, op, object, fmt.Errorf("in new namespaces: %w", err), "the kernel must allow them")
	}
	for d := json.NewDecoder(r); ; {
		var s Sample
		if d.Decode(&s) != nil {
			break // it ends, and its status says how
		}
		each(s)
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return fault.New(fault.Unavailable, op, object, "interrupted", "")
	}
	if err != nil {
		return fault.New(fault.Environment, op, object, err, "see above")
	}
	return nil
}

// Main measures, in namespaces that Run has made, and writes samples to out.
func Main(ctx context.Context, config string, out io.Writer) error {
	var conf Config
	if err := json.Unmarshal([]byte(config), &conf); err != nil {
		return fault.New(fault.Usage, "read", "what to measure", err, "use: mosimg bench tftp")
	}
	if os.Getpid() != 1 {
		return fault.New(fault.Usage, "measure", conf.Kind, "not in a namespace of its own", "use: mosimg bench "+conf.Kind)
	}
	if err := furnish(); err != nil {
		return fault.New(fault.Environment, "furnish", "a namespace", err, "")
	}
	emit := json.NewEncoder(out).Encode
	if conf.Kind == HTTP {
		return measureHTTP(ctx, conf, emit)
	}
	return measureTFTP(ctx, conf, emit)
}

// furnish makes this namespace a machine: processes of its own and a loopback.
func furnish() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	// tftpd-hpa resolves no address on a machine that has those of 127.0.0.0/8
	// only (AI_ADDRCONFIG of getaddrinfo(3)).
	doc := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(32, 32)}}
	if err := netlink.AddrAdd(lo, doc); err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// linkName is a link in the name of a figure.
func linkName(l time.Duration) string {
	if l == 0 {
		return "loopback"
	}
	return l.String()
}
