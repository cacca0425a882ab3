package image

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/therootcompany/xz"

	"mosimg/image/debian"
	"mosimg/image/steps"
	"mosimg/initramfs/archive"
	"mosimg/initramfs/elfclosure"
	"mosimg/initramfs/kmod"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/internal/modlist"
)

// kernelStep takes the kernel and the chosen modules out of their package.
func (b *builder) kernelStep() *steps.Step {
	pkg, p := b.lock.Kernel, b.Profile
	return &steps.Step{
		Name: stepKernel,
		Code: []fs.FS{source, debian.Source, archive.Source, kmod.Source},
		Inputs: b.common(pin(map[string]string{
			"profile modules.hardware": list(p.Modules.Hardware), "profile modules.always": list(p.Modules.Always),
		}, pkg)),
		Run: func(ctx context.Context, job *steps.Job) error {
			c, err := b.open(ctx, job, []*debian.Package{pkg}, func(name string) bool {
				return strings.HasPrefix(name, "boot/vmlinuz-") || strings.HasPrefix(name, "usr/lib/modules/")
			})
			if err != nil {
				return err
			}
			k, vmlinuz, err := kernelOf(c)
			if err != nil {
				return fmt.Errorf("package %s %s: %w", pkg.Name, pkg.Version, err)
			}
			if err := os.WriteFile(job.Path(imageset.Kernel), vmlinuz, 0o644); err != nil {
				return err
			}
			modules, err := k.Select(p.Modules.Hardware, p.Modules.Always)
			if err != nil {
				return fault.New(fault.Usage, "choose kernel modules of profile", p.Name, err, "correct modules.hardware or modules.always")
			}
			t := &archive.Tree{MTime: b.mtime}
			for _, m := range modules.Modules {
				ko, err := k.Read(k.Paths[m.Name])
				if err != nil {
					return err
				}
				t.File(strings.TrimPrefix(m.Path, "/"), 0o644, ko)
			}
			table, err := modules.Marshal()
			if err != nil {
				return err
			}
			t.File(strings.TrimPrefix(modlist.Path, "/"), 0o644, table)
			part, err := writeArchive(job, t, "kernel modules")
			if err != nil {
				return err
			}
			size := int64(len(vmlinuz))
			return writeInfo(job, info{
				KernelRelease: k.Release, Licences: c.licences(pkg),
				Parts: []imageset.Part{{Name: "kernel", Size: size, Compressed: size}, part},
			})
		},
	}
}

// kernelOf finds the kernel and its modules among a package's files.
func kernelOf(c *content) (*kmod.Kernel, []byte, error) {
	k := &kmod.Kernel{Paths: make(map[string]string)}
	var vmlinuz []byte
	for name, f := range c.files {
		if release, ok := strings.CutPrefix(name, "boot/vmlinuz-"); ok {
			if vmlinuz != nil {
				return nil, nil, errors.New("it has more than one kernel")
			}
			k.Release, vmlinuz = release, f.data
		}
	}
	if vmlinuz == nil {
		return nil, nil, errors.New("it has no boot/vmlinuz-*")
	}
	if err := checkKernel(vmlinuz); err != nil {
		return nil, nil, err
	}
	root := kmod.Dir(k.Release) + "/"
	for name := range c.files {
		if p, ok := strings.CutPrefix(name, root); ok && strings.Contains(p, ".ko") {
			k.Paths[kmod.Name(p)] = p
		}
	}
	builtin := c.files[root+"modules.builtin"]
	if len(k.Paths) == 0 || builtin == nil {
		return nil, nil, fmt.Errorf("it has no modules for %s", k.Release)
	}
	k.Builtin = kmod.ParseBuiltin(builtin.data)
	k.Read = func(p string) ([]byte, error) { return unpackModule(p, c.files[root+p].data) }
	return k, vmlinuz, nil
}

// checkKernel refuses a file that no 64-bit PC would boot, by the header of
// the Linux boot protocol (Documentation/arch/x86/boot.rst): "HdrS" at 0x202,
// and bit 0 of xloadflags at 0x236 says that there is a 64-bit entry point.
func checkKernel(image []byte) error {
	if len(image) < 0x300 || string(image[0x202:0x206]) != "HdrS" {
		return errors.New("its vmlinuz is not an x86 kernel")
	}
	if binary.LittleEndian.Uint16(image[0x236:])&1 == 0 {
		return errors.New("its vmlinuz is for 32-bit machines")
	}
	return nil
}

// maxModule bounds an unpacked module; the largest, amdgpu, has 30 MB.
const maxModule = 256 << 20

func unpackModule(name string, data []byte) ([]byte, error) {
	var r io.Reader = bytes.NewReader(data)
	switch path.Ext(name) {
	case ".ko":
		return data, nil
	case ".xz":
		x, err := xz.NewReader(r, 0)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		r = x
	default:
		return nil, fmt.Errorf("%s: its compression is not xz", name)
	}
	ko, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(ko) > maxModule {
		err = fmt.Errorf("it unpacks to more than %d bytes", maxModule)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return ko, nil
}

// machines are the ELF machines of our architectures.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "386": elf.EM_386}

// The CRIU bundle. It is run by its own loader, so that it works whatever
// libraries the root file system of the machine or of a job has:
// LOADER --library-path LIB BIN.
const (
	criuDir     = "usr/lib/mosimg/criu"
	criuProgram = "usr/sbin/criu"
)

// criuStep makes the CRIU bundle.
func (b *builder) criuStep() *steps.Step {
	packages := b.lock.CRIU
	return &steps.Step{
		Name: stepCRIU, Inputs: b.common(pin(map[string]string{}, packages...)),
		Code: []fs.FS{source, debian.Source, archive.Source, elfclosure.Source},
		Run: func(ctx context.Context, job *steps.Job) error {
			c, err := b.open(ctx, job, packages, func(name string) bool {
				return name == criuProgram || isLibrary(name)
			})
			if err != nil {
				return err
			}
			files := c.elf()
			libs, err := files.Resolve([]string{criuProgram}, machines[b.Profile.Arch])
			if err != nil {
				return fault.New(fault.Environment, "collect the libraries of", "criu", err, "the mirror's packages do not fit together")
			}
			t := &archive.Tree{MTime: b.mtime}
			used := map[*debian.Package]bool{c.files[criuProgram].pkg: true}
			t.File(criuDir+"/bin/criu", 0o755, c.files[criuProgram].data)
			for _, l := range libs {
				f := c.files[l.Path]
				used[f.pkg] = true
				t.File(criuDir+"/lib/"+l.Name, 0o755, f.data)
			}
			part, err := writeArchive(job, t, "criu")
			if err != nil {
				return err
			}
			return writeInfo(job, info{
				CRIUVersion: upstream(packages[0].Version), Licences: c.licences(keys(packages, used)...),
				Parts: []imageset.Part{part},
			})
		},
	}
}

// isLibrary says whether a file may be one that the dynamic loader finds.
func isLibrary(name string) bool {
	return strings.HasPrefix(name, "usr/lib") && strings.Contains(path.Base(name), ".so")
}

// upstream is a version without epoch and Debian revision.
func upstream(version string) string {
	if _, v, ok := strings.Cut(version, ":"); ok {
		version = v
	}
	if i := strings.LastIndexByte(version, '-'); i > 0 {
		version = version[:i]
	}
	return version
}

// keys are the packages of the list that are in the set, in the list's order.
func keys(packages []*debian.Package, set map[*debian.Package]bool) []*debian.Package {
	var out []*debian.Package
	for _, p := range packages {
		if set[p] {
			out = append(out, p)
		}
	}
	return out
}

// userlandStep makes the head's small user land: some packages whole, of the
// others that they depend on only the shared libraries.
func (b *builder) userlandStep() *steps.Step {
	packages, h := b.lock.Head, b.Profile.Head
	rules, _ := json.Marshal(h)
	return &steps.Step{
		Name: stepUserland,
		Code: []fs.FS{source, debian.Source, archive.Source, elfclosure.Source},
		Inputs: b.common(pin(map[string]string{
			"profile head": string(rules), "number of whole packages": fmt.Sprint(b.lock.HeadWhole),
		}, packages...)),
		Run: func(ctx context.Context, job *steps.Job) error {
			only := make(map[string]map[string]bool)
			for _, w := range h.Packages {
				if w.Only == nil {
					continue
				}
				only[w.Name] = make(map[string]bool)
				for _, f := range w.Only {
					only[w.Name][f] = true
				}
			}
			c, err := b.open(ctx, job, packages, func(string) bool { return true })
			if err != nil {
				return err
			}
			whole := make(map[*debian.Package]bool)
			for _, p := range packages[:b.lock.HeadWhole] {
				whole[p] = true
			}
			t := &archive.Tree{MTime: b.mtime}
			used := make(map[*debian.Package]bool)
			files := c.elf()
			var programs []string
			for name, f := range c.files {
				if !whole[f.pkg] {
					continue
				}
				if o := only[f.pkg.Name]; o != nil {
					if !o[name] {
						continue
					}
					delete(o, name)
				}
				used[f.pkg] = true
				t.Add(archive.Entry{Name: name, Mode: f.mode, Data: f.data, Link: f.link, HardLink: f.hardLink})
				if elfclosure.IsELF(f.data) {
					programs = append(programs, name)
				}
			}
			for pkg, missing := range only {
				for name := range missing {
					return fault.New(fault.Usage, "make the head's user land", pkg, "there is no "+name+" in it", "correct head.packages in the profile")
				}
			}
			libs, err := files.Resolve(programs, machines[b.Profile.Arch])
			if err != nil {
				return fault.New(fault.Environment, "collect the libraries of", "the head's user land", err, "the mirror's packages do not fit together")
			}
			for _, l := range libs {
				f := c.files[l.Path]
				used[f.pkg] = true
				at := l.Path
				if path.Base(at) != l.Name { // the loader looks for this name
					t.Replace(archive.Entry{Name: path.Join(path.Dir(at), l.Name), Mode: fs.ModeSymlink | 0o777, Link: path.Base(at)})
				}
				t.Replace(archive.Entry{Name: at, Mode: 0o755, Data: f.data})
			}
			loader(t, libs)
			for name, target := range h.Links {
				t.Replace(archive.Entry{Name: name, Mode: fs.ModeSymlink | 0o777, Link: target})
			}
			users(t, headUsers)
			t.Add(archive.Entry{Name: "home/demo", Mode: fs.ModeDir | 0o755, UID: 1000, GID: 1000})
			part, err := writeArchive(job, t, "head: user land")
			if err != nil {
				return err
			}
			return writeInfo(job, info{Licences: c.licences(keys(packages, used)...), Parts: []imageset.Part{part}})
		},
	}
}

// loader puts the dynamic loader where the programs' headers name it:
// /lib64/ld-linux-x86-64.so.2, which Debian has as a link.
func loader(t *archive.Tree, libs []elfclosure.Library) {
	for _, l := range libs {
		if strings.HasPrefix(l.Name, "ld-linux") && path.Dir(l.Path) != "usr/lib64" {
			t.Replace(archive.Entry{Name: "usr/lib64/" + l.Name, Mode: fs.ModeSymlink | 0o777, Link: "/" + l.Path})
		}
	}
}
