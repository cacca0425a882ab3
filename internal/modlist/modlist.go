// Package modlist is the list of kernel modules in an image: the builder
// writes it from modules.dep and modules.alias, the node's init reads it to
// load just what its hardware asks for, dependencies first. It replaces kmod
// and udev, which the image does not carry.
package modlist

import (
	"encoding/json"
	"fmt"
	"path"
	"sort"
)

// Path is where the list lies in an image.
const Path = "/usr/lib/mosimg/modules.json"

// Module is one kernel module of the image.
type Module struct {
	Name string `json:"name"` // as lsmod prints it: with underscores
	Path string `json:"path"` // absolute in the image, uncompressed .ko
	// Deps are the names of the modules that must be loaded before this
	// one, all of them (not only direct ones), in load order.
	Deps []string `json:"deps,omitempty"`
	// Aliases are patterns from modules.alias ("pci:v00008086d*...").
	Aliases []string `json:"aliases,omitempty"`
	// Always is set for modules that no hardware asks for: what CRIU and
	// the agent need, and file systems.
	Always bool `json:"always,omitempty"`
	// Params are module parameters, as in "numdummies=0".
	Params string `json:"params,omitempty"`
}

// List is all modules of an image, for one kernel release.
type List struct {
	Release string   `json:"release"`
	Modules []Module `json:"modules"` // sorted by name
}

// Marshal is the list as the image stores it.
func (l *List) Marshal() ([]byte, error) { return json.MarshalIndent(l, "", " ") }

// Parse reads what Marshal wrote and checks that every dependency is there.
func Parse(data []byte) (*List, error) {
	l := new(List)
	if err := json.Unmarshal(data, l); err != nil {
		return nil, fmt.Errorf("module list: %w", err)
	}
	byName := l.index()
	for _, m := range l.Modules {
		for _, d := range m.Deps {
			if byName[d] == nil {
				return nil, fmt.Errorf("module list: %s needs %s, which is not in the image", m.Name, d)
			}
		}
	}
	return l, nil
}

func (l *List) index() map[string]*Module {
	byName := make(map[string]*Module, len(l.Modules))
	for i := range l.Modules {
		byName[l.Modules[i].Name] = &l.Modules[i]
	}
	return byName
}

// Always is the plan for the modules that are loaded on every machine.
func (l *List) Always() []Module {
	return l.plan(func(m *Module) bool { return m.Always })
}

// ForHardware is the plan for devices with these modaliases (the contents of
// /sys/devices/**/modalias).
func (l *List) ForHardware(modaliases []string) []Module {
	return l.plan(func(m *Module) bool {
		for _, pattern := range m.Aliases {
			for _, a := range modaliases {
				if ok, err := path.Match(pattern, a); err == nil && ok {
					return true
				}
			}
		}
		return false
	})
}

// Named is the plan for modules by name; unknown names are returned apart.
func (l *List) Named(names ...string) (plan []Module, unknown []string) {
	want := make(map[string]bool)
	byName := l.index()
	for _, n := range names {
		if byName[n] == nil {
			unknown = append(unknown, n)
		}
		want[n] = true
	}
	return l.plan(func(m *Module) bool { return want[m.Name] }), unknown
}

// plan orders the wanted modules and what they need: dependencies first,
// each module once, otherwise by name, so that equal machines load equally.
func (l *List) plan(want func(*Module) bool) []Module {
	byName := l.index()
	names := make([]string, 0, len(l.Modules))
	for i := range l.Modules {
		if want(&l.Modules[i]) {
			names = append(names, l.Modules[i].Name)
		}
	}
	sort.Strings(names)
	var out []Module
	done := make(map[string]bool)
	add := func(n string) {
		if m := byName[n]; m != nil && !done[n] {
			done[n] = true
			out = append(out, *m)
		}
	}
	for _, n := range names {
		for _, d := range byName[n].Deps {
			add(d)
		}
		add(n)
	}
	return out
}
