package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/mkuimage/cpio"

	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/qemu-tests/vm"
)

// fakeImages writes an image set whose files are nonsense: QEMU starts it and
// it does nothing.
func fakeImages(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	m := &imageset.Manifest{Format: imageset.Format, Arch: "amd64", Profile: "test"}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		sum, n, err := imageset.HashFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		m.Files = append(m.Files, imageset.File{Name: name, Size: n, SHA256: sum})
	}
	m.ID = m.ComputeID()
	if err := m.Write(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func wholeSet(t *testing.T) string {
	return fakeImages(t, map[string]string{imageset.Kernel: "kernel", imageset.Initramfs: "initramfs", imageset.HeadArchive: "head"})
}

func needQEMU(t *testing.T) {
	t.Helper()
	if _, err := vm.FindHost([]vm.Config{{}, {Firmware: vm.UEFI}}); err != nil {
		t.Skip(err)
	}
}

func TestStageOf(t *testing.T) {
	ip := func(proto byte, port uint16, ihl int) []byte {
		f := make([]byte, 14+ihl*4+8)
		f[12], f[13] = 0x08, 0x00
		f[14] = 0x40 | byte(ihl)
		f[14+9] = proto
		f[14+ihl*4+2], f[14+ihl*4+3] = byte(port>>8), byte(port)
		return f
	}
	fragment := ip(17, 67, 5)
	fragment[14+7] = 1
	for _, c := range []struct {
		name  string
		frame []byte
		want  Stage
	}{
		{"arp", append(make([]byte, 12), 0x08, 0x06, 0, 1), Talking},
		{"dhcp", ip(17, 67, 5), AskedDHCP},
		{"tftp with IP options", ip(17, 69, 7), AskedTFTP},
		{"http", ip(6, 80, 5), AskedHTTP},
		{"enrolment", ip(6, 4660, 5), Enrolling},
		{"gossip", ip(17, 4662, 5), Gossiping},
		{"gossip by stream", ip(6, 4662, 5), Gossiping},
		{"dns", ip(17, 53, 5), Talking},
		{"later fragment", fragment, Talking},
		{"header longer than the frame", append(ip(17, 67, 5)[:14], append([]byte{0x4f}, make([]byte, 19)...)...), Talking},
		{"short", []byte{1, 2}, Talking},
	} {
		if got := stageOf(c.frame); got != c.want {
			t.Errorf("stageOf(%s) = %v; want %v", c.name, got, c.want)
		}
	}
}

func FuzzStageOf(f *testing.F) {
	f.Add(make([]byte, 60))
	f.Fuzz(func(t *testing.T, b []byte) { _ = stageOf(b).String() })
}

func TestPlanGivesEachMachineItsOwn(t *testing.T) {
	p, err := newPlan(Config{Nodes: []NodeConfig{{}, {Name: "second", Firmware: vm.UEFI, MemoryMB: 256}}}, "/o/vmlinuz", "/l", "/l/s")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range p.machines {
		got = append(got, strings.Join([]string{m.Name, m.MAC, string(m.Firmware), m.NetSocket()}, " "))
	}
	want := []string{"head 52:54:00:77:00:01  /l/s/head.net", "n1 52:54:00:77:01:01  /l/s/n1.net", "second 52:54:00:77:01:02 uefi /l/s/second.net"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("machines (-want +got):\n%s", d)
	}
	if h := p.machines[0]; h.MemoryMB != 768 || !strings.Contains(h.Append, "mosimg.role=head") || !h.LabPort || h.Disk == "" {
		t.Errorf("head = %+v", h)
	}
	_, err = newPlan(Config{Nodes: []NodeConfig{{Name: "a"}, {Name: "a"}, {Name: "x y"}, {MemoryMB: 1}}}, "/k", "/l", "/l/s")
	for _, want := range []string{"two machines are called a", `"x y"`, "memory of 1 MiB"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("newPlan = %v; want it to mention %s", err, want)
		}
	}
}

func TestDryRunIsAShellCommand(t *testing.T) {
	if _, err := exec.LookPath("sh"); err != nil {
		t.Skip(err)
	}
	argv := []string{"printf", "%s\\n", "-a", "plain", "--", "it's", "a b", "", "$HOME", "comma,,x"}
	out, err := exec.Command("sh", "-c", ShellQuote(argv)).Output()
	if want := strings.Join(argv[2:], "\n") + "\n"; err != nil || string(out) != want {
		t.Errorf("sh read ShellQuote as %q, %v; want %q", out, err, want)
	}
	lines, err := Plan(Config{Images: "out", Dir: "/tmp/x", Nodes: Nodes(2, NodeConfig{Firmware: vm.UEFI})})
	if err != nil || len(lines) != 3 {
		t.Fatalf("Plan = %d commands, %v; want 3", len(lines), err)
	}
	if _, err := os.Stat("/tmp/x"); err == nil {
		t.Error("a dry run made its folder")
	}
}

// The kernel must find each archive behind the others: on a multiple of 4.
func TestHeadInitrd(t *testing.T) {
	set := &imageset.Set{Dir: wholeSet(t)}
	name := filepath.Join(t.TempDir(), "initrd")
	if err := writeHeadInitrd(name, set, []byte("cluster: lab\n")); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	const front = "initramfs\x00\x00\x00head"
	if !bytes.HasPrefix(b, []byte(front)) {
		t.Fatalf("initrd begins %q; want %q", b[:20], front)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(b[len(front):])))
	if err != nil {
		t.Fatal(err)
	}
	last := records[len(records)-1]
	if content, err := io.ReadAll(io.NewSectionReader(last, 0, 100)); last.Name != clusterConfig || string(content) != "cluster: lab\n" || err != nil {
		t.Errorf("last record is %s with %q, %v; want %s", last.Name, content, err, clusterConfig)
	}
}

func TestRefusals(t *testing.T) {
	noHead := fakeImages(t, map[string]string{imageset.Kernel: "k", imageset.Initramfs: "i"})
	taken := t.TempDir()
	os.WriteFile(filepath.Join(taken, "thesis.tex"), []byte("x"), 0o600)
	file := filepath.Join(taken, "thesis.tex")
	images := wholeSet(t)
	for _, c := range []struct {
		name string
		cfg  Config
		kind fault.Kind
		want string
	}{
		{"no image set", Config{Images: t.TempDir()}, fault.NotFound, "mosimg build"},
		{"no head archive", Config{Images: noHead}, fault.NotFound, "head.cpio"},
		{"too much memory", Config{Images: images, Nodes: Nodes(2, NodeConfig{MemoryMB: 1 << 20})}, fault.Environment, "MiB are available"},
		{"somebody's folder", Config{Images: images, Dir: taken}, fault.Refused, "other things than a lab"},
		{"a file", Config{Images: images, Dir: file}, fault.Environment, "thesis.tex"},
	} {
		t.Run(c.name, func(t *testing.T) {
			needQEMU(t)
			l, err := New(c.cfg, nil, nil)
			if err == nil {
				l.Close(nil)
				t.Fatal("New succeeded")
			}
			if fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.want) {
				t.Errorf("New = %v (kind %d); want kind %d and %q", err, fault.KindOf(err), c.kind, c.want)
			}
		})
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "x" {
		t.Errorf("the user's file is %q, %v", b, err)
	}
	if names, _ := os.ReadDir(taken); len(names) != 1 {
		t.Errorf("a refused lab left %v behind", names)
	}
}

func TestOneLabInAFolder(t *testing.T) {
	needQEMU(t)
	dir := filepath.Join(t.TempDir(), "l")
	first, err := New(Config{Images: wholeSet(t), Dir: dir}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Images: wholeSet(t), Dir: dir}, nil, nil); fault.KindOf(err) != fault.Refused || !strings.Contains(err.Error(), "lab down") {
		t.Errorf("second New = %v; want a refusal that names lab down", err)
	}
	other, err := New(Config{Images: wholeSet(t), Dir: dir + "2"}, nil, nil)
	if err != nil {
		t.Errorf("a lab in another folder: %v", err)
	} else {
		other.Close(nil)
	}
	sockets := first.folder.sockets
	if kept := first.Close(nil); kept != "" {
		t.Errorf("Close = %q; want nothing kept", kept)
	}
	for _, gone := range []string{dir, dir + "2", sockets} {
		if _, err := os.Stat(gone); !os.IsNotExist(err) {
			t.Errorf("%s is left behind", gone)
		}
	}
}

// A path that is too long for unix sockets is no reason to fail.
func TestDeepFolder(t *testing.T) {
	needQEMU(t)
	dir := filepath.Join(t.TempDir(), strings.Repeat("deep", 20), strings.Repeat("deeper", 10))
	l, err := New(Config{Images: wholeSet(t), Dir: dir, Nodes: Nodes(1, NodeConfig{MemoryMB: 64})}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	sockets := l.folder.sockets
	if err := l.Nodes()[0].PowerOn(testContext(t)); err != nil {
		t.Error(err)
	}
	l.Close(nil)
	if _, err := os.Stat(sockets); !os.IsNotExist(err) || !strings.HasPrefix(sockets, "/tmp/") {
		t.Errorf("socket folder %s: %v", sockets, err)
	}
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// "It never booted" must not look like "it did not join", and the evidence
// must be where the message says.
func TestSilentMachineIsReportedAsThat(t *testing.T) {
	needQEMU(t)
	dir := filepath.Join(t.TempDir(), "l")
	l, err := New(Config{Images: wholeSet(t), Dir: dir, Nodes: Nodes(1, NodeConfig{MemoryMB: 64})}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.limits.first = time.Second
	m := l.Nodes()[0]
	m.Port().Unplug()
	if err := m.PowerOn(testContext(t)); err != nil {
		t.Fatal(err)
	}
	_, err = l.AwaitMember(testContext(t), m)
	if fault.KindOf(err) != fault.Unavailable || !errors.Is(err, errSilent) || !strings.Contains(err.Error(), "never sent a packet") {
		t.Errorf("AwaitMember = %v; want that it never sent a packet", err)
	}
	if m.booting {
		t.Error("a machine that failed keeps others from booting")
	}
	process := m.VM().Process()
	if kept := l.Close(err); kept != dir {
		t.Errorf("Close = %q; want %q", kept, dir)
	}
	if process.Alive() {
		t.Error("the machine outlived its lab")
	}
	for _, name := range []string{"n1.console", "head.console", captureFile, commandsFile, stateFile} {
		_, err := os.Stat(filepath.Join(dir, name))
		if name == "head.console" { // it was never switched on
			continue
		}
		if err != nil {
			t.Errorf("evidence is missing: %v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, headInitrd)); err == nil {
		t.Error("the head's initramfs is kept: large, and made again from the image set")
	}
	state, err := ReadState(dir)
	if err != nil || state.Phase != Failed || !strings.Contains(state.Error, "never sent a packet") {
		t.Errorf("ReadState = %+v, %v; want the failure", state, err)
	}
	// The next lab in the same folder starts clean.
	l, err = New(Config{Images: wholeSet(t), Dir: dir}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "n1.console")); err == nil {
		t.Error("the old lab's console is still there")
	}
	l.Close(nil)
}

// QEMU that dies under a waiting lab must be told at once, not at the deadline.
func TestMachineThatDiesEndsTheWait(t *testing.T) {
	needQEMU(t)
	l, err := New(Config{Images: wholeSet(t), Nodes: Nodes(1, NodeConfig{MemoryMB: 64})}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close(nil)
	m := l.Nodes()[0]
	m.Port().Unplug()
	if err := m.PowerOn(testContext(t)); err != nil {
		t.Fatal(err)
	}
	m.VM().Process().Signal(os.Kill)
	start := time.Now()
	if _, err = l.AwaitMember(testContext(t), m); err == nil || !strings.Contains(err.Error(), "QEMU ended") {
		t.Errorf("AwaitMember = %v; want that QEMU ended", err)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("it took %v to notice", took)
	}
}

// Under emulation no more machines boot at once than there are processors.
func TestBootsAreStaggered(t *testing.T) {
	needQEMU(t)
	l, err := New(Config{Images: wholeSet(t), Nodes: Nodes(2, NodeConfig{MemoryMB: 64})}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close(nil)
	l.boots = make(chan struct{}, 1)
	n1, n2 := l.Nodes()[0], l.Nodes()[1]
	if err := n1.PowerOn(testContext(t)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(testContext(t), 100*time.Millisecond)
	defer cancel()
	if err := n2.PowerOn(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("PowerOn beside a booting machine = %v; want to wait", err)
	}
	n1.settled()
	if err := n2.PowerOn(testContext(t)); err != nil {
		t.Error(err)
	}
}

func TestDownStopsOnlyItsOwn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	if _, err := Down(dir); fault.KindOf(err) != fault.NotFound {
		t.Errorf("Down of no lab = %v; want not found", err)
	}
	bystander := exec.Command("sleep", "100")
	if err := bystander.Start(); err != nil {
		t.Skip(err)
	}
	defer bystander.Process.Kill()
	p, err := vm.ProcessOf(bystander.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	old := p
	old.Start-- // a process that had this number before
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := &State{Version: stateVersion, Phase: Up, Process: old, Sockets: filepath.Join(dir, socketFolder),
		Machines: []MachineState{{Name: "n1", Process: old}}}
	if err := s.write(dir); err != nil {
		t.Fatal(err)
	}
	if ran, err := Down(dir); ran || err != nil {
		t.Errorf("Down = %v, %v; want that nothing ran", ran, err)
	}
	if !p.Alive() {
		t.Error("Down killed a process that only has the number of one of its own")
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the folder is left: %v", err)
	}
}

func TestReadStateRefusesOtherVersions(t *testing.T) {
	dir := t.TempDir()
	b, _ := json.Marshal(State{Version: 99})
	os.WriteFile(filepath.Join(dir, stateFile), b, 0o600)
	if _, err := ReadState(dir); fault.KindOf(err) != fault.Usage {
		t.Errorf("ReadState = %v; want a usage fault", err)
	}
}
