package imageset

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
)

// Store is an image store: a folder with one set in each sub-folder, named by
// its id, and a link current-ARCH for each architecture, which names the set
// that a head serves. The links are changed by rename, so a head sees the old
// set or the new one. history-ARCH has a line for each change: when, and what
// has been served since.
type Store struct {
	Dir string
}

// historyFile is the name of the record of what was served for arch.
func historyFile(arch string) string { return "history-" + arch }

// maxHistory bounds the lines of a history; the oldest go first.
const maxHistory = 200

// incoming begins the name of a folder that a set is being copied into.
const incoming = ".incoming-"

// Serving is one line of the history.
type Serving struct {
	Since time.Time `json:"since"`
	ID    string    `json:"id"`
}

// Publish copies the set in dir into the store, checks every byte, makes it
// the current one of its architecture and removes the oldest sets of it until
// keep are left. The head archive stays behind: it has no place on the network.
// A set that is in the store already is only made current.
func (s Store) Publish(dir string, keep int) (*Set, error) {
	const op = "publish image set"
	src, err := Open(dir)
	if err != nil {
		return nil, err
	}
	unlock, err := s.lock(op)
	if err != nil {
		return nil, err
	}
	defer unlock()
	set := &Set{Dir: filepath.Join(s.Dir, src.Manifest.ID), Manifest: src.Manifest.WithoutHead()}
	if have, err := Open(set.Dir); err != nil || have.Verify() != nil {
		if err := s.take(src, set); err != nil {
			return nil, fault.New(faultKind(err), op, dir, err, "")
		}
	}
	if err := s.serve(set.Manifest); err != nil {
		return nil, fault.New(fault.Environment, op, dir, err, "")
	}
	if err := s.prune(set.Manifest.Arch, keep); err != nil {
		return nil, fault.New(fault.Environment, "remove old image sets of", s.Dir, err, "the new one is being served")
	}
	return set, nil
}

// faultKind is the kind of an error from a copy: a file of other bytes than
// the manifest has, or something in the way.
func faultKind(err error) fault.Kind {
	if k := fault.KindOf(err); k == fault.Untrusted {
		return k
	}
	return fault.Environment
}

// take copies a set to where it belongs in the store. Its place is taken by a
// rename when all of it is there and durable.
func (s Store) take(src, dst *Set) error {
	tmp, err := os.MkdirTemp(s.Dir, incoming)
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) // nothing is left when it was renamed
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	fresh := &Set{Dir: tmp, Manifest: dst.Manifest}
	for _, f := range dst.Manifest.Files {
		if err := copyDurably(src.Path(f.Name), fresh.Path(f.Name)); err != nil {
			return err
		}
	}
	if err := fresh.Manifest.Write(tmp); err != nil {
		return err
	}
	if err := fresh.Verify(); err != nil {
		return err
	}
	// A damaged set of this id is in the way; a head that serves it has its
	// files open.
	if err := os.RemoveAll(dst.Dir); err != nil {
		return err
	}
	if err := os.Rename(tmp, dst.Dir); err != nil {
		return err
	}
	return atomicfile.SyncDir(s.Dir)
}

func copyDurably(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	return atomicfile.WriteFunc(to, 0o644, func(w io.Writer) error {
		_, err := io.Copy(w, in)
		return err
	})
}

// serve makes a set of the store the current one of its architecture.
func (s Store) serve(m *Manifest) error {
	// It becomes a part of file names here.
	if m.Arch == "" || strings.Trim(m.Arch, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return fmt.Errorf("the manifest's architecture %q is not one word", m.Arch)
	}
	past, err := s.History(m.Arch)
	if err != nil {
		return err
	}
	link := filepath.Join(s.Dir, CurrentLink(m.Arch))
	now, last := s.Current(m.Arch), ""
	if len(past) > 0 {
		last = past[len(past)-1].ID
	}
	if now == m.ID && last == m.ID {
		return nil // as it is
	}
	if st, err := os.Lstat(link); err == nil && validID(now) && now != last {
		past = append(past, Serving{st.ModTime(), now}) // somebody set the link by hand
	}
	past = append(past, Serving{time.Now(), m.ID})
	// The record first: a link without its line would make a rollback
	// skip a set; a line without its link is put right by the next change.
	var b strings.Builder
	for _, x := range past[max(0, len(past)-maxHistory):] {
		fmt.Fprintf(&b, "%s %s\n", x.Since.UTC().Format(time.RFC3339), x.ID)
	}
	if err := atomicfile.Write(filepath.Join(s.Dir, historyFile(m.Arch)), []byte(b.String()), 0o644); err != nil {
		return err
	}
	tmp := filepath.Join(s.Dir, incoming+CurrentLink(m.Arch))
	os.Remove(tmp)
	if err := os.Symlink(m.ID, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, link); err != nil {
		return err
	}
	return atomicfile.SyncDir(s.Dir)
}

// History is what was served for arch, oldest first. A store that was filled
// by hand has none.
func (s Store) History(arch string) ([]Serving, error) {
	f, err := os.Open(filepath.Join(s.Dir, historyFile(arch)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []Serving
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		when, id, _ := strings.Cut(lines.Text(), " ")
		if t, err := time.Parse(time.RFC3339, when); err == nil && validID(id) {
			all = append(all, Serving{t, id})
		}
	}
	return all, lines.Err()
}

func validID(id string) bool {
	return len(id) == 64 && strings.Trim(id, "0123456789abcdef") == ""
}

// Current is the id of the set that is served for arch, or "".
func (s Store) Current(arch string) string {
	id, err := os.Readlink(filepath.Join(s.Dir, CurrentLink(arch)))
	if err != nil {
		return ""
	}
	return filepath.Base(id)
}

// List is all complete sets of the store, by architecture, those that were
// served last first.
func (s Store) List() ([]*Set, error) {
	entries, err := os.ReadDir(s.Dir)
	if err != nil {
		return nil, fault.New(fault.Environment, "list image store", s.Dir, err, "name one with --images")
	}
	last := map[string]int{} // id -> place in its history, from 1
	var sets []*Set
	for _, e := range entries {
		if !validID(e.Name()) || !e.IsDir() {
			continue
		}
		set, err := Open(filepath.Join(s.Dir, e.Name()))
		if err != nil || set.Manifest.ID != e.Name() {
			continue // half a set that somebody copies by hand
		}
		sets = append(sets, set)
		past, err := s.History(set.Manifest.Arch)
		if err != nil {
			return nil, fault.New(fault.Environment, "list image store", s.Dir, err, "")
		}
		for i, x := range past {
			last[x.ID] = i + 1
		}
	}
	sort.SliceStable(sets, func(i, j int) bool {
		a, b := sets[i].Manifest, sets[j].Manifest
		if a.Arch != b.Arch {
			return a.Arch < b.Arch
		}
		return last[a.ID] > last[b.ID]
	})
	return sets, nil
}

// Rollback makes another set of the store the current one: the one that want
// begins the id of, or with "" the one that was served before the current one
// of arch. arch may be "" when the store has one architecture only.
func (s Store) Rollback(arch, want string) (*Set, error) {
	const op, hint = "roll back", "see: mosimg image ls"
	unlock, err := s.lock(op)
	if err != nil {
		return nil, err
	}
	defer unlock()
	sets, err := s.List()
	if err != nil {
		return nil, err
	}
	pick := s.before
	if want != "" {
		pick = func(sets []*Set, _ string) (*Set, error) { return byPrefix(sets, want) }
	}
	set, err := pick(sets, arch)
	if err != nil {
		return nil, fault.New(fault.NotFound, op, cmp.Or(want, arch), err, hint)
	}
	if err := set.Verify(); err != nil {
		return nil, err
	}
	if err := s.serve(set.Manifest); err != nil {
		return nil, fault.New(fault.Environment, op, set.Manifest.ID, err, "")
	}
	return set, nil
}

// byPrefix is the only set whose id begins so.
func byPrefix(sets []*Set, want string) (found *Set, err error) {
	for _, set := range sets {
		if !strings.HasPrefix(set.Manifest.ID, want) {
			continue
		}
		if found != nil {
			return nil, errors.New("several sets have an id that begins so")
		}
		found = set
	}
	if found == nil {
		return nil, errors.New("no set in the store has an id that begins so")
	}
	return found, nil
}

// before is the set of arch that was served last before the current one and
// is still there. sets are in List's order.
func (s Store) before(sets []*Set, arch string) (*Set, error) {
	if arch == "" {
		archs := map[string]bool{}
		for _, set := range sets {
			arch = set.Manifest.Arch
			archs[arch] = true
		}
		if len(archs) > 1 {
			return nil, errors.New("the store has sets for several architectures: name one with --arch")
		}
	}
	past, err := s.History(arch)
	if err != nil {
		return nil, err
	}
	for _, x := range slices.Backward(past) {
		for _, set := range sets {
			if set.Manifest.ID == x.ID && x.ID != s.Current(arch) {
				return set, nil
			}
		}
	}
	return nil, errors.New("no other set that was served is still in the store")
}

// prune removes the sets of arch that were served longest ago, so that keep
// are left, and what an interrupted publish left. The current one stays.
func (s Store) prune(arch string, keep int) error {
	sets, err := s.List()
	if err != nil {
		return err
	}
	kept := 0
	for _, set := range sets {
		if set.Manifest.Arch != arch {
			continue
		}
		if kept++; kept <= keep || set.Manifest.ID == s.Current(arch) {
			continue
		}
		if err := os.RemoveAll(set.Dir); err != nil {
			return err
		}
	}
	left, _ := filepath.Glob(filepath.Join(s.Dir, incoming+"*"))
	for _, name := range left { // the lock is ours: nobody is at work on them
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}

// lock keeps two commands from changing the store at once. It makes the
// folder if need be.
func (s Store) lock(op string) (unlock func(), err error) {
	if _, err := os.Stat(filepath.Join(s.Dir, ManifestName)); err == nil {
		return nil, fault.New(fault.Usage, op, s.Dir, "this is an image set and not a store of them", "name another folder with --images, and the head too")
	}
	err = os.MkdirAll(s.Dir, 0o755)
	var f *os.File
	if err == nil {
		f, err = os.OpenFile(filepath.Join(s.Dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	}
	if err != nil {
		return nil, fault.New(fault.Environment, op, s.Dir, err, "")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fault.New(fault.Unavailable, op, s.Dir, "another mosimg is changing this store", "try again when it has ended")
	}
	return func() { f.Close() }, nil
}
