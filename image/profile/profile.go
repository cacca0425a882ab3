// Package profile says what an image is built from. Profiles are YAML: a few
// are built in, a user's own is a file that changes some keys of one of them.
// All faults of a file are told at once, with their lines.
package profile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"mosimg/configs"
	"mosimg/internal/fault"
)

// Profile is what an image is built from.
type Profile struct {
	// Name is the built-in profile's name, or the file's without ".yaml".
	Name string `yaml:"-"`
	// Base is the built-in profile that the absent keys are taken from;
	// "" means Default.
	Base string `yaml:"base"`
	// Arch is the GOARCH of the machines.
	Arch string `yaml:"arch"`
	// Suite is the Debian suite; its updates and security suites belong to it.
	Suite     string   `yaml:"suite"`
	Kernel    Kernel   `yaml:"kernel"`
	Modules   Modules  `yaml:"modules"`
	CRIU      CRIU     `yaml:"criu"`
	Boot      Boot     `yaml:"boot"`
	Utilities []string `yaml:"utilities"` // u-root commands
	Tools     []string `yaml:"tools"`     // links to the agent in /usr/bin
	Head      Head     `yaml:"head"`
}

// Kernel names the kernel.
type Kernel struct {
	Package string   `yaml:"package"` // an image package, or one that depends on it
	Args    []string `yaml:"args"`    // words for its command line
}

// Modules names kernel modules, without what they depend on.
type Modules struct {
	Hardware []string `yaml:"hardware"` // loaded where a device asks for them, or by name
	Always   []string `yaml:"always"`   // loaded on every machine
}

// CRIU names the package with the criu program.
type CRIU struct {
	Package string `yaml:"package"`
}

// Boot names the boot loaders.
type Boot struct {
	Package string            `yaml:"package"`
	Files   map[string]string `yaml:"files"` // name in boot/ -> file of the package
}

// Head says what is in the head archive besides mosimg and the image set.
type Head struct {
	Packages []HeadPackage     `yaml:"packages"`
	Follow   []string          `yaml:"follow"` // patterns for dependencies that are taken whole
	Links    map[string]string `yaml:"links"`  // symbolic links: name -> target
}

// HeadPackage is one package of the head's user land.
type HeadPackage struct {
	Name string   `yaml:"name"`
	Only []string `yaml:"only"` // files to take; none means all but documentation
}

// Default is the profile that is used when none is named.
const Default = "x86_64"

// Names are the built-in profiles.
func Names() []string {
	entries, _ := fs.ReadDir(configs.Profiles, "profiles")
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".yaml"))
	}
	return names
}

// maxFile bounds a profile; the built-in one has 3 kB.
const maxFile = 1 << 20

// Load reads a built-in profile by name, or a file: what has a slash or ends
// in .yaml or .yml is a file.
func Load(name string) (*Profile, error) {
	if !strings.ContainsRune(name, '/') && !strings.HasSuffix(name, ".yaml") && !strings.HasSuffix(name, ".yml") {
		return builtin(name)
	}
	f, err := os.Open(name)
	var data []byte
	if err == nil {
		defer f.Close()
		data, err = io.ReadAll(io.LimitReader(f, maxFile+1))
	}
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("the file has more than %d bytes", maxFile)
	}
	if err != nil {
		var p *fs.PathError
		if errors.As(err, &p) {
			err = p.Err
		}
		return nil, fault.New(fault.Usage, "read profile", name, err, "")
	}
	base := path.Base(name)
	return Parse(strings.TrimSuffix(strings.TrimSuffix(base, ".yaml"), ".yml"), data)
}

func builtin(name string) (*Profile, error) {
	data, err := configs.Profiles.ReadFile("profiles/" + name + ".yaml")
	if err != nil {
		return nil, fault.New(fault.Usage, "read profile", strconv.Quote(name), "there is no built-in profile of that name",
			"there are: "+strings.Join(Names(), ", ")+"; or name a .yaml file")
	}
	p := &Profile{}
	if err := p.decode(data); err != nil {
		return nil, fault.New(fault.Internal, "read profile", name, err, "")
	}
	p.Name = name
	return p, nil
}

// Parse reads a user's profile: what it leaves out comes from its base.
func Parse(name string, data []byte) (*Profile, error) {
	bad := func(err error) error {
		return fault.New(fault.Usage, "read profile", name, err, "the built-in ones show all keys: configs/profiles/"+Default+".yaml")
	}
	var head struct {
		Base string `yaml:"base"`
	}
	_ = yaml.Unmarshal(data, &head) // its faults are told below
	if head.Base == "" {
		head.Base = Default
	}
	p, err := builtin(head.Base)
	if err != nil {
		return nil, bad(err)
	}
	// A map in the file is meant whole: merging would make it impossible
	// to leave a boot loader out.
	inherited := *p
	p.Boot.Files, p.Head.Links = nil, nil
	if err := p.decode(data); err != nil {
		return nil, bad(err)
	}
	if p.Boot.Files == nil {
		p.Boot.Files = inherited.Boot.Files
	}
	if p.Head.Links == nil {
		p.Head.Links = inherited.Head.Links
	}
	p.Name = name
	return p, nil
}

// decode reads data over what is in p, and checks all of p.
func (p *Profile) decode(data []byte) error {
	var all fault.List
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	err := dec.Decode(p)
	var types *yaml.TypeError
	switch {
	case errors.Is(err, io.EOF): // an empty file changes nothing
	case errors.As(err, &types):
		for _, e := range types.Errors {
			all.Add(errors.New(plain(e)))
		}
	case err != nil:
		return errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	var root yaml.Node
	_ = yaml.Unmarshal(data, &root)
	p.check(func(at, format string, args ...any) {
		where := at
		if line := lineOf(&root, at); line > 0 {
			where = fmt.Sprintf("line %d: %s", line, at)
		}
		all.Addf("%s: %s", where, fmt.Sprintf(format, args...))
	})
	if all.Len() == 0 {
		return nil
	}
	var f *fault.Error
	if errors.As(all.Err(fault.Usage, "", "", ""), &f) {
		return f.Err
	}
	return nil
}

var (
	unknownKey = regexp.MustCompile(`^(line \d+): field (\S+) not found in type \S+$`)
	wrongType  = regexp.MustCompile("^(line \\d+): cannot unmarshal !!(\\S+) (?:`(.*)` )?into (\\S+)$")
)

// plain says a fault of the YAML decoder in words of the file, not of Go.
func plain(e string) string {
	if m := unknownKey.FindStringSubmatch(e); m != nil {
		return fmt.Sprintf("%s: unknown key %q", m[1], m[2])
	}
	if m := wrongType.FindStringSubmatch(e); m != nil {
		want := "keys and values"
		switch {
		case strings.HasPrefix(m[4], "[]"):
			want = "a list"
		case m[4] == "string":
			want = "a word"
		}
		got := map[string]string{"str": "the word", "seq": "a list", "map": "keys and values", "int": "the number"}[m[2]]
		if got == "" {
			got = "a value of type " + m[2]
		}
		if m[3] != "" {
			got += fmt.Sprintf(" %q", m[3])
		}
		return fmt.Sprintf("%s: must be %s, not %s", m[1], want, got)
	}
	return e
}

// lineOf finds the line of a key like "head.packages[1].name", or of the
// nearest thing around it that the file has; 0 when it has nothing.
func lineOf(root *yaml.Node, at string) int {
	if len(root.Content) == 0 {
		return 0
	}
	node, line := root.Content[0], 0
	for _, part := range strings.FieldsFunc(at, func(r rune) bool { return r == '.' || r == '[' || r == ']' }) {
		var next *yaml.Node
		switch node.Kind {
		case yaml.MappingNode:
			for i := 0; i+1 < len(node.Content); i += 2 {
				if node.Content[i].Value == part {
					next, line = node.Content[i+1], node.Content[i].Line
				}
			}
		case yaml.SequenceNode:
			if n, err := strconv.Atoi(part); err == nil && n < len(node.Content) {
				next, line = node.Content[n], node.Content[n].Line
			}
		}
		if next == nil {
			return line
		}
		node = next
	}
	return line
}

var (
	packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	suiteName   = regexp.MustCompile(`^[a-z][a-z0-9]*$`)
	moduleName  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]*$`)
	commandName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]*$`)
)

// Archs are the architectures that an image can be for, by GOARCH, with
// Debian's name.
var Archs = map[string]string{"amd64": "amd64", "386": "i386"}

// check tells every value that cannot be built from.
func (p *Profile) check(bad func(at, format string, args ...any)) {
	match := func(at, value string, re *regexp.Regexp, what string) {
		if !re.MatchString(value) {
			bad(at, "%q is not the name of %s", value, what)
		}
	}
	each := func(at string, values []string, re *regexp.Regexp, what string) {
		for i, v := range values {
			match(fmt.Sprintf("%s[%d]", at, i), v, re, what)
		}
	}
	if Archs[p.Arch] == "" {
		bad("arch", "%q is not amd64 or 386", p.Arch)
	}
	match("suite", p.Suite, suiteName, "a Debian suite")
	match("kernel.package", p.Kernel.Package, packageName, "a Debian package")
	for i, a := range p.Kernel.Args {
		if a == "" || strings.ContainsAny(a, " \t\n\"") {
			bad(fmt.Sprintf("kernel.args[%d]", i), "%q is not one word", a)
		}
	}
	each("modules.hardware", p.Modules.Hardware, moduleName, "a kernel module")
	each("modules.always", p.Modules.Always, moduleName, "a kernel module")
	match("criu.package", p.CRIU.Package, packageName, "a Debian package")
	match("boot.package", p.Boot.Package, packageName, "a Debian package")
	for _, name := range sortedKeys(p.Boot.Files) {
		if path.Base(name) != name || !fs.ValidPath(name) || name == "." {
			bad("boot.files."+name, "%q is not a plain file name", name)
		}
		if from := p.Boot.Files[name]; !fs.ValidPath(from) {
			bad("boot.files."+name, "%q is not the path of a file in the package, like usr/lib/x", from)
		}
	}
	each("utilities", p.Utilities, commandName, "a u-root command")
	if !slices.Contains(p.Utilities, "gosh") {
		bad("utilities", "gosh, the shell, must be among them")
	}
	each("tools", p.Tools, commandName, "a tool")
	for i, h := range p.Head.Packages {
		at := fmt.Sprintf("head.packages[%d]", i)
		match(at+".name", h.Name, packageName, "a Debian package")
		for j, f := range h.Only {
			if !fs.ValidPath(f) {
				bad(fmt.Sprintf("%s.only[%d]", at, j), "%q is not the path of a file in the package, like usr/bin/x", f)
			}
		}
	}
	for i, f := range p.Head.Follow {
		if _, err := path.Match(f, ""); err != nil || f == "" {
			bad(fmt.Sprintf("head.follow[%d]", i), "%q is not a pattern", f)
		}
	}
	for _, name := range sortedKeys(p.Head.Links) {
		if !fs.ValidPath(name) || name == "." || p.Head.Links[name] == "" {
			bad("head.links", "%q -> %q is not a link, like usr/bin/awk: mawk", name, p.Head.Links[name])
		}
	}
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
