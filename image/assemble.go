package image

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"sync"

	"mosimg/image/debian"
	"mosimg/initramfs/archive"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
)

// The archives that make the initramfs, in the order in which the kernel
// unpacks them: base first, for it has the folders and the links into usr;
// the agent last, for it changes most.
var initramfsOrder = []string{stepBase, stepKernel, stepCRIU, stepUtilities, stepAgent}

// headImages is where the head archive has the image set.
const headImages = "usr/share/mosimg/images"

// assemble puts the set together in dir.
func (b *builder) assemble(ctx context.Context, dir string) (*imageset.Manifest, error) {
	m := &imageset.Manifest{
		Format: imageset.Format, Profile: b.Profile.Name, Arch: b.Profile.Arch, Version: release(),
		Created: b.created, Compression: "zstd", KernelArgs: b.Profile.Kernel.Args,
	}
	if err := b.verify(ctx); err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(dir, imageset.BootDir), 0o755); err != nil {
		return nil, err
	}
	add := func(name string, from ...string) error {
		f, err := concat(ctx, filepath.Join(dir, name), from...)
		f.Name = name
		m.Files = append(m.Files, f)
		return err
	}
	if err := add(imageset.Kernel, b.results[stepKernel].Path(imageset.Kernel)); err != nil {
		return nil, err
	}
	boot := b.results[stepBoot]
	for _, name := range sortedNames(b.Profile.Boot.Files) {
		if err := add(imageset.BootDir+"/"+name, boot.Path(imageset.BootDir+"/"+name)); err != nil {
			return nil, err
		}
	}
	var archives []string
	for _, s := range initramfsOrder {
		archives = append(archives, b.results[s].Path(archiveName))
	}
	if err := add(imageset.Initramfs, archives...); err != nil {
		return nil, err
	}
	if err := b.describe(m); err != nil {
		return nil, err
	}
	sortFiles(m)
	m.ID = m.ComputeID()
	if err := b.headArchive(ctx, dir, m); err != nil {
		return nil, err
	}
	if err := b.media(ctx, dir, m); err != nil {
		return nil, err
	}
	sortFiles(m)
	return m, m.Write(dir)
}

// verify makes sure that every part is what it was when it was made.
func (b *builder) verify(ctx context.Context) error {
	var all sync.WaitGroup
	faults := make(chan error, len(b.results))
	for _, r := range b.results {
		all.Go(func() { faults <- r.Verify(ctx) })
	}
	all.Wait()
	for range b.results {
		if err := <-faults; err != nil {
			return err
		}
	}
	return nil
}

func sortFiles(m *imageset.Manifest) {
	slices.SortFunc(m.Files, func(a, b imageset.File) int { return cmp.Compare(a.Name, b.Name) })
}

// describe fills in what the steps say about themselves.
func (b *builder) describe(m *imageset.Manifest) error {
	inNode := map[string]string{stepKernel: "node", stepCRIU: "node", stepBoot: "boot", stepLoaders: "boot", stepUserland: "head"}
	packages := make(map[string]*debian.Package)
	for _, p := range b.lock.all() {
		packages[p.Name] = p
	}
	type use struct{ pkg, by string }
	seen := make(map[use]bool)
	modules := make(map[imageset.Module]bool)
	for _, s := range []string{stepBase, stepKernel, stepCRIU, stepUtilities, stepAgent, stepBoot, stepLoaders, stepUserland, stepTool} {
		if b.results[s] == nil {
			continue // nobody asked for it
		}
		in, err := readInfo(b.results[s])
		if err != nil {
			return err
		}
		m.KernelRelease = cmp.Or(m.KernelRelease, in.KernelRelease)
		m.CRIUVersion = cmp.Or(m.CRIUVersion, in.CRIUVersion)
		m.Parts = append(m.Parts, in.Parts...)
		for _, g := range in.Modules {
			modules[g] = true
		}
		for _, name := range sortedNames(in.Licences) {
			p := packages[name]
			if p == nil {
				return fault.New(fault.Internal, "describe", name, "it is used but was not resolved", "")
			}
			if u := (use{name, inNode[s]}); !seen[u] {
				seen[u] = true
				m.Packages = append(m.Packages, imageset.Package{
					Name: p.Name, Version: p.Version, Arch: p.Arch, Source: p.Source, Suite: p.Suite,
					Filename: p.Filename, SHA256: p.SHA256, Licence: in.Licences[name], Used: inNode[s],
				})
			}
		}
	}
	slices.SortFunc(m.Packages, func(a, b imageset.Package) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(b.Used, a.Used))
	})
	for g := range modules {
		m.GoModules = append(m.GoModules, g)
	}
	slices.SortFunc(m.GoModules, func(a, b imageset.Module) int {
		return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.Version, b.Version))
	})
	return nil
}

// headArchive writes the second initrd of a head: its user land and mosimg,
// compressed, and the image set as it is, since that is compressed already.
func (b *builder) headArchive(ctx context.Context, dir string, m *imageset.Manifest) error {
	set, err := os.Create(filepath.Join(dir, ".set"))
	if err != nil {
		return err
	}
	defer os.Remove(set.Name())
	defer set.Close()
	size, err := b.writeSet(set, dir, m)
	if err != nil {
		return err
	}
	f, err := concat(ctx, filepath.Join(dir, imageset.HeadArchive),
		b.results[stepUserland].Path(archiveName), b.results[stepTool].Path(archiveName), set.Name())
	f.Name = imageset.HeadArchive
	m.Files = append(m.Files, f)
	m.Parts = append(m.Parts, imageset.Part{Name: "head: image set", Size: size, Compressed: size})
	return err
}

// writeSet writes the archive with the image set and its link.
func (b *builder) writeSet(w io.Writer, dir string, m *imageset.Manifest) (int64, error) {
	t := &archive.Tree{MTime: b.mtime}
	root := headImages + "/" + m.ID + "/"
	for _, f := range m.Files {
		file, err := os.Open(filepath.Join(dir, f.Name))
		if err != nil {
			return 0, err
		}
		defer file.Close()
		t.Add(archive.Entry{Name: root + f.Name, Mode: 0o644, Body: file, Size: f.Size})
	}
	manifest, err := m.WithoutHead().Marshal()
	if err != nil {
		return 0, err
	}
	t.File(root+imageset.ManifestName, 0o644, manifest)
	t.Symlink(headImages+"/"+imageset.CurrentLink(m.Arch), m.ID)
	buffered := bufio.NewWriterSize(w, 1<<20)
	stat, err := t.Write(buffered)
	if err != nil {
		return 0, err
	}
	return stat.Bytes, buffered.Flush()
}

// concat writes files one after the other into a new file, durably, and
// returns its size and hash.
func concat(ctx context.Context, to string, from ...string) (imageset.File, error) {
	out, err := os.Create(to)
	if err != nil {
		return imageset.File{}, err
	}
	defer out.Close()
	h := sha256.New()
	var size int64
	for _, name := range from {
		n, err := appendFile(ctx, out, h, name)
		if err != nil {
			return imageset.File{}, err
		}
		size += n
	}
	if err := out.Sync(); err != nil {
		return imageset.File{}, err
	}
	return imageset.File{Size: size, SHA256: hex.EncodeToString(h.Sum(nil))}, out.Close()
}

func appendFile(ctx context.Context, out io.Writer, h hash.Hash, name string) (int64, error) {
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return io.CopyBuffer(io.MultiWriter(out, h), struct{ io.Reader }{f}, make([]byte, 1<<20))
}

func sortedNames(m map[string]string) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	sort.Strings(names)
	return names
}
