// Package elfclosure finds the shared libraries that programs need, among
// files in memory, by reading ELF headers. Nothing is executed, so it works
// for foreign architectures, and it looks only where it is told, so no
// library of the build host gets into an image.
package elfclosure

import (
	"bytes"
	"debug/elf"
	"embed"
	"fmt"
	"path"
	"sort"
	"strings"
)

// Source is this package's code: results in the build cache depend on it.
//
//go:embed *.go
var Source embed.FS

// Files are the files to look in, by clean relative name. A File with Link
// is a symbolic link.
type Files map[string]File

// File is one file.
type File struct {
	Data []byte
	Link string
}

// libraryDirs are where the dynamic loader looks, in a tree with merged /usr.
// %s is the multiarch triplet.
var libraryDirs = []string{"usr/lib/%s", "usr/lib64", "usr/lib"}

// triplets name Debian's multiarch folder for a machine.
var triplets = map[elf.Machine]string{elf.EM_X86_64: "x86_64-linux-gnu", elf.EM_386: "i386-linux-gnu"}

// IsELF says whether data is an ELF file.
func IsELF(data []byte) bool { return bytes.HasPrefix(data, []byte(elf.ELFMAG)) }

// Library is one shared library that something needs.
type Library struct {
	Name string // as it is asked for: "libc.so.6"
	Path string // of the regular file in Files
}

// Resolve gives the libraries that the programs need, directly or not, sorted
// by name. Every program and library must be for machine. The dynamic loader
// is one of the libraries.
func (f Files) Resolve(programs []string, machine elf.Machine) ([]Library, error) {
	triplet, ok := triplets[machine]
	if !ok {
		return nil, fmt.Errorf("%v is not a machine that images are built for", machine)
	}
	dirs := make([]string, len(libraryDirs))
	for i, d := range libraryDirs {
		dirs[i] = strings.ReplaceAll(d, "%s", triplet)
	}
	found := make(map[string]Library)
	queue := append([]string(nil), programs...)
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		needs, extra, err := f.needs(name, machine)
		if err != nil {
			return nil, err
		}
		for _, lib := range needs {
			if _, ok := found[lib]; ok {
				continue
			}
			at, err := f.find(lib, append(extra, dirs...))
			if err != nil {
				return nil, fmt.Errorf("%s needs %s: %w", name, lib, err)
			}
			found[lib] = Library{lib, at}
			queue = append(queue, at)
		}
	}
	libs := make([]Library, 0, len(found))
	for _, l := range found {
		libs = append(libs, l)
	}
	sort.Slice(libs, func(i, j int) bool { return libs[i].Name < libs[j].Name })
	return libs, nil
}

// needs reads what one file asks for, and folders of its own to look in.
func (f Files) needs(name string, machine elf.Machine) (libs, dirs []string, err error) {
	at, err := f.follow(name)
	if err != nil {
		return nil, nil, err
	}
	e, err := elf.NewFile(bytes.NewReader(f[at].Data))
	if err != nil {
		return nil, nil, fmt.Errorf("%s is not a readable ELF file: %w", name, err)
	}
	if e.Machine != machine {
		return nil, nil, fmt.Errorf("%s is for %v, the image is for %v", name, e.Machine, machine)
	}
	if libs, err = e.ImportedLibraries(); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	for _, p := range e.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		interp := make([]byte, min(p.Filesz, 4096))
		if _, err := p.ReadAt(interp, 0); err != nil {
			return nil, nil, fmt.Errorf("%s: read its loader's name: %w", name, err)
		}
		libs = append(libs, path.Base(strings.TrimRight(string(interp), "\x00")))
	}
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		values, _ := e.DynString(tag) // absent in a static program
		for _, v := range values {
			for d := range strings.SplitSeq(v, ":") {
				d = strings.NewReplacer("$ORIGIN", "/"+path.Dir(at), "${ORIGIN}", "/"+path.Dir(at)).Replace(d)
				dirs = append(dirs, strings.TrimPrefix(path.Clean(d), "/"))
			}
		}
	}
	return libs, dirs, nil
}

func (f Files) find(lib string, dirs []string) (string, error) {
	for _, d := range dirs {
		name := path.Join(d, lib)
		if _, ok := f[name]; ok {
			return f.follow(name)
		}
	}
	return "", fmt.Errorf("no package that was looked in has it")
}

// follow resolves symbolic links to a regular file.
func (f Files) follow(name string) (string, error) {
	for range 16 {
		file, ok := f[name]
		switch {
		case !ok:
			return "", fmt.Errorf("%s is not there", name)
		case file.Link == "":
			return name, nil
		case path.IsAbs(file.Link):
			name = strings.TrimPrefix(path.Clean(file.Link), "/")
		default:
			name = path.Join(path.Dir(name), file.Link)
		}
	}
	return "", fmt.Errorf("%s: too many symbolic links", name)
}
