package debian

import (
	"bytes"
	"sort"
	"strings"
)

// Licences gives the short names from a package's copyright file, sorted and
// joined by ", "; or "see copyright" when the file is not in the
// machine-readable format (DEP-5).
func Licences(copyright []byte) string {
	seen := make(map[string]bool)
	machine := false
	err := ReadControl(bytes.NewReader(copyright), func(p Paragraph) error {
		if strings.Contains(p.Get("Format"), "copyright-format") {
			machine = true
		}
		if name, _, _ := strings.Cut(p.Get("License"), "\n"); strings.TrimSpace(name) != "" {
			seen[strings.TrimSpace(name)] = true
		}
		return nil
	})
	if err != nil || !machine || len(seen) == 0 {
		return "see copyright"
	}
	names := make([]string, 0, len(seen))
	for n := range seen {
		names = append(names, n)
	}
	sort.Strings(names)
	return strings.Join(names, ", ")
}
