package pxe

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/pin/tftp/v3"

	"mosimg/internal/api"
	"mosimg/internal/bootargs"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/unixhttp"
	"mosimg/internal/version"
	"mosimg/pxe/imagetest"
	"mosimg/pxe/preflight"
)

// running is a head that serves.
type running struct {
	t    *testing.T
	cfg  Config
	info Info
	log  *logBuffer
	stop func() error
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// config is for a head on an interface, with folders of the test.
func config(t *testing.T, ifs ...string) Config {
	dir := t.TempDir()
	imagetest.Make(t, filepath.Join(dir, "images"), "amd64", imagetest.Files("one"))
	return Config{Interfaces: ifs, Images: filepath.Join(dir, "images"), State: filepath.Join(dir, "state"), Run: filepath.Join(dir, "run"), DHCP: DHCPServer}
}

func start(t *testing.T, cfg Config) *running {
	t.Helper()
	r := &running{t: t, log: new(logBuffer)}
	started := make(chan Info, 1)
	cfg.Log = slog.New(slog.NewTextHandler(r.log, nil))
	cfg.Started = func(i Info) { started <- i }
	r.cfg = cfg
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	var once sync.Once
	var result error
	r.stop = func() error {
		once.Do(func() {
			cancel()
			select {
			case result = <-done:
			case <-time.After(20 * time.Second):
				result = fmt.Errorf("the head does not stop")
			}
		})
		return result
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("Run = %v", err)
		}
		if t.Failed() {
			t.Logf("the head's log:\n%s", r.log.String())
		}
	})
	select {
	case r.info = <-started:
	case err := <-done:
		t.Fatalf("Run = %v", err)
	case <-time.After(20 * time.Second):
		t.Fatal("the head does not start")
	}
	return r
}

// runBriefly runs a head that should refuse to.
func runBriefly(t *testing.T, h *Head) error {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return h.Run(ctx)
}

func (r *running) admin() *unixhttp.Client {
	return unixhttp.New(filepath.Join(r.cfg.Run, "head.sock"), "head")
}

func (r *running) act(action, node string) api.NodeRecord {
	r.t.Helper()
	var rec api.NodeRecord
	if err := r.admin().Post(r.t.Context(), api.PathNodeAct, api.NodeAct{Action: action, Node: node}, &rec); err != nil {
		r.t.Fatalf("%s %s: %v", action, node, err)
	}
	return rec
}

// lease runs a whole DHCP exchange from a machine.
func (b *box) lease(mods ...dhcpv4.Modifier) (offer, ack *dhcpv4.DHCPv4) {
	b.t.Helper()
	b.in(func() {
		c, err := nclient4.New(b.nic, nclient4.WithTimeout(2*time.Second), nclient4.WithRetry(3))
		if err != nil {
			b.t.Error(err)
			return
		}
		defer c.Close()
		l, err := c.Request(b.t.Context(), mods...)
		if err != nil {
			b.t.Errorf("DHCP: %v", err)
			return
		}
		offer, ack = l.Offer, l.ACK
	})
	if b.t.Failed() {
		b.t.FailNow()
	}
	return offer, ack
}

func class(s string) dhcpv4.Modifier { return dhcpv4.WithOption(dhcpv4.OptClassIdentifier(s)) }
func arch(a byte) dhcpv4.Modifier {
	return dhcpv4.WithGeneric(dhcpv4.OptionClientSystemArchitectureType, []byte{0, a})
}
func ipxeClass() dhcpv4.Modifier {
	return dhcpv4.WithGeneric(dhcpv4.OptionUserClassInformation, []byte("iPXE"))
}

// boot goes through all stages up to the kernel command line, as a BIOS
// machine does.
func (b *box) boot() bootargs.Args {
	b.t.Helper()
	// 1. The ROM asks, gets an address and undionly.kpxe by TFTP.
	_, ack := b.lease(class("PXEClient:Arch:00000:UNDI:002001"), arch(0))
	b.configure(ack.YourIPAddr.String() + "/24")
	if ack.BootFileName != "undionly.kpxe" {
		b.t.Fatalf("boot file %q", ack.BootFileName)
	}
	loader := b.tftp(ack.ServerIPAddr.String(), ack.BootFileName)
	if want := imagetest.Files("one")["boot/undionly.kpxe"]; loader != want {
		b.t.Fatalf("loader %q; want %q", loader, want)
	}
	// 2. iPXE asks, keeps the address, gets its script by HTTP.
	_, again := b.lease(class("PXEClient:Arch:00000:UNDI:002001"), arch(0), ipxeClass())
	if !again.YourIPAddr.Equal(ack.YourIPAddr) {
		b.t.Fatalf("iPXE got %v after the ROM got %v", again.YourIPAddr, ack.YourIPAddr)
	}
	script := b.get(again.BootFileName)
	// 3. Kernel and initramfs.
	var args bootargs.Args
	for line := range strings.Lines(script) {
		w := strings.Fields(line)
		switch {
		case len(w) > 1 && w[0] == "kernel":
			args = bootargs.Parse(line)
			if got := b.get(w[1]); got != "kernel one" {
				b.t.Fatalf("kernel %q", got)
			}
		case len(w) > 3 && w[0] == "initrd":
			if got := b.get(w[3]); got != "initramfs one" {
				b.t.Fatalf("initramfs %q", got)
			}
		}
	}
	if args.Nonce == "" || args.BootMAC != b.mac() || args.Head == "" || !strings.HasPrefix(args.CA, "sha256:") {
		b.t.Fatalf("script gives %+v:\n%s", args, script)
	}
	return args
}

func (b *box) tftp(host, file string) string {
	b.t.Helper()
	var out bytes.Buffer
	b.in(func() {
		c, err := tftp.NewClient(host + ":69")
		if err == nil {
			var wt io.WriterTo
			c.SetTimeout(2 * time.Second)
			if wt, err = c.Receive(file, "octet"); err == nil {
				_, err = wt.WriteTo(&out)
			}
		}
		if err != nil {
			b.t.Errorf("tftp %s %s: %v", host, file, err)
		}
	})
	return out.String()
}

func (b *box) get(url string) string {
	b.t.Helper()
	resp, err := b.http().Get(url)
	if err != nil {
		b.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		b.t.Fatalf("GET %s: %s %v\n%s", url, resp.Status, err, body)
	}
	return string(body)
}

// agent is the part of the agent that talks to the head.
type agent struct {
	b    *box
	args bootargs.Args
	key  identity.Key
	csr  []byte
	cert *tls.Certificate
	ca   *x509.Certificate
}

func (b *box) agent(args bootargs.Args) *agent {
	b.t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		b.t.Fatal(err)
	}
	csr, err := identity.NewCSR(key)
	if err != nil {
		b.t.Fatal(err)
	}
	return &agent{b: b, args: args, key: key, csr: csr}
}

func (a *agent) client(c *tls.Config) *http.Client {
	dial := (&net.Dialer{Timeout: 5 * time.Second}).DialContext
	if a.b != nil {
		dial = a.b.dial
	}
	return &http.Client{Transport: &http.Transport{DialContext: dial, TLSClientConfig: c, DisableKeepAlives: true}, Timeout: 40 * time.Second}
}

func (a *agent) enrol(ctx context.Context, wait time.Duration) (*api.EnrolReply, error) {
	req := api.EnrolRequest{Protocol: version.Protocol, CSR: a.csr, Nonce: a.args.Nonce, MAC: a.args.BootMAC,
		Image: a.args.Image, WaitMillis: int(wait.Milliseconds()), Inventory: api.Inventory{Arch: "amd64", CPUs: 1}}
	var reply api.EnrolReply
	err := unixhttp.DoJSON(ctx, a.client(identity.PinnedClient(a.args.CA)), http.MethodPost, a.args.Head+api.PathEnrol, req, &reply)
	if err == nil && reply.State == api.Approved {
		leaf, err1 := x509.ParseCertificate(reply.Certificate)
		ca, err2 := x509.ParseCertificate(reply.CA)
		if err1 != nil || err2 != nil {
			return nil, fmt.Errorf("certificates: %w, %w", err1, err2)
		}
		a.ca, a.cert = ca, identity.TLSCertificate(leaf, ca, a.key)
	}
	return &reply, err
}

func (a *agent) cluster(ctx context.Context, have string) (*api.ClusterView, error) {
	own := func() (*tls.Certificate, error) { return a.cert, nil }
	var v api.ClusterView
	err := unixhttp.DoJSON(ctx, a.client(identity.ClientToHead(own, a.ca)), http.MethodGet, a.args.Head+api.PathCluster+have, nil, &v)
	return &v, err
}

func TestBootToMember(t *testing.T) {
	needNetwork(t)
	b := cable(t, "h0", "10.77.0.1/24")
	cfg := config(t, "h0")
	r := start(t, cfg)

	args := b.boot()
	a := b.agent(args)
	reply, err := a.enrol(t.Context(), 0)
	if err != nil || reply.State != api.Pending {
		t.Fatalf("enrol = %+v, %v; want pending", reply, err)
	}
	// The approval reaches the waiting machine at once.
	approved := make(chan *api.EnrolReply)
	go func() {
		rep, err := a.enrol(t.Context(), 30*time.Second)
		if err != nil {
			t.Error(err)
		}
		approved <- rep
	}()
	time.Sleep(200 * time.Millisecond) // not synchronisation: either way must do
	began := time.Now()
	if rec := r.act("approve", b.mac()); rec.Node != 1 || rec.Fingerprint != identity.Fingerprint(a.key.Public()) {
		t.Errorf("approved %+v", rec)
	}
	reply = <-approved
	if reply.State != api.Approved || time.Since(began) > 5*time.Second {
		t.Fatalf("reply %s after %v", reply.State, time.Since(began))
	}
	view, err := a.cluster(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(view.Peers) != 1 || view.Peers[0].MAC != b.mac() || len(view.GossipKeys) != 1 {
		t.Errorf("view %+v", view)
	}

	// The same machine, its state and the authority survive a restart.
	if err := r.stop(); err != nil {
		t.Fatalf("stop: %v", err)
	}
	if _, err := os.Stat(filepath.Join(cfg.Run, "join.json")); !os.IsNotExist(err) {
		t.Errorf("the local ticket is still there after the stop: %v", err)
	}
	r = start(t, cfg)
	again, err := a.cluster(t.Context(), "")
	if err != nil {
		t.Fatalf("a member is not known after a restart of the head: %v", err)
	}
	if d := cmp.Diff(view, again); d != "" {
		t.Errorf("the view changed by a restart (-before +after):\n%s", d)
	}
	if _, ack := b.lease(); ack.YourIPAddr.String() != view.Peers[0].Address {
		t.Errorf("after the restart the machine is leased %v; it had %s", ack.YourIPAddr, view.Peers[0].Address)
	}

	// The rules hold over the wire, too.
	thief := b.agent(args)
	if _, err := thief.enrol(t.Context(), 0); fault.KindOf(err) != fault.Refused {
		t.Errorf("replayed nonce: %v; want refused", err)
	}
	wrong := *a
	wrong.args.CA = "sha256:" + strings.Repeat("00", 32)
	if _, err := wrong.enrol(t.Context(), 0); err == nil || !strings.Contains(err.Error(), identity.ErrPin.Error()) {
		t.Errorf("another cluster's head: %v; want %v", err, identity.ErrPin)
	}
	foreign := *a
	otherCA, err := identity.NewCA("other")
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := otherCA.IssueNode(a.key.Public(), 1, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	foreign.cert = identity.TLSCertificate(leaf, otherCA.Cert, a.key)
	if _, err := foreign.cluster(t.Context(), ""); err == nil {
		t.Error("a certificate of another authority was accepted")
	}
	anonymous := *a
	anonymous.cert = new(tls.Certificate)
	if _, err := anonymous.cluster(t.Context(), ""); fault.KindOf(err) != fault.Refused {
		t.Errorf("poll without a certificate: %v; want refused", err)
	}
	if _, err := a.cluster(t.Context(), "?have=x"); fault.KindOf(err) != fault.Usage {
		t.Errorf("?have=x: %v; want usage", err)
	}
	// A script for a MAC that the asking address is not leased to.
	resp, err := b.http().Get("http://10.77.0.1/ipxe/52:54:00:00:00:99")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("another machine's script: %s; want 403", resp.Status)
	}

	// Revoked: a poll that waits ends, and the machine boots its own disk.
	polled := make(chan error)
	go func() {
		_, err := a.cluster(t.Context(), fmt.Sprintf("?have=%d", again.Generation))
		polled <- err
	}()
	time.Sleep(200 * time.Millisecond)
	if rec := r.act("deny", "1"); rec.State != api.Revoked {
		t.Errorf("deny = %+v", rec)
	}
	if err := <-polled; fault.KindOf(err) != fault.Refused || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("a waiting poll of a revoked node: %v; want refused", err)
	}
	if script := b.get("http://10.77.0.1/ipxe/" + b.mac()); !strings.Contains(script, "exit") || strings.Contains(script, "kernel") {
		t.Errorf("script of a revoked machine:\n%s", script)
	}

	// Every stage has its line.
	log := r.log.String()
	for _, stage := range []string{"discover", "offer", "lease", "enrol", "member"} {
		if !strings.Contains(log, fmt.Sprintf("stage=%s mac=%s", stage, b.mac())) {
			t.Errorf("no stage %s in the second head's log", stage)
		}
	}
}

func TestAgentOfTheHeadsMachine(t *testing.T) {
	needNetwork(t)
	cable(t, "h0", "10.77.0.1/24")
	cfg := config(t, "h0")
	r := start(t, cfg)
	file := filepath.Join(cfg.Run, "join.json")
	read := func() (tk api.LocalTicket) {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(data, &tk); err != nil {
			t.Fatal(err)
		}
		return tk
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; the ticket must be root's only", st, err)
	}
	if st, err := os.Stat(filepath.Join(cfg.Run, "head.sock")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v; the admin socket must be root's only", st, err)
	}
	for i := range 3 { // the agent is restarted, with a new key each time
		tk := read()
		a := (&box{t: t}).agent(bootargs.Args{Head: tk.Head, CA: tk.CA, Nonce: tk.Nonce, BootMAC: tk.MAC})
		a.b = nil // from here
		reply, err := a.enrol(t.Context(), 0)
		if err != nil || reply.State != api.Approved || reply.Node != 1 || reply.Name != "head" {
			t.Fatalf("start %d: %+v, %v", i, reply, err)
		}
		if _, err := a.cluster(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
		if read().Nonce == tk.Nonce {
			t.Error("a used ticket was not replaced")
		}
	}
	_ = r
}

// Two networks, one head: each machine hears of its own network only.
func TestTwoInterfaces(t *testing.T) {
	needNetwork(t)
	b0, b1 := cable(t, "h0", "10.77.0.1/24"), cable(t, "h1", "10.78.0.1/24")
	r := start(t, config(t, "h0", "h1"))
	for i, b := range []*box{b0, b1} {
		_, ack := b.lease(class("PXEClient"), arch(0), ipxeClass())
		want := fmt.Sprintf("10.%d.0.", 77+i)
		if got := ack.YourIPAddr.String(); got != want+"128" {
			t.Errorf("leased %s; want %s128", got, want)
		}
		if got := ack.BootFileName; got != "http://"+want+"1/ipxe/"+b.mac() {
			t.Errorf("boot file %q", got)
		}
		if got := ack.ServerIdentifier().String(); got != want+"1" {
			t.Errorf("server id %s", got)
		}
	}
	if len(r.info.Networks) != 2 {
		t.Errorf("info %+v", r.info)
	}
}

func TestAutoWithoutForeignServer(t *testing.T) {
	needNetwork(t)
	b := cable(t, "h0", "10.77.0.1/24")
	cfg := config(t, "h0")
	cfg.DHCP = DHCPAuto
	start(t, cfg)
	b.lease()
}

// What is in the way is named, all of it at once, and nothing is bound.
func TestNewRefusals(t *testing.T) {
	needNetwork(t)
	cable(t, "h0", "10.77.0.1/24")
	me := fmt.Sprintf("process %d", os.Getpid())

	t.Run("ports taken and no image", func(t *testing.T) {
		udp, err := net.ListenPacket("udp4", ":67")
		if err != nil {
			t.Fatal(err)
		}
		defer udp.Close()
		tcp, err := net.Listen("tcp", ":80")
		if err != nil {
			t.Fatal(err)
		}
		defer tcp.Close()
		cfg := config(t, "h0")
		cfg.Images = t.TempDir()
		_, err = New(cfg)
		if fault.KindOf(err) != fault.Environment {
			t.Errorf("New = %v", err)
		}
		for _, want := range []string{"udp port 67 (DHCP on h0): it is taken by", "tcp port 80 (HTTP): it is taken by", me, "no image set in it"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("no %q in: %v", want, err)
			}
		}
		if _, err := os.Stat(cfg.State); !os.IsNotExist(err) {
			t.Error("a refused head made its state folder")
		}
	})
	t.Run("another head", func(t *testing.T) {
		cfg := config(t, "h0")
		r := start(t, cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), me) {
			t.Errorf("New = %v; want the ports' owner", err)
		}
		// On other ports the state's lock refuses it.
		cfg.HTTPPort, cfg.TFTPPort, cfg.APIPort, cfg.DHCP = 8080, 6969, 4999, DHCPOff
		h, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		if err := runBriefly(t, h); fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "another head") {
			t.Errorf("Run = %v; want that another head has the state", err)
		}
		// With other state its socket does.
		cfg.State = t.TempDir()
		if h, err = New(cfg); err != nil {
			t.Fatal(err)
		}
		if err := runBriefly(t, h); err == nil || !strings.Contains(err.Error(), "another head answers") {
			t.Errorf("Run = %v; want that another head has the socket", err)
		}
		// The first one is not harmed.
		var recs []api.NodeRecord
		if err := r.admin().Get(t.Context(), api.PathNodes, &recs); err != nil {
			t.Error(err)
		}
	})
	t.Run("pool of another network, with its line", func(t *testing.T) {
		cfg := config(t, "h0")
		cfg.ConfigFile = filepath.Join(t.TempDir(), "cluster.yaml")
		os.WriteFile(cfg.ConfigFile, []byte("networks:\n  - interface: h0\n    pool: 10.99.0.5-10.99.0.9\n"), 0o644)
		if _, err := New(cfg); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), "cluster.yaml:3: pool 10.99.0.5-10.99.0.9 is outside the subnet 10.77.0.0/24") {
			t.Errorf("New = %v", err)
		}
		cfg.Interfaces = []string{"lo"}
		if _, err := New(cfg); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), "not among the networks") {
			t.Errorf("New = %v", err)
		}
	})
	t.Run("an address that a DHCP client set", func(t *testing.T) {
		ip(t, "link", "add", "dyn0", "type", "veth", "peer", "name", "dyn1")
		defer exec.Command("ip", "link", "del", "dyn0").Run()
		ip(t, "link", "set", "dyn0", "up")
		ip(t, "addr", "add", "10.79.0.5/24", "dev", "dyn0", "valid_lft", "600", "preferred_lft", "600")
		cfg := config(t)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "no wired interface with a static address") {
			t.Errorf("New = %v; want a refusal", err)
		}
		all, err := preflight.List("/")
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range all {
			if i.Name == "dyn0" && !i.Addrs[0].Dynamic {
				t.Error("an address with a lifetime counts as static")
			}
			if i.Name == "h0" && i.Addrs[0].Dynamic {
				t.Error("an address without a lifetime counts as dynamic")
			}
		}
	})
	t.Run("a head that is killed leaves nothing in the way", func(t *testing.T) {
		cfg := config(t, "h0")
		os.MkdirAll(cfg.Run, 0o755)
		l, err := net.Listen("unix", filepath.Join(cfg.Run, "head.sock"))
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
		start(t, cfg)
	})
}

// The settings of cluster.yaml reach the machines.
func TestClusterYAML(t *testing.T) {
	needNetwork(t)
	b := cable(t, "h0", "10.77.0.1/24")
	cfg := config(t)
	cfg.ConfigFile = filepath.Join(t.TempDir(), "cluster.yaml")
	os.WriteFile(cfg.ConfigFile, []byte(fmt.Sprintf(`
cluster: attic
dns: [10.77.0.1]
kernel_args: [console=ttyS0]
approved: [%[1]q]
networks:
  - interface: h0
    pool: 10.77.0.100-10.77.0.199
    router: 10.77.0.254
    lease_time: 10m
    reservations: [{mac: %[1]q, address: 10.77.0.11, name: render1}]
`, b.mac())), 0o644)
	r := start(t, cfg)
	if r.info.Cluster != "attic" {
		t.Errorf("cluster %q", r.info.Cluster)
	}
	_, ack := b.lease(class("PXEClient"), arch(0), ipxeClass())
	got := fmt.Sprint(ack.YourIPAddr, ack.Router(), ack.DNS(), ack.IPAddressLeaseTime(0))
	if want := "10.77.0.11 [10.77.0.254] [10.77.0.1] 10m0s"; got != want {
		t.Errorf("ack %s; want %s", got, want)
	}
	b.configure("10.77.0.11/24")
	script := b.get(ack.BootFileName)
	if !strings.Contains(script, " quiet console=ttyS0 ") {
		t.Errorf("script:\n%s", script)
	}
	a := b.agent(bootargs.Parse(script))
	reply, err := a.enrol(t.Context(), 0)
	if err != nil || reply.State != api.Approved || reply.Name != "render1" || reply.Cluster.Name != "attic" {
		t.Errorf("enrol = %+v, %v", reply, err)
	}
}

// A range of ports that cannot be is told at the start, not when the first
// machine boots.
func TestBadTFTPPorts(t *testing.T) {
	for _, ports := range []string{"x", "5-4", "0-9", "1-70000"} {
		cfg := Config{TFTPPorts: ports}
		if err := cfg.complete(); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), "--tftp-ports") {
			t.Errorf("--tftp-ports %s: %v; want a fault of kind Usage that names the flag", ports, err)
		}
	}
	cfg := Config{TFTPPorts: "40000-40255"}
	if err := cfg.complete(); err != nil || cfg.tftpPorts.First != 40000 {
		t.Errorf("--tftp-ports 40000-40255: %v, %+v", err, cfg.tftpPorts)
	}
}
