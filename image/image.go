// Package image builds image sets: it is the way from a profile to the folder
// that a head serves and a machine boots.
//
//	profile -> packages (signed index) -> kernel and modules, CRIU, boot loaders,
//	utilities, agent -> initramfs and head archive -> manifest
//
// Each part is a step that is keyed by its inputs (image/steps), so a build
// in which only the agent changed compiles and compresses only the agent. The
// output folder is swapped in at the end: until then, and after any fault or
// signal, the old one is as it was.
package image

import (
	"cmp"
	"context"
	"embed"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/image/cache"
	"mosimg/image/debian"
	"mosimg/image/profile"
	"mosimg/image/steps"
	"mosimg/initramfs/gobuild"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/internal/version"
)

// source is this package's code: results in the build cache depend on it.
//
//go:embed *.go
var source embed.FS

// Options say what to build and with what.
type Options struct {
	Profile *profile.Profile
	Arch    string   // "" is the profile's; another one is refused
	Outputs []string // nil means Outputs' first
	Out     string   // folder of the image set
	Mirror  string   // root of a Debian archive; "" means those of the host's apt
	Keyring string   // "" means debian.DefaultKeyring
	Cache   string   // "" means cache.DefaultDir
	Source  string   // checkout of mosimg; "" means around the current folder
	// Head and CA tell machines that boot from the boot media where their
	// head is, as its boot script tells those that boot from the network:
	// https://ADDRESS:PORT and sha256:HEX. Both or neither.
	Head, CA string
	// Report, if not nil, hears of the steps as they go.
	Report func(steps.Event)
	Log    *slog.Logger // nil is silent

	host *debian.Host // for tests; nil means this machine's
}

// Outputs are the kinds of output that exist. The first one is the image set
// itself, which is made in any case.
var Outputs = []string{"pxe", outputUKI, outputDisk, outputISO, outputQCOW2}

// Summary is what a build made.
type Summary struct {
	Dir      string             `json:"dir"`
	ID       string             `json:"id"`
	Manifest *imageset.Manifest `json:"manifest"`
	Steps    []StepTime         `json:"steps"`
	Seconds  float64            `json:"seconds"`
}

// StepTime says how long one step took.
type StepTime struct {
	Name    string   `json:"name"`
	Seconds float64  `json:"seconds"`
	Reused  bool     `json:"reused"`
	Why     []string `json:"why,omitempty"` // which inputs changed
}

// builder is one build at work.
type builder struct {
	Options
	cache   *cache.Cache
	golang  *gobuild.Toolchain
	fetcher *debian.Fetcher
	archive *debian.Archive
	engine  *steps.Engine
	lock    *lock
	sources func() (sources, error)
	mtime   int64 // of all files in archives
	created time.Time
	epoch   string // SOURCE_DATE_EPOCH, or ""
	times   []StepTime
	results map[string]*steps.Result
}

// Build makes the image set. What it returns as error is ready to be shown.
func Build(ctx context.Context, o Options) (*Summary, error) {
	began := time.Now()
	if err := o.check(); err != nil {
		return nil, err
	}
	b := &builder{Options: o}
	if err := b.dates(); err != nil {
		return nil, err
	}
	out, err := newOutput(o.Out)
	if err != nil {
		return nil, err
	}
	defer out.discard()
	if b.cache, err = openCache(o.Cache); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	m, err := b.build(ctx, out)
	cancel()
	if b.sources != nil { // may still be at work when the index failed
		_, _ = b.sources()
	}
	if err != nil {
		return nil, b.explainFullDisk(out, err)
	}
	b.cache.Prune()
	return &Summary{Dir: out.dir, ID: m.ID, Manifest: m, Steps: b.times, Seconds: seconds(time.Since(began))}, nil
}

// build is the flow, in order.
func (b *builder) build(ctx context.Context, out *output) (*imageset.Manifest, error) {
	for _, phase := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"sources", b.findSources}, // 1. the checkout and its Go
		{"index", b.openArchive},   // 2. the signed index
		{"packages", b.resolve},    // 3. which packages, exactly
		{"parts", b.makeParts},     // 4. every part, side by side
	} {
		if err := phase.run(ctx); err != nil {
			return nil, err
		}
	}
	return timed(b, "image set", func() (*imageset.Manifest, error) { // 5. put together and swapped in
		m, err := b.assemble(ctx, out.tmp.Path)
		if err != nil {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return m, out.publish()
	})
}

// check refuses what cannot be built before any work is done.
func (o *Options) check() error {
	var all fault.List
	arch := cmp.Or(o.Arch, o.Profile.Arch)
	switch {
	case profile.Archs[arch] == "":
		all.Addf("--arch %s: there are amd64 and 386", arch)
	case arch != "amd64":
		all.Addf("architecture %s: this version of mosimg builds images for amd64 only", arch)
	case arch != o.Profile.Arch:
		all.Addf("--arch %s: profile %s is for %s", arch, o.Profile.Name, o.Profile.Arch)
	}
	for _, kind := range o.Outputs {
		if !slices.Contains(Outputs, kind) {
			all.Addf("--outputs %s: this version of mosimg makes: %s", kind, strings.Join(Outputs, ", "))
		}
	}
	for _, err := range o.checkHead() {
		all.Add(err)
	}
	if o.Out == "" {
		all.Addf("-o is empty: it names the output folder")
	}
	return all.Err(fault.Usage, "build", "image", "see: mosimg build --help")
}

// dates takes the time of all files from SOURCE_DATE_EPOCH.
func (b *builder) dates() error {
	b.epoch = os.Getenv("SOURCE_DATE_EPOCH")
	if b.epoch == "" {
		return nil
	}
	n, err := strconv.ParseInt(b.epoch, 10, 64)
	if err != nil || n < 0 || n > 1<<32-1 {
		return fault.New(fault.Usage, "read", "SOURCE_DATE_EPOCH", fmt.Sprintf("%q is not a number of seconds since 1970 that an archive can hold", b.epoch), "unset it")
	}
	b.mtime, b.created = n, time.Unix(n, 0).UTC()
	return nil
}

func openCache(dir string) (*cache.Cache, error) {
	if dir == "" {
		var err error
		if dir, err = cache.DefaultDir(); err != nil {
			return nil, err
		}
	}
	return cache.Open(dir)
}

func (b *builder) findSources(ctx context.Context) (err error) {
	if b.golang, err = gobuild.Find(ctx, b.Source, b.Profile.Arch); err == nil {
		b.listSources(ctx)
	}
	return err
}

func (b *builder) openArchive(ctx context.Context) error {
	if b.host == nil {
		b.host = debian.ReadHost(ctx, "/")
	}
	if b.Keyring == "" {
		b.Keyring = debian.DefaultKeyring
	}
	b.fetcher = debian.NewFetcher(b.cache, b.host.Proxy, b.Log)
	var err error
	b.archive, err = timed(b, "index", func() (*debian.Archive, error) {
		return debian.Open(ctx, debian.Options{
			Suite: b.Profile.Suite, Arch: profile.Archs[b.Profile.Arch], Mirror: b.Mirror, Keyring: b.Keyring,
			Host: b.host, Fetcher: b.fetcher, Log: b.Log,
		})
	})
	if err != nil {
		return err
	}
	for _, s := range b.archive.Suites {
		b.report(steps.Event{Step: "index", Kind: steps.Progress, Text: fmt.Sprintf("%s of %s at %s", s.Name, s.Release.Date.Format("2006-01-02 15:04"), s.Root)})
	}
	if b.epoch == "" {
		b.created = b.archive.Date()
	}
	return nil
}

// makeParts runs every step but the first.
func (b *builder) makeParts(ctx context.Context) error {
	list, err := b.parts()
	if err != nil {
		return err
	}
	results, err := b.engine.Run(ctx, list...)
	if err != nil {
		return err
	}
	b.results = results
	for _, s := range list {
		r := results[s.Name]
		b.times = append(b.times, StepTime{s.Name, seconds(r.Took), r.Reused, r.Why})
	}
	return nil
}

// timed reports work that is not a keyed step, and keeps its time.
func timed[T any](b *builder, name string, work func() (T, error)) (T, error) {
	began := time.Now()
	b.report(steps.Event{Step: name, Kind: steps.Started})
	v, err := work()
	if err == nil {
		took := time.Since(began)
		b.times = append(b.times, StepTime{Name: name, Seconds: seconds(took)})
		b.report(steps.Event{Step: name, Kind: steps.Done, Took: took})
	}
	return v, err
}

func (b *builder) report(e steps.Event) {
	if b.Report != nil {
		b.Report(e)
	}
}

func seconds(d time.Duration) float64 {
	return float64(d.Round(time.Millisecond)) / float64(time.Second)
}

// Room that a build needs, rounded up: downloads, results and the unpacked
// kernel in the cache; kernel, initramfs, head archive in the output, and each
// of the boot media.
const (
	cacheRoom  = 800 << 20
	outputRoom = 300 << 20
	mediumRoom = 100 << 20
)

// explainFullDisk turns "no space left on device", from wherever it came, into
// what is needed where.
func (b *builder) explainFullDisk(out *output, err error) error {
	if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.EDQUOT) {
		return err
	}
	return fault.New(fault.Environment, "build", "image", err, fmt.Sprintf(
		"a build needs about %d MB in the cache %s (%s free; --cache) and %d MB in %s (%s free; -o)",
		cacheRoom>>20, b.cache.Dir(), free(b.cache.Dir()), (outputRoom+int64(len(b.Outputs))*mediumRoom)>>20, out.parent, free(out.parent)))
}

func free(dir string) string {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return "?"
	}
	return fmt.Sprintf("%d MB", int64(st.Bavail)*int64(st.Bsize)>>20)
}

// release is the version that the image's programs and files carry.
func release() string { return version.Release }
