package debian

import (
	"fmt"
	"strings"
)

// Dependency is one alternative of a Depends field: a package name and
// perhaps a condition on its version.
type Dependency struct {
	Name    string
	Op      string // "", "<<", "<=", "=", ">=", ">>"
	Version string
}

func (d Dependency) String() string {
	if d.Op == "" {
		return d.Name
	}
	return fmt.Sprintf("%s (%s %s)", d.Name, d.Op, d.Version)
}

// Allows says whether version satisfies the condition.
func (d Dependency) Allows(version string) bool {
	c := CompareVersions(version, d.Version)
	switch d.Op {
	case "<<":
		return c < 0
	case "<=":
		return c <= 0
	case "=":
		return c == 0
	case ">=":
		return c >= 0
	case ">>":
		return c > 0
	}
	return true
}

// ParseDepends reads a Depends field: a list, each element the alternatives
// in order of preference. Architecture qualifiers (":any") are dropped.
func ParseDepends(field string) ([][]Dependency, error) {
	var all [][]Dependency
	for clause := range strings.SplitSeq(field, ",") {
		if strings.TrimSpace(clause) == "" {
			continue
		}
		var alternatives []Dependency
		for text := range strings.SplitSeq(clause, "|") {
			d, err := parseDependency(text)
			if err != nil {
				return nil, err
			}
			alternatives = append(alternatives, d)
		}
		all = append(all, alternatives)
	}
	return all, nil
}

func parseDependency(text string) (Dependency, error) {
	bad := fmt.Errorf("dependency %q is not \"name (op version)\"", strings.TrimSpace(text))
	name, condition, conditional := strings.Cut(strings.TrimSpace(text), "(")
	name, _, _ = strings.Cut(strings.TrimSpace(name), ":")
	if name == "" || strings.ContainsAny(name, " \t\n") {
		return Dependency{}, bad
	}
	d := Dependency{Name: name}
	if !conditional {
		return d, nil
	}
	condition, rest, closed := strings.Cut(condition, ")")
	if !closed || strings.TrimSpace(rest) != "" {
		return Dependency{}, bad
	}
	condition = strings.TrimSpace(condition)
	d.Op = condition[:len(condition)-len(strings.TrimLeft(condition, "<=>"))]
	d.Version = strings.TrimSpace(condition[len(d.Op):])
	switch d.Op {
	case "<<", "<=", "=", ">=", ">>":
	default:
		return Dependency{}, bad
	}
	if d.Version == "" {
		return Dependency{}, bad
	}
	return d, nil
}
