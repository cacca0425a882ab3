package gpt

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const sectors = 128 * 2048

func table() *Table {
	return &Table{GUID: NewGUID([]byte("0123456789abcdef")), Sectors: sectors, Partitions: []Partition{
		{Type: ESP, GUID: NewGUID([]byte("fedcba9876543210")), First: 2048, Last: sectors - 2049, Attributes: LegacyBoot, Name: "MOSIMG"},
	}}
}

// sgdisk finds no fault, and what it shows is what was meant.
func TestOracle(t *testing.T) {
	sgdisk, err := exec.LookPath("sgdisk")
	if err != nil {
		sgdisk = "/usr/sbin/sgdisk"
	}
	if _, err := os.Stat(sgdisk); err != nil {
		t.Skip("sgdisk, the oracle, is not installed (make test installs it)")
	}
	head, tail, err := table().Encode()
	if err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(sectors * SectorSize); err != nil {
		t.Fatal(err)
	}
	for at, data := range map[int64][]byte{0: head, sectors*SectorSize - int64(len(tail)): tail} {
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
	}
	for arg, want := range map[string][]string{
		"-v":  {"No problems found."},
		"-p":  {"30313233-3435-8637-B839-616263646566", "EF00  MOSIMG"},
		"-i1": {"C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "Attribute flags: 0000000000000004"},
	} {
		out, err := exec.Command(sgdisk, arg, disk).CombinedOutput()
		for _, w := range want {
			if err != nil || !strings.Contains(string(out), w) {
				t.Errorf("sgdisk %s does not say %q: %v\n%s", arg, w, err, out)
			}
		}
	}
}

func TestRefusals(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*Table)
	}{
		{"over the copy of the table", func(t *Table) { t.Partitions[0].Last = sectors - TableSectors }},
		{"over the table", func(t *Table) { t.Partitions[0].First = 33 }},
		{"overlapping", func(t *Table) { t.Partitions = append(t.Partitions, t.Partitions[0]) }},
		{"backwards", func(t *Table) { t.Partitions[0].Last = 1 }},
		{"long name", func(t *Table) { t.Partitions[0].Name = strings.Repeat("x", 37) }},
		{"large code", func(t *Table) { t.MBRCode = make([]byte, 447) }},
	} {
		b := table()
		tc.change(b)
		if _, _, err := b.Encode(); err == nil {
			t.Errorf("%s: Encode accepts it", tc.name)
		}
	}
}
