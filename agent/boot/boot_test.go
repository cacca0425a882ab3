package boot

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/bootargs"
	"mosimg/internal/modlist"
)

// A service that dies at once must not eat the machine, one that lived for
// long must be back at once.
func TestRestartDelays(t *testing.T) {
	var got []time.Duration
	var d time.Duration
	for _, lived := range []time.Duration{0, 0, 0, 0, 0, 0, 0, time.Minute, 0} {
		d = nextDelay(d, lived)
		got = append(got, d)
	}
	ms := time.Millisecond
	want := []time.Duration{200 * ms, 400 * ms, 800 * ms, 1600 * ms, 3200 * ms, 5000 * ms, 5000 * ms, 200 * ms, 400 * ms}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("delays (-want +got):\n%s", d)
	}
}

func superblock(label string) []byte {
	b := make([]byte, edge)
	binary.LittleEndian.PutUint16(b[magicAt:], extMagic)
	copy(b[labelAt:], label)
	return b
}

// A head must never format or mount a disk that is not its own: it may be
// somebody's Windows.
func TestClassifyDisk(t *testing.T) {
	at := func(off int, v ...byte) []byte {
		b := make([]byte, edge)
		copy(b[off:], v)
		return b
	}
	empty := make([]byte, edge)
	for _, tc := range []struct {
		name       string
		head, tail []byte
		want       content
		like       string
	}{
		{"blank", empty, empty, blank, ""},
		{"ours", superblock(stateLabel), empty, ours, ""},
		{"ours with data at the end", superblock(stateLabel), at(5, 1), ours, ""},
		{"another ext4", superblock("home"), empty, foreign, `labelled "home"`},
		{"label that begins like ours", superblock(stateLabel + "x"), empty, foreign, "labelled"},
		{"ext4 without label", superblock(""), empty, foreign, "labelled"},
		{"partition table", at(510, 0x55, 0xaa), empty, foreign, "partition table"},
		{"swap", at(4086, []byte("SWAPSPACE2")...), empty, foreign, "first MiB"},
		{"btrfs", at(64<<10+0x40, []byte("_BHRfS_M")...), empty, foreign, "first MiB"},
		{"one byte", at(edge-1, 1), empty, foreign, "first MiB"},
		{"RAID member (metadata at the end)", empty, at(100, 1), foreign, "last MiB"},
	} {
		got, like := classify(tc.head, tc.tail)
		if got != tc.want || !strings.Contains(like, tc.like) {
			t.Errorf("%s: classify = %v, %q; want %v, %q", tc.name, got, like, tc.want, tc.like)
		}
	}
}

func TestInspectRefusesWhatIsNoDisk(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, make([]byte, 32<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, "/dev/null", "/dev/does-not-exist"} {
		if c, _, err := inspect(path); err == nil || c != foreign {
			t.Errorf("inspect(%s) = %v, %v; want an error", path, c, err)
		}
	}
}

func TestLines(t *testing.T) {
	long := strings.Repeat("x", maxLine+10)
	in := "one\n\ntwo\x1b[2J\x00\tz\n" + long + "\nlast"
	var got []string
	lines(strings.NewReader(in), func(l []byte) { got = append(got, string(l)) })
	want := []string{"one", "", "two [2J  z", long[:maxLine], long[maxLine:], "last"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("lines (-want +got):\n%s", d)
	}
}

// Logs lie in memory: a service that talks without end must not fill it.
func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.log")
	l, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	line := []byte(strings.Repeat("y", 999) + "\n")
	for range 2000 {
		if _, err := l.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	sum := int64(0)
	for _, p := range []string{path, path + ".1"} {
		fi, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		sum += fi.Size()
	}
	if sum > 2*maxLog || sum < maxLog {
		t.Errorf("the log takes %d bytes; want between %d and %d", sum, maxLog, 2*maxLog)
	}
}

func TestLoader(t *testing.T) {
	list := &modlist.List{Modules: []modlist.Module{
		{Name: "bad", Always: true},
		{Name: "bus", Aliases: []string{"pci:v1*"}},
		{Name: "crc"},
		{Name: "nic", Deps: []string{"crc"}, Aliases: []string{"virtio:d1*"}},
		{Name: "other", Aliases: []string{"usb:*"}},
		{Name: "tun", Always: true},
	}}
	sys := t.TempDir()
	device := func(path, alias string) {
		dir := filepath.Join(sys, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "modalias"), []byte(alias+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	device("pci0", "pci:v1d2")
	var loaded []string
	l := &loader{list: list, log: slog.New(slog.DiscardHandler), done: make(map[string]bool)}
	l.load = func(m modlist.Module) error {
		if m.Name == "bad" {
			return errors.New("broken")
		}
		loaded = append(loaded, m.Name)
		if m.Name == "bus" { // a bus driver shows a new device
			device("pci0/virtio0", "virtio:d1v1")
		}
		return nil
	}
	n := l.run(list.Always()) + l.hardware(sys)
	if want := []string{"tun", "bus", "crc", "nic"}; !cmp.Equal(loaded, want) || n != len(want) {
		t.Errorf("loaded %v (%d); want %v: a broken module is left out, dependencies come first, the device behind the bus is found", loaded, n, want)
	}
	if l.hardware(sys) != 0 {
		t.Error("modules were loaded twice")
	}
}

func TestAddedAlias(t *testing.T) {
	for msg, want := range map[string]string{
		"add@/devices/pci/usb1\x00ACTION=add\x00MODALIAS=usb:v1p2\x00SEQNUM=1\x00": "usb:v1p2",
		"remove@/devices/x\x00MODALIAS=usb:v1p2\x00":                               "",
		"add@/devices/x\x00ACTION=add\x00":                                         "",
		"":                                                                         "",
	} {
		if got := addedAlias([]byte(msg)); got != want {
			t.Errorf("addedAlias(%q) = %q; want %q", msg, got, want)
		}
	}
}

func FuzzAddedAlias(f *testing.F) {
	f.Add([]byte("add@/x\x00MODALIAS=a\x00"))
	f.Fuzz(func(_ *testing.T, b []byte) { addedAlias(b) })
}

func TestPowerButton(t *testing.T) {
	event := func(kind, code uint16, value uint32) []byte {
		b := make([]byte, inputEventSize)
		e := b[len(b)-8:]
		binary.NativeEndian.PutUint16(e, kind)
		binary.NativeEndian.PutUint16(e[2:], code)
		binary.NativeEndian.PutUint32(e[4:], value)
		return b
	}
	if !isPowerPress(event(evKey, keyPower, 1)) {
		t.Error("a press of the power button is not seen")
	}
	for _, e := range [][]byte{event(evKey, keyPower, 0), event(evKey, 30, 1), event(0, keyPower, 1)} {
		if isPowerPress(e) {
			t.Errorf("%v switches the machine off", e)
		}
	}
}

func TestEndings(t *testing.T) {
	for verb, want := range map[string]ending{"reboot": restart, "poweroff": powerOff, "halt": halt} {
		if got := endings[SignalFor[verb]]; got != want {
			t.Errorf("%s sends %v, which means %v", verb, SignalFor[verb], got)
		}
	}
	if endings[unix.SIGINT] != restart {
		t.Error("ctrl-alt-del does not reboot")
	}
}

func servicesOf(a bootargs.Args) map[string]string {
	m := &machine{args: a, log: slog.New(slog.DiscardHandler)}
	out := make(map[string]string)
	for _, s := range m.services() {
		argv, err := s.argv()
		if err != nil {
			argv = []string{err.Error()}
		}
		out[s.name] = strings.Join(argv, " ")
	}
	return out
}

// Without mosimg.debug there is no way into a machine by its consoles or by
// the lab's port.
func TestShellsOnlyWithDebug(t *testing.T) {
	a := bootargs.Parse("mosimg.head=https://10.77.0.1:4660 mosimg.ca=sha256:00 mosimg.nonce=n BOOTIF=01-52-54-00-00-00-01")
	for name, argv := range servicesOf(a) {
		if name != "net" && name != "agent" {
			t.Errorf("service %s (%s) without mosimg.debug", name, argv)
		}
	}
	a.Debug = true
	with := servicesOf(a)
	if _, ok := with["labport"]; !ok {
		t.Errorf("no lab port with mosimg.debug: %v", with)
	}
	if !strings.Contains(with["agent"], "--no-keys") {
		t.Error("the agent reads the keyboard beside the shells")
	}
}

func TestServicesOfRoles(t *testing.T) {
	node := servicesOf(bootargs.Args{Role: "node", Head: "https://10.77.0.1:4660", CA: "sha256:0", Nonce: "n", BootMAC: "52:54:00:00:00:01", Image: "i"})
	want := map[string]string{
		"net":   "mosagent net --card 52:54:00:00:00:01",
		"agent": "mosagent agent --own-machine --console --head https://10.77.0.1:4660 --ca sha256:0 --nonce n --image i",
	}
	if d := cmp.Diff(want, node); d != "" {
		t.Errorf("node (-want +got):\n%s", d)
	}
	head := servicesOf(bootargs.Args{Role: "head", Interface: "eth1", Address: "10.77.0.1/24"})
	if !strings.Contains(head["agent"], "--join "+api.LocalJoin) || !strings.Contains(head["net"], "--card eth1 --address 10.77.0.1/24") {
		t.Errorf("head: %v", head)
	}
	if !strings.Contains(head["head"], "head archive") {
		t.Errorf("a head without its archive says %q", head["head"])
	}
}

// testMachine runs services for real, below this process.
func testMachine(t *testing.T) (*machine, *syncBuffer) {
	t.Helper()
	out := new(syncBuffer)
	m := &machine{out: out, logDir: t.TempDir(), reaper: newReaper()}
	m.log = slog.New(&handler{out: m.say})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); m.reaper.run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	return m, out
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (s *syncBuffer) await(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !strings.Contains(s.String(), text); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%q not seen in:\n%s", text, s.String())
		}
	}
}

// A service's output reaches console and log; it is started again when it
// dies, and ended when the machine ends.
func TestServiceIsKept(t *testing.T) {
	m, out := testMachine(t)
	runs := 0
	s := &service{name: "demo", done: make(chan struct{}), argv: func() ([]string, error) {
		runs++
		if runs == 1 {
			return nil, errors.New("waiting for the network")
		}
		return []string{"/bin/sh", "-c", fmt.Sprintf("echo run %d; [ %d = 2 ] && exit 3; trap 'echo goodbye; exit 0' TERM; while :; do sleep 0.05; done", runs, runs)}, nil
	}}
	ctx, cancel := context.WithCancel(context.Background())
	go m.keep(ctx, s)
	out.await(t, "waiting for the network")
	out.await(t, "demo: run 2\n")
	out.await(t, "exit status 3")
	out.await(t, "demo: run 3\n")
	cancel()
	<-s.done
	out.await(t, "demo: goodbye\n")
	log, err := os.ReadFile(filepath.Join(m.logDir, "demo.log"))
	if !regexp.MustCompile(`^20\S+ run 2\n20\S+ run 3\n`).Match(log) {
		t.Errorf("log = %q, %v; want both runs with their times", log, err)
	}
}

// Orphans fall to process 1: they must not stay as zombies, and their end must
// not be taken for a service's.
func TestOrphansAreReaped(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Skip("no subreaper: ", err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	m, _ := testMachine(t)
	dir := t.TempDir()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	_, done, err := m.reaper.start([]string{"/bin/sh", "-c", "(sleep 0.2; exit 5) & echo $! >" + dir + "/pid; exit 7"},
		&syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}})
	if err != nil {
		t.Fatal(err)
	}
	if ws := <-done; ws.ExitStatus() != 7 {
		t.Errorf("exit status = %d; want 7, the child's own", ws.ExitStatus())
	}
	data, _ := os.ReadFile(dir + "/pid")
	orphan := filepath.Join("/proc", strings.TrimSpace(string(data)))
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(orphan); err != nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s is still there", orphan)
		}
	}
}

func TestCommandSaysWhy(t *testing.T) {
	m := &machine{out: io.Discard, log: slog.New(slog.DiscardHandler)}
	if err := m.command("/bin/sh", "-c", "echo disk on fire >&2; exit 8"); err == nil || !strings.Contains(err.Error(), "disk on fire") || !strings.Contains(err.Error(), "exit status 8") {
		t.Errorf("command = %v; want status and output", err)
	}
	if err := m.command("/bin/true"); err != nil {
		t.Error(err)
	}
	if err := m.command("/no/such/program"); err == nil {
		t.Error("no error for a program that is not there")
	}
}

// What CRIU and capsules need must be mounted, in an order that works.
func TestMountOrder(t *testing.T) {
	var seen []string
	for _, m := range mounts {
		parent := filepath.Dir(m.target)
		if parent != "/" && !slices.ContainsFunc(seen, func(s string) bool { return s == parent || strings.HasPrefix(parent, s+"/") }) {
			t.Errorf("%s is mounted before anything that holds it", m.target)
		}
		seen = append(seen, m.target)
	}
	for _, want := range []string{"/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/run", "/tmp", "/sys/fs/cgroup"} {
		if !slices.Contains(seen, want) {
			t.Errorf("%s is not mounted", want)
		}
	}
}
