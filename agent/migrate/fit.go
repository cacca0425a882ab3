package migrate

import (
	"fmt"
	"slices"
	"strings"
)

// Machine is what decides whether a job that runs on one machine can go on on
// another.
type Machine struct {
	// Version is that of all that must be alike on both: our own protocols and CRIU.
	Version string
	Arch    string
	// Features are what the CPU offers to programs, as /proc/cpuinfo names it.
	Features []string
	// XSave is the size of the CPU's extended state, in bytes; 0 is unknown.
	XSave int
	// NoCRIU is why jobs cannot be dumped or restored here; "" if they can.
	NoCRIU string
}

// Fits tells why a job of machine m cannot go on on dst; nil if it can.
func (m Machine) Fits(dst Machine) error {
	switch {
	case m.NoCRIU != "":
		return fmt.Errorf("jobs cannot leave their node: %s", m.NoCRIU)
	case dst.NoCRIU != "":
		return fmt.Errorf("this node cannot take moving jobs: %s", dst.NoCRIU)
	case m.Version != dst.Version:
		return fmt.Errorf("this node runs %s, the job's %s; boot both from the same image", dst.Version, m.Version)
	case m.Arch != dst.Arch:
		return fmt.Errorf("this node is of another kind: %s, the job's %s", dst.Arch, m.Arch)
	}
	var missing []string
	for _, f := range m.Features {
		if userFeature(f) && !slices.Contains(dst.Features, f) {
			missing = append(missing, f)
		}
	}
	if len(missing) > 0 {
		// A program may have looked once and use them for ever.
		return fmt.Errorf("this node's CPU lacks what the job may be using: %s", strings.Join(missing, " "))
	}
	if m.XSave > dst.XSave && dst.XSave > 0 {
		return fmt.Errorf("this node's CPU keeps %d bytes of extended state, the job's %d", dst.XSave, m.XSave)
	}
	return nil
}

// userFeatures are the flags of /proc/cpuinfo that programs can use; the others
// concern the kernel. Families are by prefix.
var userFeatures = strings.Fields(`fpu tsc cx8 cmov mmx mmxext 3dnow 3dnowext fxsr sse sse2 pni ssse3 sse4_1 sse4_2 sse4a misalignsse
	xop fma fma4 tbm f16c bmi1 bmi2 aes pclmulqdq vaes vpclmulqdq sha_ni sha512 sm3 sm4 gfni adx rdrand rdseed movbe popcnt abm lzcnt
	cx16 lahf_lm syscall lm rdtscp rdpid fsgsbase xsave xsaveopt xsavec clflush clflushopt clwb clzero prefetchw pku ospke rtm hle mpx
	movdiri movdir64b waitpkg serialize cldemote enqcmd ptwrite monitorx mwaitx user_shstk`)

func userFeature(flag string) bool {
	return slices.Contains(userFeatures, flag) || strings.HasPrefix(flag, "avx") || strings.HasPrefix(flag, "amx_")
}
