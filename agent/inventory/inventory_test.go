package inventory

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseCPUInfo(t *testing.T) {
	const info = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Core(TM)2 Duo CPU     E8400  @ 3.00GHz\nflags\t\t: fpu vme sse2\n\nprocessor\t: 1\nmodel name\t: other\nflags\t\t: fpu\n"
	model, flags, cpus := parseCPUInfo([]byte(info))
	if model != "Intel(R) Core(TM)2 Duo CPU E8400 @ 3.00GHz" || cpus != 2 || !cmp.Equal(flags, []string{"fpu", "vme", "sse2"}) {
		t.Errorf("parseCPUInfo = %q, %q, %d", model, flags, cpus)
	}
}

// The destination of a migration is chosen by these: they must not be zero on
// a machine that has them.
func TestReadThisMachine(t *testing.T) {
	inv := Read()
	t.Logf("%+v", inv)
	if inv.CPUs < 1 || inv.MemoryBytes < 1<<20 || inv.Kernel == "" || inv.Arch == "" {
		t.Errorf("Read = %+v; want CPUs, memory, kernel and arch", inv)
	}
	if slices.Contains(inv.CPUFlags, "xsave") && inv.XSaveBytes < 576 {
		t.Errorf("XSaveBytes = %d on a CPU with xsave; want at least 576 (legacy area and header)", inv.XSaveBytes)
	}
	if inv.XSaveBytes%8 != 0 {
		t.Errorf("XSaveBytes = %d", inv.XSaveBytes)
	}
}

func FuzzParseCPUInfo(f *testing.F) {
	f.Add([]byte("processor: 0\nflags: a b"))
	f.Fuzz(func(_ *testing.T, b []byte) { parseCPUInfo(b) })
}
