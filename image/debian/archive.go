package debian

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"

	"mosimg/image/cache"
	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
)

// Options say where packages come from.
type Options struct {
	Suite   string // "trixie"; its -security and -updates are used too
	Arch    string // Debian architecture: "amd64"
	Mirror  string // root of an archive (http, https, file), or "" for the host's own
	Keyring string
	Host    *Host
	Fetcher *Fetcher
	Now     func() time.Time
	Log     *slog.Logger // nil is silent
}

// Archive is a verified view of one suite with its updates.
type Archive struct {
	Suites []Suite
	opts   Options
	keys   openpgp.EntityList
}

// Suite is one verified suite of an Archive.
type Suite struct {
	Name    string
	Root    string // URL of the archive's root
	SHA256  string // of the InRelease file
	Release *Release
}

const (
	maxInRelease = 8 << 20
	maxPackages  = 512 << 20 // unpacked; trixie main has 57 MB
)

// Open finds the mirror and verifies the suites' InRelease files. With a
// warm cache it asks the mirror only whether they changed.
func Open(ctx context.Context, o Options) (*Archive, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if err := checkMirror(o.Mirror); err != nil {
		return nil, err
	}
	keys, err := LoadKeyring(o.Keyring)
	if err != nil {
		return nil, err
	}
	a := &Archive{opts: o, keys: keys}
	roots := o.Host.Mirrors
	if o.Mirror != "" {
		roots = []string{strings.TrimRight(o.Mirror, "/")}
	}
	if len(roots) == 0 {
		return nil, fault.New(fault.Environment, "find a mirror for", "suite "+o.Suite, "this machine's apt names no Debian archive", "name one with --mirror URL")
	}
	main, err := a.openFirst(ctx, o.Suite, roots)
	if err != nil {
		return nil, err
	}
	a.Suites = []Suite{*main}
	for _, extra := range []struct {
		suite string
		roots []string
	}{
		{o.Suite + "-updates", []string{main.Root}},
		{o.Suite + "-security", o.Host.securityRoots(main.Root, o.Mirror != "")},
	} {
		s, err := a.openFirst(ctx, extra.suite, extra.roots)
		switch {
		case err == nil:
			a.Suites = append(a.Suites, *s)
		case ctx.Err() != nil, fault.KindOf(err) == fault.Untrusted, fault.KindOf(err) == fault.Environment:
			// A suite that is served but does not verify is not left
			// out: that is how an attacker would keep updates away.
			return nil, err
		default:
			o.Log.Warn("goes on without "+extra.suite, "reason", err)
		}
	}
	return a, nil
}

func checkMirror(mirror string) error {
	if mirror == "" {
		return nil
	}
	u, err := url.Parse(mirror)
	if err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" || err == nil && u.Scheme == "file" && path.IsAbs(u.Path) {
		return nil
	}
	return fault.New(fault.Usage, "read --mirror", mirror, "it is not the http, https or file URL of a Debian archive", "for example file:///srv/debian")
}

// openFirst verifies suite at the first of the roots that serves it.
func (a *Archive) openFirst(ctx context.Context, suite string, roots []string) (*Suite, error) {
	var faults fault.List
	kind := fault.Unavailable
	for _, root := range roots {
		s, err := a.openSuite(ctx, suite, root)
		if err == nil {
			return s, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if k := fault.KindOf(err); k == fault.Untrusted || k == fault.Environment {
			kind = k
		}
		faults.Add(err)
	}
	if len(roots) == 0 {
		faults.Addf("no mirror for it is known")
	}
	return nil, faults.Err(kind, "find a mirror for", "suite "+suite, "name another with --mirror, or check the network and apt's sources")
}

// stored is an InRelease file in the cache with what is needed to ask whether
// it changed.
type stored struct {
	URL          string `json:"url"`
	ETag         string `json:"etag,omitempty"`
	LastModified string `json:"last_modified,omitempty"`
	InRelease    []byte `json:"in_release"`
}

// openSuite fetches and verifies one InRelease. The one in the cache is used
// when the mirror says it is current, when the mirror cannot be reached, and
// when the mirror offers an older one.
func (a *Archive) openSuite(ctx context.Context, suite, root string) (*Suite, error) {
	u := root + "/dists/" + suite + "/InRelease"
	file := a.opts.Fetcher.cache.Path("index", hexSum([]byte(u))[:32]+".json")
	var old stored
	var oldRelease *Release
	if data, err := os.ReadFile(file); err == nil && json.Unmarshal(data, &old) == nil && old.URL == u {
		// Verified again each time: the cache is not trusted either.
		oldRelease, _ = ParseInRelease(old.InRelease, a.keys, suite, a.opts.Now())
	}
	since := http.Header{}
	if oldRelease != nil && old.ETag != "" {
		since.Set("If-None-Match", old.ETag)
	}
	if oldRelease != nil && old.LastModified != "" {
		since.Set("If-Modified-Since", old.LastModified)
	}
	data, header, err := a.opts.Fetcher.Small(ctx, u, maxInRelease, since)
	if err != nil {
		if oldRelease != nil && ctx.Err() == nil && !notThere(err) {
			a.opts.Log.Warn("mirror does not answer, using the index of the last build", "suite", suite, "date", oldRelease.Date, "error", err)
			return &Suite{suite, root, hexSum(old.InRelease), oldRelease}, nil
		}
		if notThere(err) {
			return nil, fault.New(fault.NotFound, "fetch", "InRelease", err, "")
		}
		return nil, fault.New(fault.Unavailable, "fetch", "InRelease", err, "")
	}
	if data == nil || oldRelease != nil && bytes.Equal(data, old.InRelease) {
		cache.Use(file)
		return &Suite{suite, root, hexSum(old.InRelease), oldRelease}, nil
	}
	release, err := ParseInRelease(data, a.keys, suite, a.opts.Now())
	if err != nil {
		return nil, err
	}
	if oldRelease != nil && release.Date.Before(oldRelease.Date) {
		a.opts.Log.Warn("mirror offers an older index than last time, keeping the newer one", "suite", suite, "offered", release.Date, "kept", oldRelease.Date)
		return &Suite{suite, root, hexSum(old.InRelease), oldRelease}, nil
	}
	text, err := json.Marshal(stored{URL: u, ETag: header.Get("ETag"), LastModified: header.Get("Last-Modified"), InRelease: data})
	if err != nil {
		return nil, err
	}
	if err := atomicfile.Write(file, text, 0o644); err != nil {
		return nil, fault.New(fault.Environment, "store", "the index of "+suite, err, "")
	}
	return &Suite{suite, root, hexSum(data), release}, nil
}

// Key names the state of the archive: equal keys, equal packages.
func (a *Archive) Key() string {
	h := sha256.New()
	for _, s := range a.Suites {
		fmt.Fprintf(h, "%s %s\n", s.Name, s.SHA256)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Root is the URL under which the packages of a suite lie.
func (a *Archive) Root(suite string) string {
	for _, s := range a.Suites {
		if s.Name == suite {
			return s.Root
		}
	}
	return ""
}

// Date is that of the newest suite.
func (a *Archive) Date() time.Time {
	var d time.Time
	for _, s := range a.Suites {
		if s.Release.Date.After(d) {
			d = s.Release.Date
		}
	}
	return d
}

// Index reads the packages of all suites. progress, if not nil, hears of the
// downloads.
func (a *Archive) Index(ctx context.Context, progress func(name string, done, total int64)) (*Index, error) {
	x := NewIndex()
	for _, s := range a.Suites {
		if err := a.readSuite(ctx, s, x, a.opts.Fetcher.WithProgress(progress)); err != nil {
			return nil, err
		}
	}
	return x, nil
}

// component is the only one we use: everything in the image is free software
// that Debian itself supports.
const component = "main"

func (a *Archive) readSuite(ctx context.Context, s Suite, x *Index, fetcher *Fetcher) error {
	dir := component + "/binary-" + a.opts.Arch + "/"
	for _, suffix := range []string{".xz", ".gz"} {
		name := dir + "Packages" + suffix
		entry, ok := s.Release.Files[name]
		if !ok {
			continue
		}
		base := s.Root + "/dists/" + s.Name + "/"
		urls := []string{base + name}
		if s.Release.ByHash {
			urls = append([]string{base + dir + "by-hash/SHA256/" + entry.SHA256}, urls...)
		}
		file, err := fetcher.Blob(ctx, s.Name+" "+name, urls, entry.Size, entry.SHA256)
		if err != nil {
			return err
		}
		if err := a.addPackages(ctx, file, suffix, s, x); err != nil {
			return fault.New(fault.Untrusted, "read index", s.Name+" "+name, err, "try another --mirror")
		}
		x.AddSuite(s.Name)
		return nil
	}
	return fault.New(fault.NotFound, "open suite", s.Name, fmt.Sprintf("it has no packages for %s", a.opts.Arch), "try another --mirror")
}

func (a *Archive) addPackages(ctx context.Context, file, suffix string, s Suite, x *Index) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := decompress(suffix, ctxReader{ctx, f})
	if err != nil {
		return err
	}
	defer r.Close()
	budget := &io.LimitedReader{R: r, N: maxPackages}
	err = ReadPackages(budget, a.opts.Arch, func(p *Package) {
		p.Suite, p.Base = s.Name, s.Root
		x.Add(p)
	})
	if err == nil && budget.N <= 0 {
		err = errors.New("it unpacks to too many bytes")
	}
	return err
}

// maxDeb bounds what an index can make us download for one package: the
// largest that we use, the kernel, has 108 MB.
const maxDeb int64 = 2 << 30

// Fetch brings a package into the cache and returns the path of its .deb.
func (f *Fetcher) Fetch(ctx context.Context, p *Package) (string, error) {
	if p.Size > maxDeb {
		return "", fault.New(fault.Refused, "fetch", p.Name, fmt.Sprintf("it has %d bytes, the limit is %d", p.Size, maxDeb), "")
	}
	return f.Blob(ctx, path.Base(p.Filename), []string{p.Base + "/" + escapePath(p.Filename)}, p.Size, p.SHA256)
}

// escapePath keeps "+" and "~" in pool names as they are and escapes the rest.
func escapePath(name string) string { return (&url.URL{Path: name}).EscapedPath() }

func hexSum(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}
