package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/fault"
	"mosimg/qemu-tests/vswitch"
)

var update = flag.Bool("update", false, "write golden files; the tests then fail, so that it is not left on")

func TestArgv(t *testing.T) {
	tcg := Host{QEMU: "/usr/bin/qemu-system-x86_64", ROMDir: "/usr/lib/ipxe/qemu",
		OVMFCode: "/usr/share/OVMF/OVMF_CODE_4M.fd", OVMFVars: "/usr/share/OVMF/OVMF_VARS_4M.fd", CPUs: 2}
	kvm := tcg
	kvm.KVM = true
	node := Config{Name: "n1", MAC: "52:54:00:77:00:01", MemoryMB: 512, Dir: "/l", SocketDir: "/l/s"}
	uefi := node
	uefi.Firmware = UEFI
	e1000 := uefi
	e1000.NIC, e1000.CPUs = "e1000", 2
	stick := uefi
	stick.Image, stick.Medium = "/o/mosimg.img", Stick
	head := Config{Name: "head", MAC: "52:54:00:77:00:fe", MemoryMB: 768, Kernel: "/o/vmlinuz", Initrd: "/l/head.initrd",
		Append: "console=ttyS0 mosimg.role=head", Disk: "/l/with,comma.img", LabPort: true, Dir: "/l", SocketDir: "/l/s"}
	for _, c := range []struct {
		name string
		host Host
		cfg  Config
	}{{"bios", tcg, node}, {"uefi", tcg, uefi}, {"uefi-e1000-kvm", kvm, e1000}, {"stick", tcg, stick}, {"head", tcg, head}} {
		t.Run(c.name, func(t *testing.T) {
			if err := c.cfg.Validate(); err != nil {
				t.Error(err)
			}
			golden(t, c.name+".argv", strings.Join(c.cfg.Argv(c.host), "\n")+"\n")
		})
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		os.MkdirAll("testdata", 0o755)
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		t.Errorf("%s written; run again without -update", name)
		return
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got):\n%s", name, d)
	}
}

func TestValidateTellsAllFaults(t *testing.T) {
	err := Config{Name: "a b", MAC: "x", Firmware: "coreboot", NIC: "wifi", Append: "quiet", Image: "x", Medium: "tape", Dir: "rel"}.Validate()
	if fault.KindOf(err) != fault.Usage {
		t.Fatalf("Validate = %v; want a usage fault", err)
	}
	for _, word := range []string{`"a b"`, "MAC", "memory of 0", "coreboot", "wifi", "without a kernel", "tape", "absolute"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("Validate does not mention %s:\n%v", word, err)
		}
	}
	long := Config{Name: "n1", MAC: "52:54:00:77:00:01", MemoryMB: 64, Dir: "/x", SocketDir: "/" + strings.Repeat("x", 100)}
	if err := long.Validate(); err == nil || !strings.Contains(err.Error(), "103 are possible") {
		t.Errorf("Validate of a long socket folder = %v; want the limit", err)
	}
}

// Starting machines that do not fit makes the host swap or kill something of
// the user's.
func TestMemoryRefusal(t *testing.T) {
	two := []Config{{MemoryMB: 768}, {MemoryMB: 512}}
	if err := checkMemory(two, 768+512+2*overheadMB); err != nil {
		t.Errorf("checkMemory with just enough = %v", err)
	}
	err := checkMemory(two, 1000)
	if fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "they need 1536 MiB of memory, 1000 MiB are available") {
		t.Errorf("checkMemory = %v; want both figures", err)
	}
	mb, err := availableMB(bufio.NewScanner(strings.NewReader("MemTotal: 1 kB\nMemAvailable:   24454144 kB\n")))
	if err != nil || mb != 23881 {
		t.Errorf("availableMB = %d, %v; want 23881", mb, err)
	}
	if _, err := availableMB(bufio.NewScanner(strings.NewReader("x"))); err == nil {
		t.Error("availableMB of nonsense succeeded")
	}
}

func TestMissingProgramsNameTheirPackages(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	defer func(r []string, o [][2]string) { romDirs, ovmfFiles = r, o }(romDirs, ovmfFiles)
	romDirs, ovmfFiles = nil, nil
	_, err := FindHost([]Config{{NIC: "e1000"}, {Firmware: UEFI}, {Firmware: UEFI}, {Kernel: "/k"}})
	if fault.KindOf(err) != fault.Environment {
		t.Fatalf("FindHost = %v; want an environment fault", err)
	}
	want := "apt-get install qemu-system-x86 ipxe-qemu ovmf"
	if !strings.Contains(err.Error(), want) || strings.Count(err.Error(), "OVMF is missing") != 1 {
		t.Errorf("FindHost = %v; want each thing once and %q", err, want)
	}
}

func TestProcessKnowsAnotherWithTheSameNumber(t *testing.T) {
	me, err := ProcessOf(os.Getpid())
	if err != nil || !me.Alive() {
		t.Fatalf("ProcessOf(self) = %+v, %v, alive %v", me, err, me.Alive())
	}
	me.Start++
	if me.Alive() || me.Signal(os.Interrupt) == nil {
		t.Error("a process with another start time counts as the same")
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("17 (a) b) (c) S 1 17 17 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 12345 1 1"))
	f.Add([]byte("17 (x) "))
	f.Fuzz(func(t *testing.T, b []byte) { parseStat(b) })
}

func TestTailIsReadable(t *testing.T) {
	name := filepath.Join(t.TempDir(), "c")
	os.WriteFile(name, []byte(strings.Repeat("old\n", 20000)+
		"\x1b[2J\x1b[01;01H\x1b[=3h\x1b[0m\x1b[35m\x1b[40miPXE\x1b[0m 1.21\r\n\r\n\r\n....\r....\r\nlast \xff\x00line\n"), 0o600)
	if d := cmp.Diff([]string{"iPXE 1.21", "....", "last line"}, Tail(name, 3)); d != "" {
		t.Errorf("Tail (-want +got):\n%s", d)
	}
	if got := Tail(filepath.Join(t.TempDir(), "none"), 3); got != nil {
		t.Errorf("Tail of no file = %q", got)
	}
}

func TestPanicked(t *testing.T) {
	name := filepath.Join(t.TempDir(), "c")
	os.WriteFile(name, []byte("[    1.0] Kernel panic - not syncing: No working init found.\r\n[    1.1] CPU: 0\r\n[    1.2] ---[ end Kernel panic - not syncing: No working init found. ]---\r\n"), 0o600)
	if got, want := Panicked(name), "Kernel panic: No working init found."; got != want {
		t.Errorf("Panicked = %q; want %q", got, want)
	}
}

func FuzzClean(f *testing.F) {
	f.Add([]byte("\x1b[2J\x1b[mx\r\ny"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, line := range clean(b) {
			if strings.ContainsFunc(line, func(r rune) bool { return r < ' ' }) {
				t.Errorf("clean left control characters in %q", line)
			}
		}
	})
}

// bench is a switch and a host with QEMU, or a skipped test.
func bench(t *testing.T, firmware Firmware) (Host, *vswitch.Switch, Config) {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := Config{Name: "n1", MAC: "52:54:00:77:01:01", MemoryMB: 128, Firmware: firmware, Dir: dir, SocketDir: dir}
	h, err := FindHost([]Config{c})
	if err != nil {
		t.Skip(err)
	}
	s, err := vswitch.New(vswitch.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if _, err := s.Listen(c.Name, c.NetSocket(), vswitch.Link{}); err != nil {
		t.Fatal(err)
	}
	return h, s, c
}

// A real machine's ROM asks for an address: the switch, the network card, the
// console and the control socket work together.
func TestBIOSMachineAsksForAnAddress(t *testing.T) {
	h, s, c := bench(t, BIOS)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e, err := s.Attach("listener", vswitch.Link{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := Start(ctx, h, c, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.PowerOff()
	mac, _ := vswitch.ParseMAC(c.MAC)
	if _, err := s.AwaitFirstPacket(ctx, mac); err != nil {
		t.Fatalf("no frame: %v; console: %q", err, Tail(c.ConsoleLog(), 10))
	}
	f, err := e.Recv()
	if err != nil || vswitch.MAC(f[6:12]) != mac {
		t.Errorf("Recv = %x, %v; want a frame from %v", f, err, mac)
	}
	if got := m.Status(ctx); got != "running" {
		t.Errorf("Status = %q; want running", got)
	}
	if err := m.Pause(ctx); err != nil {
		t.Error(err)
	}
	if got := m.Status(ctx); got != "paused" {
		t.Errorf("Status = %q; want paused", got)
	}
	p := m.Process()
	m.PowerOff()
	if p.Alive() || m.Err() == nil || m.Status(ctx) != "off" {
		t.Errorf("after PowerOff: alive %v, Err %v, Status %q", p.Alive(), m.Err(), m.Status(ctx))
	}
	left, _ := filepath.Glob(filepath.Join(c.SocketDir, "*"))
	for _, name := range left {
		if st, err := os.Stat(name); err == nil && st.Mode().Type() == os.ModeSocket && name != c.NetSocket() {
			t.Errorf("socket %s is left behind", name)
		}
	}
}

// QEMU's own words must reach the user when it cannot start.
func TestStartFailureCarriesQEMUsWords(t *testing.T) {
	h, _, c := bench(t, BIOS)
	c.Kernel = "/no/such/vmlinuz"
	_, err := Start(t.Context(), h, c, nil)
	if fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "/no/such/vmlinuz") {
		t.Errorf("Start = %v; want QEMU's message", err)
	}
}

const helperEnv = "MOSIMG_VM_TEST_HELPER"

// TestMain lets this binary be the lab process that is killed.
func TestMain(m *testing.M) {
	if dir := os.Getenv(helperEnv); dir != "" {
		helper(dir)
	}
	os.Exit(m.Run())
}

func helper(dir string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	c := Config{Name: "n1", MAC: "52:54:00:77:01:01", MemoryMB: 64, Dir: dir, SocketDir: dir}
	h, err := FindHost([]Config{c})
	if err != nil {
		fail(err)
	}
	s, err := vswitch.New(vswitch.Config{})
	if err != nil {
		fail(err)
	}
	if _, err := s.Listen(c.Name, c.NetSocket(), vswitch.Link{}); err != nil {
		fail(err)
	}
	m, err := Start(context.Background(), h, c, nil)
	if err != nil {
		fail(err)
	}
	json.NewEncoder(os.Stdout).Encode(m.Process())
	select {}
}

// kill -9 of the lab must leave no virtual machine behind.
func TestMachineDiesWithItsLab(t *testing.T) {
	_, _, c := bench(t, BIOS)
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var p Process
	if err := json.NewDecoder(out).Decode(&p); err != nil || !p.Alive() {
		t.Fatalf("helper started %+v, %v (%s)", p, err, c.Name)
	}
	cmd.Process.Kill()
	cmd.Wait()
	for end := time.Now().Add(10 * time.Second); p.Alive(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the machine outlived its lab")
		}
	}
}
