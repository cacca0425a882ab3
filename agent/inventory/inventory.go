// Package inventory describes this machine to the head: what it is, and what
// decides whether a job that ran elsewhere can go on here (CPU flags, the size
// of the CPU's extended state, kernel).
package inventory

import (
	"bufio"
	"bytes"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/agent/netup"
	"mosimg/internal/api"
)

// Read looks at this machine. What the kernel does not tell stays zero.
func Read() api.Inventory {
	inv := api.Inventory{
		Arch:       runtime.GOARCH,
		XSaveBytes: xsaveBytes(),
		Kernel:     kernel(),
		NICs:       nics(),
		TPM:        exists("/sys/class/tpm/tpm0"),
		Product:    product("/sys/class/dmi/id"),
	}
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		inv.CPUModel, inv.CPUFlags, inv.CPUs = parseCPUInfo(data)
	}
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) == nil {
		inv.MemoryBytes = int64(si.Totalram) * int64(si.Unit)
	}
	return inv
}

// parseCPUInfo reads /proc/cpuinfo. The first processor speaks for all: they
// are of one kind on every machine that mosimg supports.
func parseCPUInfo(data []byte) (model string, flags []string, cpus int) {
	sc := bufio.NewScanner(bytes.NewReader(data))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		key, value, ok := strings.Cut(sc.Text(), ":")
		if !ok {
			continue
		}
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "processor":
			cpus++
		case "model name":
			if model == "" {
				model = strings.Join(strings.Fields(value), " ")
			}
		case "flags":
			if flags == nil {
				flags = strings.Fields(value)
			}
		}
	}
	return model, flags, cpus
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// product is vendor and product as the firmware tells them.
func product(dir string) string {
	var words []string
	for _, f := range []string{"sys_vendor", "product_name"} {
		data, err := os.ReadFile(filepath.Join(dir, f))
		if s := strings.TrimSpace(string(data)); err == nil && s != "" {
			words = append(words, s)
		}
	}
	return strings.Join(words, " ")
}

func nics() []api.NIC {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil
	}
	var list []api.NIC
	for _, i := range ifs {
		wired, carrier := netup.Wired(i.Name)
		if !wired {
			continue
		}
		list = append(list, api.NIC{
			Name: i.Name, MAC: i.HardwareAddr.String(), Driver: netup.Driver(i.Name),
			Carrier: carrier, Mbit: netup.Mbit(i.Name),
		})
	}
	return list
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
