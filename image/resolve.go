package image

import (
	"context"
	"encoding/json"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"

	"mosimg/image/debian"
	"mosimg/image/profile"
	"mosimg/image/steps"
	"mosimg/internal/fault"
)

// lock is the exact packages of one build.
type lock struct {
	Kernel *debian.Package
	Boot   *debian.Package
	// CRIU and Head are the wanted packages first and then all that they
	// depend on: where their libraries are looked for.
	CRIU []*debian.Package
	Head []*debian.Package
	// HeadWhole counts the packages at the beginning of Head that are
	// taken whole.
	HeadWhole int
	// Loaders are those of the boot media, as far as the suite has them:
	// most builds make none.
	Loaders []*debian.Package
}

const lockName = "packages.json"

// kernelImage is how the packages with a kernel in them are named; the
// profile may name one that only depends on the current one of them.
const kernelImage = "linux-image-"

// resolve finds the packages. It is a step of its own: reading the index of
// 70000 packages takes longer than the rest of a build in which nothing changed.
func (b *builder) resolve(ctx context.Context) error {
	scope := b.Profile.Name + " " + b.Profile.Arch
	b.engine = steps.New(b.cache, scope, b.report)
	p := b.Profile
	head, err := json.Marshal(p.Head)
	if err != nil {
		return err
	}
	s := &steps.Step{
		Name: "packages",
		Code: []fs.FS{source, debian.Source},
		Inputs: map[string]string{
			"profile kernel.package": p.Kernel.Package, "profile criu.package": p.CRIU.Package,
			"profile boot.package": p.Boot.Package, "profile head": string(head), "profile arch": p.Arch,
		},
		Run: func(ctx context.Context, job *steps.Job) error {
			index, err := b.archive.Index(ctx, progress(job))
			if err != nil {
				return err
			}
			l, err := pick(index, p)
			if err != nil {
				return err
			}
			data, err := json.MarshalIndent(l, "", " ")
			if err != nil {
				return err
			}
			return os.WriteFile(job.Path(lockName), data, 0o644)
		},
	}
	for _, suite := range b.archive.Suites {
		s.Inputs["index of "+suite.Name] = suite.SHA256
	}
	results, err := b.engine.Run(ctx, s)
	if err != nil {
		return err
	}
	r := results[s.Name]
	b.times = append(b.times, StepTime{s.Name, seconds(r.Took), r.Reused, r.Why})
	if err := r.Verify(ctx); err != nil {
		return err
	}
	data, err := os.ReadFile(r.Path(lockName))
	if err != nil {
		return err
	}
	b.lock = &lock{}
	if err := json.Unmarshal(data, b.lock); err != nil {
		return err
	}
	for _, p := range b.lock.all() {
		p.Base = b.archive.Root(p.Suite)
	}
	return nil
}

// pick chooses the packages of a profile from an index.
func pick(index *debian.Index, p *profile.Profile) (*lock, error) {
	l := &lock{}
	var err error
	if l.Kernel, err = pickKernel(index, p.Kernel.Package); err != nil {
		return nil, err
	}
	if l.Boot, err = index.Get(p.Boot.Package); err != nil {
		return nil, err
	}
	for _, name := range loaderPackages() {
		p, err := index.Get(name)
		if err == nil {
			l.Loaders = append(l.Loaders, p)
		} else if fault.KindOf(err) != fault.NotFound {
			return nil, err
		}
	}
	if l.CRIU, err = index.Closure([]string{p.CRIU.Package}, nil); err != nil {
		return nil, err
	}
	names := make([]string, len(p.Head.Packages))
	for i, h := range p.Head.Packages {
		names[i] = h.Name
	}
	followed := func(_ *debian.Package, d debian.Dependency) bool {
		for _, pattern := range p.Head.Follow {
			if ok, _ := path.Match(pattern, d.Name); ok {
				return true
			}
		}
		return false
	}
	whole, err := index.Closure(names, followed)
	if err != nil {
		return nil, err
	}
	l.HeadWhole = len(whole)
	names = names[:0]
	for _, w := range whole {
		names = append(names, w.Name)
	}
	l.Head, err = index.Closure(names, nil)
	return l, err
}

func pickKernel(index *debian.Index, name string) (*debian.Package, error) {
	chain, err := index.Closure([]string{name}, func(_ *debian.Package, d debian.Dependency) bool {
		return strings.HasPrefix(d.Name, kernelImage)
	})
	if err != nil {
		return nil, err
	}
	return chain[len(chain)-1], nil
}

func (l *lock) all() []*debian.Package {
	list := append([]*debian.Package{l.Kernel, l.Boot}, l.CRIU...)
	list = append(list, l.Loaders...)
	return append(list, l.Head...)
}

// pin is how a package appears among a step's inputs.
func pin(inputs map[string]string, packages ...*debian.Package) map[string]string {
	for _, p := range packages {
		inputs["package "+p.Name] = p.Version + " " + p.SHA256[:16]
	}
	return inputs
}

// progress shows how far a download is.
func progress(job *steps.Job) func(string, int64, int64) {
	return func(name string, done, total int64) {
		job.Progress("fetched %d of %d MB of %s", done>>20, total>>20, name)
	}
}

// parallelFetches is enough to hide the latency of small packages.
const parallelFetches = 4

// fetch brings packages into the cache and returns the paths of their .debs.
func (b *builder) fetch(ctx context.Context, job *steps.Job, packages []*debian.Package) ([]string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	fetcher := b.fetcher.WithProgress(progress(job))
	files := make([]string, len(packages))
	room := make(chan struct{}, parallelFetches)
	var all sync.WaitGroup
	for i, p := range packages {
		all.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			if ctx.Err() != nil {
				return
			}
			var err error
			if files[i], err = fetcher.Fetch(ctx, p); err != nil {
				cancel(err)
			}
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return files, nil
}

// documentation is what no image carries.
func documentation(name string) bool {
	for _, dir := range []string{"usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian", "usr/share/bug", "usr/share/doc-base", "usr/share/menu"} {
		if name == dir || strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}

// copyrightOf is the package whose copyright file this is, or "".
func copyrightOf(name string) string {
	if dir, ok := strings.CutPrefix(name, "usr/share/doc/"); ok {
		if pkg, ok := strings.CutSuffix(dir, "/copyright"); ok && !strings.Contains(pkg, "/") {
			return pkg
		}
	}
	return ""
}
