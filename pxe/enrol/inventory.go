package enrol

import (
	"strings"
	"unicode"

	"mosimg/internal/api"
)

// Bounds on what a machine may say about itself; it is anyone's text until
// the machine is approved, and shown on operators' terminals.
const (
	maxText  = 256 // runes
	maxNICs  = 64
	maxFlags = 512
)

// cleanInventory bounds an inventory and takes control characters out.
func cleanInventory(v api.Inventory) api.Inventory {
	for _, t := range []*string{&v.Arch, &v.CPUModel, &v.Kernel, &v.Product, &v.CRIU.Version, &v.CRIU.Reason} {
		*t = printable(*t)
	}
	v.CPUs, v.MemoryBytes = max(0, v.CPUs), max(0, v.MemoryBytes)
	flags := v.CPUFlags[:min(len(v.CPUFlags), maxFlags)]
	v.CPUFlags = nil
	for _, f := range flags {
		v.CPUFlags = append(v.CPUFlags, printable(f))
	}
	nics := v.NICs[:min(len(v.NICs), maxNICs)]
	v.NICs = nil
	for _, n := range nics {
		n.Name, n.MAC, n.Driver = printable(n.Name), printable(n.MAC), printable(n.Driver)
		v.NICs = append(v.NICs, n)
	}
	return v
}

// printable takes control characters out of a text and bounds it.
func printable(t string) string {
	t = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != unicode.ReplacementChar {
			return r
		}
		return -1
	}, t)
	if r := []rune(t); len(r) > maxText {
		t = string(r[:maxText])
	}
	return t
}
