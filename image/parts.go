package image

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"mosimg/image/debian"
	"mosimg/image/steps"
	"mosimg/initramfs/archive"
	"mosimg/initramfs/gobuild"
	"mosimg/internal/imageset"
)

// Every step leaves an info file for the manifest, and most of them one
// compressed archive.
const (
	infoName    = "info.json"
	archiveName = "archive.cpio.zst"
)

// info is what a step tells the manifest.
type info struct {
	KernelRelease string            `json:",omitempty"`
	CRIUVersion   string            `json:",omitempty"`
	Parts         []imageset.Part   `json:",omitempty"`
	Licences      map[string]string `json:",omitempty"` // of the packages that were used, by name
	Modules       []imageset.Module `json:",omitempty"`
}

// The steps that the set is put together from.
const (
	stepKernel    = "kernel"
	stepCRIU      = "criu"
	stepBoot      = "boot loaders"
	stepLoaders   = "media loaders"
	stepBase      = "base"
	stepUtilities = "utilities"
	stepAgent     = "agent"
	stepUserland  = "head user land"
	stepTool      = "head tool"
)

// parts makes the steps. They are independent of each other.
func (b *builder) parts() ([]*steps.Step, error) {
	s, err := b.sources()
	if err != nil {
		return nil, err
	}
	list := []*steps.Step{
		b.kernelStep(),
		b.criuStep(),
		b.bootStep(),
		b.baseStep(),
		b.utilitiesStep(s.utilities),
		b.programStep(stepAgent, agentProgram, "usr/bin/mosagent", b.Profile.Tools, s.agent),
		b.userlandStep(),
		b.programStep(stepTool, toolProgram, "usr/bin/mosimg", nil, s.tool),
	}
	if b.hasMedia() {
		loaders, err := b.loadersStep()
		if err != nil {
			return nil, err
		}
		list = append(list, loaders)
	}
	return list, nil
}

// sources are what the programs of the image are made from.
type sources struct{ agent, tool, utilities map[string]string }

// listSources asks go for the sources. It runs beside the work on the index,
// since both mostly wait; the result is for whoever calls b.sources.
func (b *builder) listSources(ctx context.Context) {
	b.sources = sync.OnceValues(func() (s sources, err error) {
		var errs [3]error
		var both sync.WaitGroup
		both.Go(func() { s.agent, errs[0] = b.golang.Sources(ctx, agentProgram) })
		both.Go(func() { s.tool, errs[1] = b.golang.Sources(ctx, toolProgram) })
		s.utilities, errs[2] = b.golang.UtilitySources()
		both.Wait()
		for _, e := range errs {
			err = cmp.Or(err, e)
		}
		return s, err
	})
	go func() { _, _ = b.sources() }() // its fault is told when the result is asked for
}

// The programs of the checkout that go into an image.
const (
	agentProgram = "./cmd/mosagent"
	toolProgram  = "./cmd/mosimg"
)

// common is what every archive depends on.
func (b *builder) common(in map[string]string) map[string]string {
	in["SOURCE_DATE_EPOCH"] = b.epoch
	return in
}

func list(words []string) string { return strings.Join(words, " ") }

func writeInfo(job *steps.Job, in info) error {
	data, err := json.MarshalIndent(in, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(job.Path(infoName), data, 0o644)
}

func readInfo(r *steps.Result) (in info, err error) {
	data, err := os.ReadFile(r.Path(infoName))
	if err != nil {
		return in, err
	}
	return in, json.Unmarshal(data, &in)
}

// writeArchive compresses a tree into the result of a step.
func writeArchive(job *steps.Job, t *archive.Tree, part string) (imageset.Part, error) {
	f, err := os.Create(job.Path(archiveName))
	if err != nil {
		return imageset.Part{}, err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	stat, compressed, err := t.WriteZstd(w)
	if err != nil {
		return imageset.Part{}, err
	}
	if err := w.Flush(); err != nil {
		return imageset.Part{}, err
	}
	return imageset.Part{Name: part, Size: stat.Bytes, Compressed: compressed}, f.Close()
}

// baseStep makes what every image has: folders, links, users, devices.
func (b *builder) baseStep() *steps.Step {
	return &steps.Step{
		Name: stepBase,
		Code: []fs.FS{source, archive.Source},
		Inputs: b.common(map[string]string{
			"profile name": b.Profile.Name, "version": release(),
		}),
		Run: func(_ context.Context, job *steps.Job) error {
			t := &archive.Tree{MTime: b.mtime}
			for _, d := range []string{"dev", "etc/mosimg", "home", "mnt", "proc", "run", "sys", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin", "usr/share", "var/lib", "var/log"} {
				t.Dir(d, 0o755)
			}
			t.Dir("root", 0o700)
			for _, d := range []string{"tmp", "var/tmp"} {
				t.Dir(d, fs.ModeSticky|0o777)
			}
			for _, d := range []string{"bin", "sbin", "lib", "lib64"} {
				t.Symlink(d, "usr/"+d)
			}
			t.Symlink("var/run", "../run")
			t.Symlink("init", "usr/bin/mosagent")
			// The kernel opens the console before anybody can mount devtmpfs.
			device := func(name string, perm fs.FileMode, major, minor uint32) {
				t.Add(archive.Entry{Name: name, Mode: fs.ModeDevice | fs.ModeCharDevice | perm, Major: major, Minor: minor})
			}
			device("dev/console", 0o600, 5, 1)
			device("dev/null", 0o666, 1, 3)
			users(t, nodeUsers)
			t.File("etc/hosts", 0o644, []byte("127.0.0.1\tlocalhost\n::1\tlocalhost\n"))
			t.File("etc/nsswitch.conf", 0o644, []byte("passwd: files\ngroup: files\nhosts: files dns\n"))
			t.File("etc/os-release", 0o644, fmt.Appendf(nil, "ID=mosimg\nNAME=mosimg\nPRETTY_NAME=\"mosimg %s (%s)\"\nVERSION_ID=%q\nVARIANT_ID=%s\n", release(), b.Profile.Name, release(), b.Profile.Name))
			about, err := json.Marshal(map[string]string{"profile": b.Profile.Name, "version": release()})
			if err != nil {
				return err
			}
			t.File("etc/mosimg/image.json", 0o644, append(about, '\n'))
			part, err := writeArchive(job, t, "base")
			if err != nil {
				return err
			}
			return writeInfo(job, info{Parts: []imageset.Part{part}})
		},
	}
}

// user is a line of passwd and one of group.
type user struct {
	name       string
	id         int
	home, text string
	shell      string
}

var (
	nodeUsers = []user{
		{"root", 0, "/root", "root", "/bin/sh"},
		{"nobody", 65534, "/nonexistent", "nobody", "/usr/sbin/nologin"},
	}
	headUsers = append(slices.Clip(nodeUsers), user{"demo", 1000, "/home/demo", "demonstration", "/bin/sh"})
)

// users writes the user and group databases.
func users(t *archive.Tree, list []user) {
	var passwd, group strings.Builder
	for _, u := range list {
		fmt.Fprintf(&passwd, "%s:x:%d:%d:%s:%s:%s\n", u.name, u.id, u.id, u.text, u.home, u.shell)
		name := u.name
		if u.id == 65534 {
			name = "nogroup"
		}
		fmt.Fprintf(&group, "%s:x:%d:\n", name, u.id)
	}
	group.WriteString("tty:x:5:\ndisk:x:6:\nkvm:x:104:\n")
	t.File("etc/passwd", 0o644, []byte(passwd.String()))
	t.File("etc/group", 0o644, []byte(group.String()))
}

// utilitiesStep makes u-root's commands, in /bbin.
func (b *builder) utilitiesStep(sources map[string]string) *steps.Step {
	in := b.common(map[string]string{"profile utilities": list(b.Profile.Utilities)})
	for k, v := range sources {
		in["source "+k] = v
	}
	return &steps.Step{
		Name: stepUtilities, Inputs: in, Code: []fs.FS{source, archive.Source, gobuild.Source},
		Run: func(ctx context.Context, job *steps.Job) error {
			raw := filepath.Join(job.Tmp, "utilities.cpio")
			if err := b.golang.Utilities(ctx, b.Profile.Utilities, raw, job.Tmp); err != nil {
				return err
			}
			t := &archive.Tree{MTime: b.mtime}
			f, err := os.Open(raw)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := t.AddCPIO(f); err != nil {
				return err
			}
			t.Symlink("usr/bin/sh", "../../bbin/gosh") // the head archive puts a real one there
			part, err := writeArchive(job, t, "utilities")
			if err != nil {
				return err
			}
			modules, err := b.golang.UtilityModules(ctx, b.Profile.Utilities)
			if err != nil {
				return err
			}
			return writeInfo(job, info{Parts: []imageset.Part{part}, Modules: goModules(modules)})
		},
	}
}

func goModules(list []gobuild.Module) []imageset.Module {
	out := make([]imageset.Module, len(list))
	for i, m := range list {
		out[i] = imageset.Module(m)
	}
	return out
}

// programStep builds a command of the checkout, with links by which it is
// other tools.
func (b *builder) programStep(name, pkg, at string, links []string, sources map[string]string) *steps.Step {
	in := b.common(map[string]string{"version": release(), "links": list(links)})
	for k, v := range sources {
		in["source "+k] = v
	}
	return &steps.Step{
		Name: name, Inputs: in, Code: []fs.FS{source, archive.Source, gobuild.Source},
		Run: func(ctx context.Context, job *steps.Job) error {
			program := filepath.Join(job.Tmp, "program")
			if err := b.golang.Program(ctx, pkg, release(), program, job.Tmp); err != nil {
				return err
			}
			data, err := os.ReadFile(program)
			if err != nil {
				return err
			}
			t := &archive.Tree{MTime: b.mtime}
			t.File(at, 0o755, data)
			for _, l := range links {
				t.Symlink("usr/bin/"+l, filepath.Base(at))
			}
			part, err := writeArchive(job, t, name)
			if err != nil {
				return err
			}
			modules, err := gobuild.Modules(program)
			if err != nil {
				return err
			}
			return writeInfo(job, info{Parts: []imageset.Part{part}, Modules: goModules(modules)})
		},
	}
}

// bootStep takes the boot loaders out of their package.
func (b *builder) bootStep() *steps.Step {
	pkg := b.lock.Boot
	in := pin(map[string]string{}, pkg)
	for name, from := range b.Profile.Boot.Files {
		in["profile boot.files."+name] = from
	}
	return &steps.Step{
		Name: stepBoot, Inputs: in, Code: []fs.FS{source, debian.Source},
		Run: func(ctx context.Context, job *steps.Job) error {
			c, err := b.open(ctx, job, []*debian.Package{pkg}, func(string) bool { return true })
			if err != nil {
				return err
			}
			if err := os.Mkdir(job.Path(imageset.BootDir), 0o755); err != nil {
				return err
			}
			for name, from := range b.Profile.Boot.Files {
				data, err := c.read(from)
				if err != nil {
					return fmt.Errorf("boot loader %s: package %s %s: %w", name, pkg.Name, pkg.Version, err)
				}
				if err := os.WriteFile(filepath.Join(job.Path(imageset.BootDir), name), data, 0o644); err != nil {
					return err
				}
			}
			return writeInfo(job, info{Licences: c.licences(pkg)})
		},
	}
}
