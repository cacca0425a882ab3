package cli

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/agent/homefiles/filebench"
	"mosimg/internal/fault"
)

func TestRowIsTheMedianOfPairs(t *testing.T) {
	p := &pairs{name: "x", unit: "s", peerName: "y"}
	// One pair was disturbed: both sides took ten times as long.
	p.add(1, 2)
	p.add(10, 20)
	p.add(1.2, 2)
	r := p.row()
	if r.Ours != 1.2 || r.Peer != 2 || r.Ratio != 0.5 {
		t.Errorf("row = %+v; want ours 1.2, peer 2, ratio 0.5", r)
	}
	if m := median([]float64{4, 1, 3, 2}); m != 2.5 {
		t.Errorf("median of an even number = %v; want 2.5", m)
	}
}

// A figure that nobody asked for may take half an hour: wrong flags are told at once.
func TestBenchRefusesWrongFlags(t *testing.T) {
	for want, args := range map[string][]string{
		"--link":   {"homefs", "--link", "slow"},
		"-1ms":     {"homefs", "--link=-1ms"},
		"--runs":   {"homefs", "--runs", "0"},
		"--starts": {"run", "--starts", "0"},
		"--work":   {"run", "--work", "1ns"},
		"--wrong":  {"homefs", "--wrong"},
		"--kib":    {"tftp", "--kib", "0"},
		"5parsec":  {"http", "--link", "5parsec"},
	} {
		var out, complaint bytes.Buffer
		status := Main(t.Context(), &Env{Stdout: &out, Stderr: &complaint, Args: append([]string{"bench"}, args...)})
		if status != int(fault.Usage) || !strings.Contains(complaint.String(), strings.TrimPrefix(want, "-")) || strings.Count(complaint.String(), "\n") != 1 {
			t.Errorf("bench %v: status %d, %q; want status %d and one line about %s", args, status, complaint.String(), fault.Usage, want)
		}
	}
}

// Each piece of work is two rows, beside sshfs and beside the disk, for each link.
func TestHomefsRows(t *testing.T) {
	var table homefsTable
	for run := range 3 {
		for _, link := range []time.Duration{0, time.Millisecond} {
			table.add(filebench.Sample{Link: link, Work: "read", Run: run + 1, Ours: 2, SSHFS: 4, Disk: 1})
		}
	}
	var got []benchRow
	for _, p := range table {
		got = append(got, p.row())
	}
	var want []benchRow
	for _, name := range []string{"homefs-read-loopback", "homefs-read-1ms"} {
		want = append(want,
			benchRow{Name: name, Unit: "s", Ours: 2, PeerName: "sshfs", Peer: 4, Ratio: 0.5},
			benchRow{Name: name, Unit: "s", Ours: 2, PeerName: "local disk", Peer: 1, Ratio: 2})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}
}
