// Package kmod picks kernel modules for an image and works out the order in
// which they must be loaded. Debian's kernel packages carry no modules.dep
// (depmod makes it at installation), so it reads the .modinfo section of each
// module, as depmod does. Modules keep their signature: they are not stripped.
package kmod

import (
	"bytes"
	"debug/elf"
	"embed"
	"fmt"
	"path"
	"slices"
	"sort"
	"strings"

	"mosimg/internal/modlist"
)

// Source is this package's code: results in the build cache depend on it.
//
//go:embed *.go
var Source embed.FS

// Info is what a module says about itself.
type Info struct {
	Name     string
	Depends  []string // names
	Pre      []string // soft dependencies to be loaded before: names or aliases
	Aliases  []string
	Firmware []string
}

// Parse reads the .modinfo section of an uncompressed module.
func Parse(ko []byte) (*Info, error) {
	f, err := elf.NewFile(bytes.NewReader(ko))
	if err != nil {
		return nil, fmt.Errorf("kernel module: %w", err)
	}
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("kernel module: no .modinfo section")
	}
	data, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("kernel module: read .modinfo: %w", err)
	}
	return parseModinfo(data), nil
}

// parseModinfo reads "key=value" strings, each ended by NUL.
func parseModinfo(data []byte) *Info {
	in := &Info{}
	for field := range bytes.SplitSeq(data, []byte{0}) {
		key, value, _ := strings.Cut(string(field), "=")
		switch key {
		case "name":
			in.Name = Name(value)
		case "alias":
			in.Aliases = append(in.Aliases, value)
		case "firmware":
			in.Firmware = append(in.Firmware, value)
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					in.Depends = append(in.Depends, Name(d))
				}
			}
		case "softdep":
			in.Pre = append(in.Pre, softPre(value)...)
		}
	}
	return in
}

// softPre is the names after "pre:" in "pre: a b post: c".
func softPre(value string) (names []string) {
	pre := false
	for w := range strings.FieldsSeq(value) {
		if strings.HasSuffix(w, ":") {
			pre = w == "pre:"
		} else if pre {
			names = append(names, w)
		}
	}
	return names
}

// Name is the name of a module as lsmod prints it, from that or from the path
// of its file: "kernel/net/via-rhine.ko.xz" gives "via_rhine".
func Name(s string) string {
	s, _, _ = strings.Cut(path.Base(s), ".ko")
	return strings.ReplaceAll(s, "-", "_")
}

// Kernel is the modules that one kernel package offers.
type Kernel struct {
	Release string
	Builtin map[string]bool   // names of what is in the kernel itself
	Paths   map[string]string // of the others, by name: "kernel/net/x.ko.xz"
	// Read gives the uncompressed content of the module at a path. It is
	// called only for modules that may be needed: there are thousands.
	Read func(path string) ([]byte, error)

	infos map[string]*Info
}

// info reads what a module says about itself; nil when there is no such module.
func (k *Kernel) info(name string) (*Info, error) {
	if in := k.infos[name]; in != nil || k.Paths[name] == "" {
		return in, nil
	}
	data, err := k.Read(k.Paths[name])
	if err != nil {
		return nil, err
	}
	in, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k.Paths[name], err)
	}
	if k.infos == nil {
		k.infos = make(map[string]*Info)
	}
	k.infos[name] = in
	return in, nil
}

// ParseBuiltin reads modules.builtin: a path on each line.
func ParseBuiltin(data []byte) map[string]bool {
	m := make(map[string]bool)
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSpace(line); line != "" {
			m[Name(line)] = true
		}
	}
	return m
}

// Dir is the folder of a kernel's modules in an image.
func Dir(release string) string { return "usr/lib/modules/" + release }

// Select makes the list of an image: the wanted modules and what they depend
// on. Modules of always are loaded on every machine, those of hardware where
// a device asks for them. Names that are built in are satisfied; names that
// the kernel does not have at all are told, all at once.
func (k *Kernel) Select(hardware, always []string) (*modlist.List, error) {
	var unknown []string
	chosen := make(map[string]bool)
	forced := make(map[string]bool)
	visit := func(names []string, force bool) {
		for _, n := range names {
			n = Name(n)
			switch {
			case k.Paths[n] != "":
				chosen[n] = true
				forced[n] = forced[n] || force
			case !k.Builtin[n]:
				unknown = append(unknown, n)
			}
		}
	}
	visit(hardware, false)
	visit(always, true)
	if len(unknown) > 0 {
		return nil, fmt.Errorf("kernel %s has no module %s", k.Release, strings.Join(unknown, ", "))
	}
	list := &modlist.List{Release: k.Release}
	done := make(map[string]bool)
	queue := make([]string, 0, len(chosen))
	for n := range chosen {
		queue = append(queue, n)
	}
	sort.Strings(queue)
	for len(queue) > 0 {
		n := queue[0]
		queue = queue[1:]
		if done[n] {
			continue
		}
		done[n] = true
		deps, err := k.order(n)
		if err != nil {
			return nil, err
		}
		queue = append(queue, deps...)
		info, err := k.info(n)
		if err != nil {
			return nil, err
		}
		m := modlist.Module{Name: n, Path: "/" + Dir(k.Release) + "/" + uncompressed(k.Paths[n]), Deps: deps, Always: forced[n]}
		for _, a := range info.Aliases {
			if strings.Contains(a, ":") { // a device's; the others are asked for by the kernel's modprobe, which the image lacks
				m.Aliases = append(m.Aliases, a)
			}
		}
		slices.Sort(m.Aliases)
		m.Aliases = slices.Compact(m.Aliases)
		list.Modules = append(list.Modules, m)
	}
	sort.Slice(list.Modules, func(i, j int) bool { return list.Modules[i].Name < list.Modules[j].Name })
	return list, nil
}

func uncompressed(p string) string {
	return strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(p, ".xz"), ".zst"), ".gz")
}

// order is all that must be loaded before the module, in load order.
func (k *Kernel) order(name string) ([]string, error) {
	var out []string
	state := map[string]int{} // 1: being visited, 2: done
	var visit func(n, from string) error
	visit = func(n, from string) error {
		m, err := k.info(n)
		switch {
		case err != nil:
			return err
		case m == nil && k.Builtin[n]:
			return nil
		case m == nil:
			return fmt.Errorf("module %s needs %s, which kernel %s does not have", from, n, k.Release)
		case state[n] == 1:
			return fmt.Errorf("modules %s and %s need each other", from, n)
		case state[n] == 2:
			return nil
		}
		state[n] = 1
		for _, pre := range m.Pre {
			s, err := k.softDependency(pre)
			if err != nil {
				return err
			}
			if s == "" || state[s] == 1 {
				continue
			}
			if err := visit(s, n); err != nil {
				return err
			}
		}
		for _, d := range m.Depends {
			if err := visit(d, n); err != nil {
				return err
			}
		}
		state[n] = 2
		out = append(out, n)
		return nil
	}
	if err := visit(name, name); err != nil {
		return nil, err
	}
	return out[:len(out)-1], nil
}

// softDependency is the module for a name or alias of a soft dependency, or
// "" when the kernel has it built in or not at all. Several modules may offer
// one alias, as crc32c_generic and crc32c_intel do "crc32c"; the generic one
// runs on every machine. Only algorithms are asked for by alias, so only
// their folders are searched.
func (k *Kernel) softDependency(alias string) (string, error) {
	n := Name(alias)
	if k.Builtin[n] {
		return "", nil
	}
	if k.Paths[n] != "" {
		return n, nil
	}
	var offers []string
	for n, p := range k.Paths {
		if !strings.Contains(p, "/crypto/") && !strings.HasPrefix(p, "kernel/lib/") {
			continue
		}
		m, err := k.info(n)
		if err != nil {
			return "", err
		}
		if slices.Contains(m.Aliases, alias) {
			offers = append(offers, n)
		}
	}
	if len(offers) == 0 {
		return "", nil
	}
	sort.Strings(offers)
	for _, n := range offers {
		if strings.HasSuffix(n, "_generic") {
			return n, nil
		}
	}
	return offers[0], nil
}
