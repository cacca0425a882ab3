package mounts_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// BenchmarkRequests is what one request costs in time, in processor time and in
// switches of the two processes that it passes, the latter two of which tell more
// than the first on a machine that has other work.
func BenchmarkRequests(b *testing.B) {
	for _, bb := range []struct {
		name string
		do   func(dir string, n int) error
	}{
		{"stat", func(dir string, n int) error {
			if _, err := os.Lstat(filepath.Join(dir, strconv.Itoa(n))); !os.IsNotExist(err) {
				return fmt.Errorf("stat: %w", err)
			}
			return nil
		}},
		{"create", func(dir string, n int) error {
			f, err := os.OpenFile(filepath.Join(dir, "f"+strconv.Itoa(n)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
			if err != nil {
				return err
			}
			_, err = f.WriteString("content")
			f.Close()
			return err
		}},
	} {
		b.Run(bb.name, func(b *testing.B) {
			w := newWorld(b, options{})
			far := w.guest()
			mount, keeper := w.forwarder(2), w.keeper()
			cm, sm := usage(b, mount)
			ck, sk := usage(b, keeper)
			n := 0
			for b.Loop() {
				if err := bb.do(far, n); err != nil {
					b.Fatal(err)
				}
				n++
			}
			report := func(who string, pid int, cpu, switches float64) {
				c, s := usage(b, pid)
				b.ReportMetric((c-cpu)*1e4/float64(b.N), who+"-cpu-µs/op")
				b.ReportMetric((s-switches)/float64(b.N), who+"-switches/op")
			}
			report("mount", mount, cm, sm)
			report("keeper", keeper, ck, sk)
		})
	}
}

// usage is a process's time on a processor, in ticks of 10 ms, and its switches.
func usage(b *testing.B, pid int) (cpu, switches float64) {
	b.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	must(b, err)
	f := strings.Fields(string(stat))
	for _, s := range f[13:15] {
		n, err := strconv.ParseFloat(s, 64)
		must(b, err)
		cpu += n
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	must(b, err)
	for _, task := range tasks {
		data, err := os.ReadFile(task)
		must(b, err)
		for line := range strings.Lines(string(data)) {
			if name, value, _ := strings.Cut(line, ":"); name == "voluntary_ctxt_switches" {
				n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
				must(b, err)
				switches += n
			}
		}
	}
	return cpu, switches
}
