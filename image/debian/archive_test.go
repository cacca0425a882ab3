package debian

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/image/cache"
	"mosimg/image/debian/debiantest"
	"mosimg/internal/fault"
)

// world is a fake archive, a web server for it, and a builder's cache.
type world struct {
	t       *testing.T
	archive *debiantest.Archive
	server  *httptest.Server
	hits    atomic.Int64
	// meddle, if not nil, may answer in the server's place.
	meddle func(w http.ResponseWriter, r *http.Request) (done bool)
	cache  *cache.Cache
	opts   Options
}

var criu = debiantest.Package{
	Name: "criu", Version: "4.1-1", Fields: map[string]string{"Depends": "libc6 (>= 2.38), libx | liby"},
	Files: map[string]string{"usr/sbin/criu": strings.Repeat("program ", 50000)},
}

func newWorld(t *testing.T) *world {
	t.Helper()
	a, err := debiantest.New(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	a.Add("trixie", criu,
		debiantest.Package{Name: "libc6", Version: "2.41-12"},
		debiantest.Package{Name: "liby", Version: "1", Fields: map[string]string{"Provides": "libz (= 3)"}},
		debiantest.Package{Name: "foreign", Version: "1", Arch: "arm64"},
	)
	w := &world{t: t, archive: a}
	files := http.FileServer(http.Dir(filepath.Dir(a.Root)))
	w.server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.hits.Add(1)
		if w.meddle == nil || !w.meddle(rw, r) {
			files.ServeHTTP(rw, r)
		}
	}))
	t.Cleanup(w.server.Close)
	w.publish()
	if w.cache, err = cache.Open(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	w.opts = Options{
		Suite: "trixie", Arch: "amd64", Mirror: w.server.URL + "/debian", Keyring: a.Keyring,
		Host: &Host{}, Fetcher: NewFetcher(w.cache, nil, nil),
	}
	w.opts.Fetcher.pause = time.Millisecond
	return w
}

func (w *world) publish() {
	w.t.Helper()
	if err := w.archive.Publish(); err != nil {
		w.t.Fatal(err)
	}
}

// fetch does all that a build does for one package.
func (w *world) fetch(name string) (string, error) {
	a, err := Open(w.t.Context(), w.opts)
	if err != nil {
		return "", err
	}
	x, err := a.Index(w.t.Context(), nil)
	if err != nil {
		return "", err
	}
	p, err := x.Get(name)
	if err != nil {
		return "", err
	}
	return w.opts.Fetcher.Fetch(w.t.Context(), p)
}

func TestFetch(t *testing.T) {
	w := newWorld(t)
	file, err := w.fetch("criu")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	if err := WalkDeb(t.Context(), file, func(f *DebFile) error { names = append(names, f.Name); return nil }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"usr/sbin/criu"}, names); diff != "" {
		t.Errorf("files of the package (-want +got):\n%s", diff)
	}

	// A second build asks only whether the suites changed.
	before := w.hits.Load()
	if _, err := w.fetch("criu"); err != nil {
		t.Fatal(err)
	}
	if n := w.hits.Load() - before; n > 3 {
		t.Errorf("a warm build made %d requests; want at most 3, one for each suite", n)
	}
	// And it works while the mirror is away.
	w.server.Close()
	if _, err := w.fetch("criu"); err != nil {
		t.Errorf("with everything in the cache and no network: %v", err)
	}
}

func TestNewestVersionOfAllSuitesWins(t *testing.T) {
	w := newWorld(t)
	w.archive.Add("trixie-security", debiantest.Package{Name: "libc6", Version: "2.41-12+deb13u1"})
	w.archive.Add("trixie-updates", debiantest.Package{Name: "libc6", Version: "2.41-9"})
	w.publish()
	// The security archive is another one, next to the mirror.
	security := filepath.Join(filepath.Dir(w.archive.Root), "debian-security", "dists", "trixie-security")
	if err := os.MkdirAll(filepath.Dir(security), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(w.archive.Root, "dists", "trixie-security"), security); err != nil {
		t.Fatal(err)
	}
	a, err := Open(t.Context(), w.opts)
	if err != nil {
		t.Fatal(err)
	}
	x, err := a.Index(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := x.Get("libc6")
	if err != nil || p.Version != "2.41-12+deb13u1" || p.Suite != "trixie-security" || !strings.HasSuffix(p.Base, "/debian-security") {
		t.Errorf("Get(libc6) = %+v, %v; want the security update", p, err)
	}
}

// Each of these is a build that must end, with this kind of fault, and say why.
func TestRefusals(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(w *world)
		kind  fault.Kind
		want  string
	}{
		{"tampered Packages", func(w *world) {
			w.write("dists/trixie/main/binary-amd64/Packages.gz", flip)
		}, fault.Untrusted, "SHA-256"},
		{"tampered deb", func(w *world) { w.write(criu.Pool(), flip) }, fault.Untrusted, "SHA-256"},
		{"longer deb", func(w *world) {
			w.write(criu.Pool(), func(b []byte) []byte { return append(b, "more"...) })
		}, fault.NotFound, "more than the"},
		{"tampered InRelease", func(w *world) {
			w.write("dists/trixie/InRelease", func(b []byte) []byte { return bytes.Replace(b, []byte("Test"), []byte("Best"), 1) })
		}, fault.Untrusted, "bad signature"},
		{"unsigned InRelease", func(w *world) {
			w.write("dists/trixie/InRelease", func([]byte) []byte { return []byte("Suite: trixie\n") })
		}, fault.Untrusted, "not a clear-signed file"},
		{"text before the signed part does not count", func(w *world) {
			w.write("dists/trixie/main/binary-amd64/Packages.gz", flip)
			w.write("dists/trixie/InRelease", func(b []byte) []byte { return append([]byte("SHA256:\n"), b...) })
		}, fault.Untrusted, "SHA-256"},
		{"wrong key", func(w *world) {
			other, err := debiantest.New(w.t.TempDir())
			if err != nil {
				w.t.Fatal(err)
			}
			w.opts.Keyring = other.Keyring
		}, fault.Untrusted, "bad signature"},
		{"expired", func(w *world) { w.archive.ValidFor = time.Minute; w.publish() }, fault.Untrusted, "expired on"},
		{"clock before the signature", func(w *world) {
			w.opts.Now = func() time.Time { return w.archive.Date.Add(-48 * time.Hour) }
		}, fault.Untrusted, "clock"},
		{"other suite's InRelease", func(w *world) { w.opts.Suite = "forky"; w.copySuite("trixie", "forky") }, fault.Untrusted, "InRelease is for suite"},
		{"expired security suite is not left out", func(w *world) {
			w.archive.Add("trixie-updates", debiantest.Package{Name: "libc6", Version: "3"})
			w.archive.ValidFor = time.Minute
			w.publish()
			w.archive.ValidFor = 0
			w.archive.Add("trixie")
			keep := w.read("dists/trixie-updates/InRelease")
			w.publish()
			w.write("dists/trixie-updates/InRelease", func([]byte) []byte { return keep })
		}, fault.Untrusted, "trixie-updates"},
		{"no such suite", func(w *world) { w.opts.Suite = "etch" }, fault.Unavailable, "404"},
		{"no keyring", func(w *world) { w.opts.Keyring += ".no" }, fault.Usage, "no such file"},
		{"keyring is garbage", func(w *world) { w.opts.Keyring = filepath.Join(w.archive.Root, criu.Pool()) }, fault.Usage, "read keyring"},
		{"no mirror", func(w *world) { w.opts.Mirror = "" }, fault.Environment, "--mirror"},
		{"odd mirror", func(w *world) { w.opts.Mirror = "ftp://host/debian" }, fault.Usage, "--mirror"},
		{"deb is gone", func(w *world) { os.Remove(filepath.Join(w.archive.Root, criu.Pool())) }, fault.NotFound, "404"},
		{"package is foreign", func(w *world) { w.opts.Arch = "i386" }, fault.NotFound, "no packages for i386"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t)
			tc.spoil(w)
			_, err := w.fetch("criu")
			if err == nil || fault.KindOf(err) != tc.kind || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error = %v (kind %d); want kind %d with %q", err, fault.KindOf(err), tc.kind, tc.want)
			}
		})
	}
}

func flip(b []byte) []byte { b[len(b)/2] ^= 1; return b }

func (w *world) read(name string) []byte {
	w.t.Helper()
	b, err := os.ReadFile(filepath.Join(w.archive.Root, name))
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func (w *world) write(name string, change func([]byte) []byte) {
	w.t.Helper()
	if err := w.archive.Write(name, change(w.read(name))); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) copySuite(from, to string) {
	w.t.Helper()
	if err := os.CopyFS(filepath.Join(w.archive.Root, "dists", to), os.DirFS(filepath.Join(w.archive.Root, "dists", from))); err != nil {
		w.t.Fatal(err)
	}
}

func TestNoSuchPackage(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"nope", "foreign"} {
		_, err := w.fetch(name)
		if fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "trixie") {
			t.Errorf("fetch(%s) = %v; want a fault that names the package and the suite", name, err)
		}
	}
}

// An attacker, or a mirror that lags behind, must not bring back an index
// that is older than one we have already seen: it would bring back old bugs.
func TestOlderIndexIsNotTaken(t *testing.T) {
	w := newWorld(t)
	old := w.read("dists/trixie/InRelease")
	w.archive.Date = w.archive.Date.Add(time.Minute)
	w.archive.Add("trixie", debiantest.Package{Name: "new", Version: "1"})
	w.publish()
	if _, err := w.fetch("new"); err != nil {
		t.Fatal(err)
	}
	w.write("dists/trixie/InRelease", func([]byte) []byte { return old })
	if _, err := w.fetch("new"); err != nil {
		t.Errorf("with an older index on the mirror: %v", err)
	}
}

// A connection that breaks off is taken up where it ended: the kernel has
// 108 MB, and some mirrors are far away.
func TestTruncatedDownloadResumes(t *testing.T) {
	w := newWorld(t)
	var ranges []string
	cut := true
	w.meddle = func(rw http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, ".deb") {
			return false
		}
		ranges = append(ranges, r.Header.Get("Range"))
		if !cut {
			return false
		}
		cut = false
		data := w.read(criu.Pool())
		rw.Header().Set("Content-Length", fmt.Sprint(len(data)))
		rw.Write(data[:100])
		rw.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	if _, err := w.fetch("criu"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"", "bytes=100-"}, ranges); diff != "" {
		t.Errorf("ranges asked for (-want +got):\n%s", diff)
	}
}

// What an earlier, killed build left of a download may be wrong: then it is
// fetched anew, and the build goes on.
func TestDamagedRestOfADownloadIsFetchedAnew(t *testing.T) {
	w := newWorld(t)
	a, err := Open(t.Context(), w.opts)
	if err != nil {
		t.Fatal(err)
	}
	x, err := a.Index(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := x.Get("criu")
	if err != nil {
		t.Fatal(err)
	}
	for name, rest := range map[string][]byte{
		"wrong bytes": []byte("garbage"), "too long": make([]byte, p.Size+7), "complete but wrong": make([]byte, p.Size),
	} {
		os.Remove(w.cache.Blob(p.SHA256))
		if err := os.WriteFile(w.cache.Blob(p.SHA256)+".part", rest, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := w.opts.Fetcher.Fetch(t.Context(), p); err != nil {
			t.Errorf("%s: Fetch = %v", name, err)
		}
	}
	// And so is a complete download that was damaged on disk.
	if err := os.WriteFile(w.cache.Blob(p.SHA256), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := w.opts.Fetcher.Fetch(t.Context(), p); err != nil {
		t.Errorf("damaged blob: Fetch = %v", err)
	}
}

func TestServerTroubleIsRetriedButNotForEver(t *testing.T) {
	w := newWorld(t)
	bad := 2
	w.meddle = func(rw http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, ".deb") && bad > 0 {
			bad--
			http.Error(rw, "busy", http.StatusServiceUnavailable)
			return true
		}
		return false
	}
	if _, err := w.fetch("criu"); err != nil {
		t.Errorf("two 503s, then the file: %v", err)
	}
	w2 := newWorld(t)
	w2.meddle = func(rw http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, ".deb") {
			http.Error(rw, "busy", http.StatusServiceUnavailable)
			return true
		}
		return false
	}
	if _, err := w2.fetch("criu"); fault.KindOf(err) != fault.Unavailable || !strings.Contains(err.Error(), "503") {
		t.Errorf("503 for ever: %v; want unavailable", err)
	}
}

func TestInterruptedFetchEndsAtOnce(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	w.meddle = func(rw http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, ".deb") {
			cancel()
			<-r.Context().Done()
		}
		return false
	}
	a, err := Open(ctx, w.opts)
	if err != nil {
		t.Fatal(err)
	}
	x, err := a.Index(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	p, _ := x.Get("criu")
	if _, err := w.opts.Fetcher.Fetch(ctx, p); err == nil || ctx.Err() == nil {
		t.Errorf("Fetch after cancel = %v", err)
	}
}

func TestClosure(t *testing.T) {
	index := NewIndex()
	index.AddSuite("trixie")
	for _, p := range []*Package{
		{Name: "a", Version: "1", Depends: "b (>= 2), c | d, virtual, e:any"},
		{Name: "b", Version: "1"},
		{Name: "b", Version: "2"},
		{Name: "d", Version: "1", PreDepends: "a"},
		{Name: "e", Version: "1"},
		{Name: "real2", Version: "1", Provides: "virtual"},
		{Name: "real1", Version: "1", Provides: "virtual, versioned (= 3)"},
		{Name: "wants-old", Version: "1", Depends: "b (= 1)"},
		{Name: "broken", Version: "1", Depends: "missing (>= 4)"},
		{Name: "clash", Version: "1", Depends: "b, wants-old"},
		{Name: "virtual-old", Version: "1", Depends: "versioned (<< 3)"},
		{Name: "virtual-ok", Version: "1", Depends: "versioned (>= 3)"},
	} {
		index.Add(p)
	}
	for _, tc := range []struct{ root, want, err string }{
		{"a", "a=1 b=2 d=1 real1=1 e=1", ""},
		{"wants-old", "wants-old=1 b=1", ""},
		{"broken", "", "broken: it needs missing (>= 4)"},
		{"clash", "", "version conflict"},
		{"virtual-old", "", "versioned (<< 3)"},
		{"virtual-ok", "virtual-ok=1 real1=1", ""},
		{"nope", "", "no such package in trixie"},
	} {
		got, err := index.Closure([]string{tc.root}, nil)
		var text []string
		for _, p := range got {
			text = append(text, p.Name+"="+p.Version)
		}
		if strings.Join(text, " ") != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("Closure(%s) = %v, %v; want %q, %q", tc.root, text, err, tc.want, tc.err)
		}
	}
}

func TestParseDepends(t *testing.T) {
	got, err := ParseDepends("a (>= 1:2~), b|c(<<3) ,\n d:any (= 1), ")
	want := [][]Dependency{{{"a", ">=", "1:2~"}}, {{Name: "b"}, {"c", "<<", "3"}}, {{"d", "=", "1"}}}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("ParseDepends: %v (-want +got):\n%s", err, diff)
	}
	for _, bad := range []string{"a b", "a (", "a (1)", "a (>= )", "a (~ 1)", "a (= 1) x", "|", "a (>= 1", "(= 1)"} {
		if got, err := ParseDepends(bad); err == nil {
			t.Errorf("ParseDepends(%q) = %v; want an error", bad, got)
		}
	}
}

func FuzzParseDepends(f *testing.F) {
	f.Add("a (>= 1), b | c:any")
	f.Fuzz(func(t *testing.T, s string) {
		all, err := ParseDepends(s)
		if err != nil {
			return
		}
		for _, alternatives := range all {
			for _, d := range alternatives {
				again, err := ParseDepends(d.String())
				if err != nil || len(again) != 1 || len(again[0]) != 1 || again[0][0] != d {
					t.Errorf("%q does not survive: %v, %v", d, again, err)
				}
			}
		}
	})
}

func TestLicences(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\nFiles: *\nLicense: MIT\n text\n\nFiles: x\nLicense: GPL-2+\n", "GPL-2+, MIT"},
		{"This package was made by hand.\nNo fields here\n", "see copyright"},
		{"License: MIT\n", "see copyright"},
		{"", "see copyright"},
	} {
		if got := Licences([]byte(tc.text)); got != tc.want {
			t.Errorf("Licences(%.30q) = %q; want %q", tc.text, got, tc.want)
		}
	}
}

func FuzzParseInRelease(f *testing.F) {
	f.Add([]byte("Suite: stable\nDate: Sat, 12 Sep 2026 07:55:41 UTC\nSHA256:\n " + strings.Repeat("a", 64) + " 1 x\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := parseRelease(data); err == nil && (len(r.Files) == 0 || r.Date.IsZero()) {
			t.Errorf("accepted a release without files or date: %+v", r)
		}
		if _, err := ParseInRelease(data, nil, "x", time.Time{}); err == nil {
			t.Error("accepted an unsigned file")
		}
	})
}
