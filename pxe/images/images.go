// Package images is the head's view of its image store. The store may change
// at any moment: a publish moves a link, a build replaces a folder. A set that
// was opened keeps its files open, so whoever downloads from it gets the bytes
// of its hashes to the end, also after the folder is gone.
package images

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"sync"
	"time"

	"mosimg/internal/fault"
	"mosimg/internal/imageset"
)

// keepOld is how many superseded sets stay available for machines that got
// their script just before a publish.
const keepOld = 3

// retry is the pause before a store that cannot be used is read again.
const retry = 2 * time.Second

// File is one file of a set, open for good. It may be read concurrently.
type File struct {
	imageset.File
	f        *os.File
	modified time.Time
}

// Reader reads the file from its beginning.
func (f *File) Reader() *io.SectionReader { return io.NewSectionReader(f.f, 0, f.Size) }

// Open opens the file anew, with a position of its own, for sendfile. It is the
// very file that was verified, also when its name is gone or another's.
func (f *File) Open() (*os.File, error) {
	defer runtime.KeepAlive(f) // and with it the descriptor
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", f.f.Fd()))
}

// Bytes is the whole content.
func (f *File) Bytes() ([]byte, error) {
	b := make([]byte, f.Size)
	_, err := f.f.ReadAt(b, 0)
	if err == io.EOF {
		err = nil
	}
	return b, err
}

// Intact tells whether nobody wrote into the file since it was verified.
func (f *File) Intact() bool {
	st, err := f.f.Stat()
	return err == nil && st.Size() == f.Size && st.ModTime().Equal(f.modified)
}

// Set is a verified image set with its files open.
type Set struct {
	Manifest *imageset.Manifest
	files    map[string]*File
}

// File is the file of that name in the set, or nil.
func (s *Set) File(name string) *File { return s.files[name] }

// Boot are the bare names of the set's boot loaders.
func (s *Set) Boot() map[string]bool {
	out := map[string]bool{}
	for name := range s.files {
		if dir, base := path.Split(name); dir == imageset.BootDir+"/" {
			out[base] = true
		}
	}
	return out
}

// Store is an image store that is read again whenever it changed.
type Store struct {
	dir string
	log *slog.Logger

	// mu guards the following.
	mu    sync.Mutex
	stamp string // what the store looked like when it was read
	fault string // last fault reported
	// failed is the state of the store that could not be used; it is tried
	// again after retryAt, since each try may read all of it.
	failed  string
	retryAt time.Time
	current map[string]*Set
	old     []*Set // superseded, newest first
}

// Open reads the store in dir, or the single image set that dir is, and
// verifies every hash. A later fault of the store is logged and the sets read
// last go on being served.
func Open(dir string, log *slog.Logger) (*Store, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Store{dir: dir, log: log, current: map[string]*Set{}}
	s.stamp = stampOf(dir)
	if err := s.load(); err != nil {
		return nil, err
	}
	return s, nil
}

// Current is the set served for each architecture.
func (s *Store) Current() map[string]*Set {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refresh()
	return s.current
}

// Pick is the set whose boot loaders are served: amd64's, which boot 32-bit
// machines too, else the only other one.
func (s *Store) Pick() *Set {
	sets := s.Current()
	if set := sets["amd64"]; set != nil {
		return set
	}
	var archs []string
	for a := range sets {
		archs = append(archs, a)
	}
	sort.Strings(archs)
	return sets[archs[0]]
}

// Loader is the boot loader of that bare name, or nil.
func (s *Store) Loader(name string) *File {
	if strings.Contains(name, "/") {
		return nil
	}
	f := s.Pick().File(imageset.BootDir + "/" + name)
	if f == nil || !f.Intact() {
		return nil
	}
	return f
}

// ByHash is the file with that hash and base name in any known set, or nil.
func (s *Store) ByHash(sha, base string) *File {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refresh()
	sets := append([]*Set(nil), s.old...)
	for _, set := range s.current {
		sets = append(sets, set)
	}
	for _, set := range sets {
		for name, f := range set.files {
			if f.SHA256 == sha && path.Base(name) == base && f.Intact() {
				return f
			}
		}
	}
	return nil
}

// refresh reads the store again if it looks different. s.mu is held.
func (s *Store) refresh() {
	stamp := stampOf(s.dir)
	if stamp == s.stamp || stamp == s.failed && time.Now().Before(s.retryAt) {
		return
	}
	// A build may be half-way through replacing the folder: then the sets
	// read last stay, and the next request looks again.
	if err := s.load(); err != nil {
		s.failed, s.retryAt = stamp, time.Now().Add(retry)
		if text := err.Error(); text != s.fault {
			s.fault = text
			s.log.Warn("image store changed but cannot be used; the sets read before are served on", "error", text)
		}
		return
	}
	s.stamp, s.fault = stamp, ""
}

// load opens and verifies the sets that are not open yet. s.mu is held.
func (s *Store) load() error {
	sets, err := imageset.OpenStore(s.dir)
	if err != nil {
		return err
	}
	next := map[string]*Set{}
	for arch, is := range sets {
		if have := s.current[arch]; have != nil && have.Manifest.ID == is.Manifest.ID && have.intact() {
			next[arch] = have
			continue
		}
		set, err := openSet(is)
		if err != nil {
			return err
		}
		next[arch] = set
		level := slog.LevelDebug
		if len(s.current) > 0 {
			level = slog.LevelInfo // news, unlike the sets at the start
		}
		s.log.Log(context.Background(), level, "image set", "arch", arch, "id", short(is.Manifest.ID), "kernel", is.Manifest.KernelRelease, "profile", is.Manifest.Profile)
	}
	for arch, have := range s.current {
		if next[arch] != have {
			// Dropped sets are closed by the garbage collector, when the
			// last download from them has ended.
			s.old = append([]*Set{have}, s.old...)
		}
	}
	if len(s.old) > keepOld {
		s.old = s.old[:keepOld]
	}
	s.current = next
	return nil
}

func (s *Set) intact() bool {
	for _, f := range s.files {
		if !f.Intact() {
			return false
		}
	}
	return true
}

// openSet opens what a node boots from a set. The files are hashed through
// the very descriptors that will be served.
func openSet(is *imageset.Set) (*Set, error) {
	set := &Set{Manifest: is.Manifest, files: map[string]*File{}}
	var l fault.List
	for _, mf := range is.Manifest.Files {
		if !imageset.Served(mf.Name) {
			continue // has no place on the network
		}
		f, err := openFile(is.Path(mf.Name), mf)
		if err != nil {
			l.Add(err)
			continue
		}
		set.files[mf.Name] = f
	}
	return set, l.Err(fault.Untrusted, "open image set", is.Dir, "build the image set again")
}

func openFile(name string, want imageset.File) (*File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	sum, size, err := imageset.HashFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
	if err == nil && (sum != want.SHA256 || size != want.Size) {
		err = fmt.Errorf("%s has SHA-256 %.12s and %d bytes, the manifest says %.12s and %d", want.Name, sum, size, want.SHA256, want.Size)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &File{File: want, f: f, modified: st.ModTime()}, nil
}

// stampOf tells one state of a store from another without reading it: where
// the links point and what the manifests are.
func stampOf(dir string) string {
	var b strings.Builder
	add := func(name string) {
		real, _ := filepath.EvalSymlinks(name)
		fmt.Fprintf(&b, "%s=%s", name, real)
		if st, err := os.Stat(filepath.Join(real, imageset.ManifestName)); real != "" && err == nil {
			fmt.Fprintf(&b, " %d %d %v", st.Size(), st.ModTime().UnixNano(), inode(st))
		}
		b.WriteByte('\n')
	}
	add(dir)
	links, _ := filepath.Glob(filepath.Join(dir, imageset.CurrentLink("*")))
	for _, l := range links {
		add(l)
	}
	return b.String()
}

func short(id string) string { return id[:min(12, len(id))] }
