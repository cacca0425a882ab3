package native

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"

	"mosimg/internal/api"
	"mosimg/internal/bootargs"
	"mosimg/internal/imageset"
)

// firmwareEnv turns this test binary into the firmware of one machine.
const firmwareEnv = "MOSIMG_TEST_FIRMWARE"

func TestMain(m *testing.M) {
	if pid := os.Getenv(janitorEnv); pid != "" {
		runJanitor(pid)
		os.Exit(0)
	}
	if dev := os.Getenv(firmwareEnv); dev != "" {
		if err := firmware(dev); err != nil {
			fmt.Fprintln(os.Stderr, "firmware:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// firmware does what a PC's PXE and iPXE do: an address by DHCP, then the
// script named by the answer over HTTP. It prints the kernel line.
func firmware(dev string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	c, err := nclient4.New(dev)
	if err != nil {
		return err
	}
	defer c.Close()
	lease, err := c.Request(ctx, ipxe)
	if err != nil {
		return err
	}
	ones, _ := lease.ACK.SubnetMask().Size()
	if err := run("ip", "addr", "replace", fmt.Sprintf("%s/%d", lease.ACK.YourIPAddr, ones), "dev", dev); err != nil {
		return err
	}
	resp, err := http.Get(lease.ACK.BootFileName)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	script, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return fmt.Errorf("script %s: %s: %w", lease.ACK.BootFileName, resp.Status, err)
	}
	for line := range strings.Lines(string(script)) {
		if strings.HasPrefix(line, "kernel ") {
			fmt.Print(line)
			return nil
		}
	}
	return fmt.Errorf("no kernel line in:\n%s", script)
}

func run(argv ...string) error {
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// world is a LAN of network namespaces, with the commands that users run.
type world struct {
	t      *testing.T
	dir    string
	prefix string // of the namespaces' names
	bin    string
	flags  []string // of every agent
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("starts a whole cluster: not with -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to make network namespaces")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs the ip command (Debian package iproute2)")
	}
	w := &world{t: t, dir: t.TempDir(), prefix: namespacePrefix(strconv.Itoa(os.Getpid()))}
	j, err := janitor()
	if err == nil {
		_, err = fmt.Fprintln(j, w.dir)
	}
	if err != nil {
		t.Fatalf("janitor: %v", err)
	}
	w.bin = filepath.Join(w.dir, "bin")
	build := exec.Command("go", "build", "-o", w.bin+"/", "mosimg/cmd/...")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	w.namespace("lan")
	w.must("ip", "netns", "exec", w.prefix+"lan", "ip", "link", "add", "br0", "type", "bridge")
	w.must("ip", "netns", "exec", w.prefix+"lan", "ip", "link", "set", "br0", "up")
	return w
}

func (w *world) must(argv ...string) {
	w.t.Helper()
	if err := run(argv...); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) namespace(name string) {
	w.t.Helper()
	w.must("ip", "netns", "add", w.prefix+name)
	w.t.Cleanup(func() {
		if err := run("ip", "netns", "del", w.prefix+name); err != nil {
			w.t.Error(err)
		}
	})
	w.must("ip", "netns", "exec", w.prefix+name, "ip", "link", "set", "lo", "up")
}

// machine is one namespace on the LAN, with a network card and folders.
type machine struct {
	w         *world
	name, mac string
	dir       string
	pid       int    // of what holds its namespaces
	cgroup    string // its control group for jobs, in the cgroup2 mount
	agent     *daemon
	args      bootargs.Args // of the last boot
}

func (w *world) machine(name string, n int) *machine {
	w.t.Helper()
	m := &machine{w: w, name: name, cgroup: groupPrefix(strconv.Itoa(os.Getpid())) + name, mac: fmt.Sprintf("52:54:00:77:00:%02x", n), dir: filepath.Join(w.dir, name)}
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	w.namespace(name)
	port := fmt.Sprintf("p%d", n)
	w.must("ip", "-n", w.prefix+"lan", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", w.prefix+name)
	w.must("ip", "-n", w.prefix+"lan", "link", "set", port, "master", "br0", "up")
	w.must("ip", "-n", w.prefix+name, "link", "set", "eth0", "address", m.mac, "up")
	// One mount namespace for all that runs on the machine: ip makes one that shows
	// the machine's own /sys, in which there are no control groups yet.
	hold := exec.Command("ip", "netns", "exec", w.prefix+name, "sh", "-c", "mount -t cgroup2 none /sys/fs/cgroup && echo && exec cat >/dev/null")
	// It ends with our end of the pipe. (A signal at the parent's death would come
	// when the thread that started it ends, which a test may make happen.)
	in, err := hold.StdinPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	out, err := hold.StdoutPipe()
	if err == nil {
		err = hold.Start()
	}
	if err == nil {
		_, err = out.Read(make([]byte, 1))
	}
	if err != nil {
		w.t.Fatalf("mount namespace of %s: %v", name, err)
	}
	m.pid = hold.Process.Pid
	w.t.Cleanup(func() {
		in.Close()
		hold.Wait()
	})
	return m
}

// command runs argv on the machine.
func (m *machine) command(argv ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", strconv.Itoa(m.pid), "-n", "-m", "--"}, argv...)...)
}

// cable plugs ("up") or unplugs ("down") the machine.
func (m *machine) cable(state string) {
	m.w.t.Helper()
	m.w.must("ip", "-n", m.w.prefix+m.name, "link", "set", "eth0", state)
}

// daemon is a program that runs until it is stopped.
type daemon struct {
	cmd  *exec.Cmd
	log  *buffer
	done chan struct{}
}

func (m *machine) start(argv ...string) *daemon {
	m.w.t.Helper()
	d := &daemon{cmd: m.command(argv...), log: new(buffer), done: make(chan struct{})}
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if err := d.cmd.Start(); err != nil {
		m.w.t.Fatal(err)
	}
	go func() {
		d.cmd.Wait()
		close(d.done)
	}()
	m.w.t.Cleanup(func() {
		d.kill()
		m.w.keepLog(m.name+"-"+filepath.Base(argv[0]), d)
		if m.w.t.Failed() {
			m.w.t.Logf("%s: log of %s:\n%s", m.name, filepath.Base(argv[0])+" "+argv[1], d.log.tail())
		}
	})
	return d
}

// keepLog keeps the whole log of a daemon, if the caller has named a folder for them.
func (w *world) keepLog(name string, d *daemon) {
	dir := os.Getenv("MOSIMG_LOGS")
	if dir == "" {
		return
	}
	f, err := os.Create(filepath.Join(dir, fmt.Sprintf("%s-%d.log", name, d.cmd.Process.Pid)))
	if err == nil {
		_, err = io.WriteString(f, d.log.String())
		f.Close()
	}
	if err != nil {
		w.t.Log(err)
	}
}

// kill is kill -9: `ip netns exec` became the program itself.
func (d *daemon) kill() {
	d.cmd.Process.Kill()
	<-d.done
}

// terminate is what systemd does.
func (d *daemon) terminate() {
	d.cmd.Process.Signal(os.Interrupt)
	select {
	case <-d.done:
	case <-time.After(10 * time.Second):
		d.kill()
	}
}

// boot lets the firmware run and starts the agent with the words of the
// kernel line; fresh forgets the machine's memory first, as a reboot does.
func (m *machine) boot(fresh bool) {
	m.w.t.Helper()
	if fresh {
		os.RemoveAll(filepath.Join(m.dir, "agent"))
	}
	line, err := m.firmware()
	if err != nil {
		m.w.t.Fatal(err)
	}
	m.args = bootargs.Parse(line)
	if m.args.BootMAC != m.mac || m.args.Nonce == "" || m.args.CA == "" {
		m.w.t.Fatalf("%s: kernel line %q; want BOOTIF of %s, a nonce and a CA pin", m.name, line, m.mac)
	}
	m.startAgent()
}

// firmware runs the firmware alone and returns the kernel line.
func (m *machine) firmware() (string, error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	fw := m.command(exe)
	fw.Env = append(os.Environ(), firmwareEnv+"=eth0")
	out, err := fw.Output()
	if err != nil {
		return "", fmt.Errorf("firmware of %s: %s", m.name, stderrOf(err))
	}
	return string(out), nil
}

func stderrOf(err error) string {
	if ee, ok := err.(*exec.ExitError); ok { //nolint:errorlint // straight from Output
		return ee.String() + ": " + string(ee.Stderr)
	}
	return err.Error()
}

func (m *machine) startAgent() {
	m.w.t.Helper()
	m.agent = m.start(append([]string{m.w.bin + "/mosagent", "agent", "--head", m.args.Head, "--ca", m.args.CA, "--nonce", m.args.Nonce,
		"--mac", m.mac, "--image", m.args.Image}, m.agentFlags()...)...)
}

// agentFlags are those that every machine's agent has. Without a CRIU of the
// caller's its folder is one in which there is none.
func (m *machine) agentFlags() []string {
	criu := os.Getenv("MOSIMG_CRIU")
	if criu == "" {
		criu = m.w.dir
	}
	return append([]string{"--state", filepath.Join(m.dir, "agent"), "--socket", m.socket(), "--criu", criu,
		"--cgroup", filepath.Join("/sys/fs/cgroup", m.cgroup), "--root-jobs", "--home-lease", "60s"}, m.w.flags...)
}

func (m *machine) socket() string { return filepath.Join(m.dir, "agent.sock") }

// members is what `mosmon --json` shows on this machine.
func (m *machine) members() (api.MemberTable, error) {
	var t api.MemberTable
	out, err := m.command(m.w.bin+"/mosagent", "mosmon", "--json", "--socket", m.socket()).Output()
	if err != nil {
		return t, fmt.Errorf("mosmon on %s: %s", m.name, stderrOf(err))
	}
	return t, json.Unmarshal(out, &t)
}

// sees waits until mosmon on this machine shows exactly these living nodes,
// each with a load that is younger than 5 s.
func (m *machine) sees(want ...api.NodeID) {
	m.w.t.Helper()
	m.w.eventually(20*time.Second, fmt.Sprintf("%s sees %v alive", m.name, want), func() error {
		table, err := m.members()
		if err != nil {
			return err
		}
		var got []api.NodeID
		for _, x := range table.Members {
			if x.Liveness != api.Alive {
				continue
			}
			got = append(got, x.Node)
			if x.Load == nil || x.AgeMillis > 5000 || x.Load.CPUs < 1 || x.Load.MemTotal <= 0 {
				return fmt.Errorf("node %d: no fresh load: %+v", x.Node, x)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("alive: %v", got)
		}
		return nil
	})
}

// eventually fails the test unless check passes within the time.
func (w *world) eventually(d time.Duration, what string, check func() error) {
	w.t.Helper()
	deadline := time.Now().Add(d)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s: not within %s: %v", what, d, err)
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// head is the machine with the registry.
type head struct {
	*machine
	daemon *daemon
}

func (w *world) head(name string, n int, cidr string) *head {
	w.t.Helper()
	h := &head{machine: w.machine(name, n)}
	w.must("ip", "-n", w.prefix+name, "addr", "add", cidr, "dev", "eth0")
	writeImageSet(w.t, filepath.Join(h.dir, "images"))
	h.startHead()
	return h
}

func (h *head) run() string { return filepath.Join(h.dir, "run") }

func (h *head) startHead(flags ...string) {
	h.w.t.Helper()
	h.daemon = h.start(append([]string{h.w.bin + "/mosimg", "head", "--interface", "eth0", "--dhcp", "server",
		"--images", filepath.Join(h.dir, "images"), "--state", filepath.Join(h.dir, "state"), "--run", h.run()}, flags...)...)
	h.w.eventually(20*time.Second, "head is up", func() error {
		_, err := h.nodes()
		return err
	})
}

// joinSelf starts the agent on the head's own machine, with its ticket.
func (h *head) joinSelf() {
	h.w.t.Helper()
	h.agent = h.start(append([]string{h.w.bin + "/mosagent", "agent", "--join", filepath.Join(h.run(), "join.json")}, h.agentFlags()...)...)
}

// node runs `mosimg node ...` and returns its stdout.
func (h *head) node(args ...string) (string, error) {
	argv := append([]string{h.w.bin + "/mosimg", "node", "--socket", filepath.Join(h.run(), "head.sock"), "--agent-socket", h.socket()}, args...)
	out, err := h.command(argv...).Output()
	if err != nil {
		return "", fmt.Errorf("mosimg node %s: %s", strings.Join(args, " "), stderrOf(err))
	}
	return string(out), nil
}

func (h *head) mustNode(args ...string) {
	h.w.t.Helper()
	if _, err := h.node(args...); err != nil {
		h.w.t.Fatal(err)
	}
}

func (h *head) nodes() ([]api.NodeRecord, error) {
	out, err := h.node("ls", "--json")
	if err != nil {
		return nil, err
	}
	var records []api.NodeRecord
	return records, json.Unmarshal([]byte(out), &records)
}

// record waits until the head's record of a MAC satisfies check. A minute
// covers the slowest rule: a machine that was switched off before the head
// could know it keeps its place for 35 s.
func (h *head) record(mac, what string, check func(api.NodeRecord) bool) api.NodeRecord {
	h.w.t.Helper()
	var rec api.NodeRecord
	h.w.eventually(time.Minute, mac+" is "+what, func() error {
		records, err := h.nodes()
		if err != nil {
			return err
		}
		for _, r := range records {
			if r.MAC == mac {
				rec = r
				if check(r) {
					return nil
				}
				return fmt.Errorf("it is %+v", r)
			}
		}
		return fmt.Errorf("not among %d records", len(records))
	})
	return rec
}

func alive(r api.NodeRecord) bool { return r.State == api.Approved && r.Liveness == api.Alive }

// writeImageSet makes a set with the right names and no meaning.
func writeImageSet(t *testing.T, dir string) {
	t.Helper()
	m := &imageset.Manifest{Format: imageset.Format, Arch: "amd64"}
	for _, name := range []string{imageset.Initramfs, imageset.Kernel, "boot/ipxe.efi", "boot/ipxe.pxe", "boot/snponly.efi", "boot/undionly.kpxe"} {
		content := []byte("content of " + name)
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, content, 0o644); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(content)
		m.Files = append(m.Files, imageset.File{Name: name, Size: int64(len(content)), SHA256: hex.EncodeToString(sum[:])})
	}
	m.ID = m.ComputeID()
	if err := m.Write(dir); err != nil {
		t.Fatal(err)
	}
}

// buffer is a log that may be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// tail is the last part of the log.
func (b *buffer) tail() string {
	s := b.String()
	const most = 4000
	if len(s) > most {
		s = "..." + s[len(s)-most:]
	}
	return s
}
