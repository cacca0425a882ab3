package debian

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"mosimg/internal/fault"
)

// Package is one entry of a Packages index.
type Package struct {
	Name, Version, Arch string
	Source              string // source package and version: "linux 6.12.1-1"
	Suite               string // the suite that it was found in
	Depends, PreDepends string
	Provides            string
	Filename            string // under the archive's root
	Size                int64
	SHA256              string
	// Base is the URL of the archive's root. It is not stored: the same
	// package may come from another mirror tomorrow.
	Base string `json:"-"`
}

// ReadPackages reads a Packages index and calls each for every package that
// runs on arch (a Debian architecture).
func ReadPackages(r io.Reader, arch string, each func(*Package)) error {
	return ReadControl(r, func(p Paragraph) error {
		k := &Package{}
		var source string
		for _, f := range p { // one pass: this runs for 70000 paragraphs
			switch f.Name {
			case "Package":
				k.Name = f.Value
			case "Version":
				k.Version = f.Value
			case "Architecture":
				k.Arch = f.Value
			case "Source":
				source = f.Value
			case "Depends":
				k.Depends = f.Value
			case "Pre-Depends":
				k.PreDepends = f.Value
			case "Provides":
				k.Provides = f.Value
			case "Filename":
				k.Filename = f.Value
			case "SHA256":
				k.SHA256 = f.Value
			case "Size":
				n, err := strconv.ParseInt(f.Value, 10, 64)
				if err != nil || n < 0 {
					return fmt.Errorf("package %s: size %q is not a number of bytes", k.Name, f.Value)
				}
				k.Size = n
			}
		}
		if k.Arch != arch && k.Arch != "all" {
			return nil
		}
		if k.Name == "" || k.Version == "" || k.Filename == "" || len(k.SHA256) != 64 {
			return fmt.Errorf("package %q: entry without name, version, file name or SHA256", k.Name)
		}
		if strings.Contains("/"+k.Filename+"/", "/../") || strings.HasPrefix(k.Filename, "/") {
			return fmt.Errorf("package %s: file name %q leaves the archive", k.Name, k.Filename)
		}
		k.Source = sourceOf(k.Name, k.Version, source)
		each(k)
		return nil
	})
}

// sourceOf spells the source package as "name version". The field is absent
// when it is the same as the package's own name and version, and has the
// version in brackets when only that differs.
func sourceOf(name, version, field string) string {
	if field == "" {
		return name + " " + version
	}
	src, v, ok := strings.Cut(field, " ")
	if !ok {
		return src + " " + version
	}
	return src + " " + strings.Trim(v, "()")
}

// Index is the packages of one or more suites.
type Index struct {
	byName   map[string][]*Package
	provides map[string][]provided // by the virtual name
	suites   []string
}

type provided struct {
	by      *Package
	version string // "" for an unversioned Provides, which satisfies no condition
}

// NewIndex is an empty Index.
func NewIndex() *Index {
	return &Index{byName: make(map[string][]*Package), provides: make(map[string][]provided)}
}

// AddSuite notes a suite for messages.
func (x *Index) AddSuite(name string) { x.suites = append(x.suites, name) }

// Add puts a package in.
func (x *Index) Add(p *Package) {
	x.byName[p.Name] = append(x.byName[p.Name], p)
	if p.Provides == "" {
		return
	}
	all, err := ParseDepends(p.Provides)
	if err != nil {
		return // an odd Provides makes this package unfindable by it, no more
	}
	for _, d := range all {
		x.provides[d[0].Name] = append(x.provides[d[0].Name], provided{p, d[0].Version})
	}
}

// Newest is the newest package that satisfies d, by its own name or, when
// there is none, by what it provides. nil when there is none at all.
func (x *Index) Newest(d Dependency) *Package {
	var best *Package
	for _, p := range x.byName[d.Name] {
		if d.Allows(p.Version) && (best == nil || CompareVersions(p.Version, best.Version) > 0) {
			best = p
		}
	}
	if best != nil {
		return best
	}
	for _, v := range x.provides[d.Name] {
		if d.Op != "" && (v.version == "" || !d.Allows(v.version)) {
			continue
		}
		// Equal candidates are decided by name, so that the choice does
		// not depend on the order of the index.
		if best == nil || v.by.Name < best.Name || v.by.Name == best.Name && CompareVersions(v.by.Version, best.Version) > 0 {
			best = v.by
		}
	}
	return best
}

// Get is the newest package of that name, or a fault that names the suites.
func (x *Index) Get(name string) (*Package, error) {
	if p := x.Newest(Dependency{Name: name}); p != nil {
		return p, nil
	}
	return nil, fault.New(fault.NotFound, "look up package", name, "there is no such package in "+strings.Join(x.suites, ", "), "check the profile's package names")
}

// Closure is the named packages and everything that they depend on, in the
// order found. follow decides whether a dependency is taken; nil takes all.
func (x *Index) Closure(names []string, follow func(from *Package, d Dependency) bool) ([]*Package, error) {
	var out []*Package
	taken := make(map[string]*Package)
	take := func(p *Package) {
		if taken[p.Name] == nil {
			taken[p.Name] = p
			out = append(out, p)
		}
	}
	for _, n := range names {
		p, err := x.Get(n)
		if err != nil {
			return nil, err
		}
		take(p)
	}
	for i := 0; i < len(out); i++ {
		p := out[i]
		deps, err := ParseDepends(p.PreDepends + "," + p.Depends)
		if err != nil {
			return nil, fault.New(fault.Untrusted, "read dependencies of", p.Name, err, "")
		}
		for _, alternatives := range deps {
			d, err := x.choose(p, alternatives, taken, follow)
			if err != nil {
				return nil, err
			}
			if d != nil {
				take(d)
			}
		}
	}
	return out, nil
}

var errConflict = errors.New("version conflict")

// choose picks the package for one dependency: what is taken already when it
// fits, else the first alternative that exists. nil when follow wants none.
func (x *Index) choose(from *Package, alternatives []Dependency, taken map[string]*Package, follow func(*Package, Dependency) bool) (*Package, error) {
	var wanted []Dependency
	for _, d := range alternatives {
		if follow == nil || follow(from, d) {
			wanted = append(wanted, d)
		}
	}
	if len(wanted) == 0 {
		return nil, nil
	}
	var conflict *Package
	for _, d := range wanted {
		if t := taken[d.Name]; t != nil {
			if d.Allows(t.Version) {
				return t, nil
			}
			conflict = t
		}
	}
	for _, d := range wanted {
		if p := x.Newest(d); p != nil && (taken[p.Name] == nil || taken[p.Name] == p) {
			return p, nil
		}
	}
	text := make([]string, len(wanted))
	for i, d := range wanted {
		text[i] = d.String()
	}
	if conflict != nil {
		return nil, fault.New(fault.NotFound, "resolve package", from.Name,
			fmt.Errorf("%w: it needs %s, but %s %s is taken", errConflict, strings.Join(text, " | "), conflict.Name, conflict.Version),
			"the mirror's suites do not fit together; wait for its next update or try another --mirror")
	}
	return nil, fault.New(fault.NotFound, "resolve package", from.Name,
		fmt.Sprintf("it needs %s, and no such package is in %s", strings.Join(text, " | "), strings.Join(x.suites, ", ")), "try another --mirror")
}
