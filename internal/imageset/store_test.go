package imageset

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/fault"
)

// publish makes a set with that kernel and publishes it.
func publish(t *testing.T, s Store, kernel string, keep int) string {
	t.Helper()
	dir := t.TempDir()
	m := writeSet(t, dir, kernel)
	set, err := s.Publish(dir, keep)
	if err != nil {
		t.Fatal(err)
	}
	if set.Manifest.ID != m.ID {
		t.Fatalf("published %.8s; want %.8s", set.Manifest.ID, m.ID)
	}
	return m.ID
}

// served is what a head finds in the store.
func served(t *testing.T, s Store) string {
	t.Helper()
	sets, err := OpenStore(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := sets["amd64"].Verify(); err != nil {
		t.Error(err)
	}
	return sets["amd64"].Manifest.ID
}

func ids(t *testing.T, s Store) (all []string) {
	t.Helper()
	sets, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, set := range sets {
		all = append(all, set.Manifest.ID)
	}
	return all
}

// A new set is served at once, the last ones stay for a way back, and older
// ones do not fill the disk.
func TestPublishKeepsTheLastSets(t *testing.T) {
	s := Store{filepath.Join(t.TempDir(), "store")}
	var all []string
	for _, k := range []string{"a", "b", "c", "d", "e"} {
		id := publish(t, s, k, 3)
		if got := served(t, s); got != id {
			t.Errorf("after publishing %s %.8s is served", k, got)
		}
		all = append(all, id)
	}
	if d := cmp.Diff([]string{all[4], all[3], all[2]}, ids(t, s)); d != "" {
		t.Errorf("kept (-want +got):\n%s", d)
	}
	// The same again changes nothing, in the history neither.
	before, err := s.History("amd64")
	if err != nil {
		t.Fatal(err)
	}
	publish(t, s, "e", 3)
	if after, _ := s.History("amd64"); len(after) != len(before) || len(before) != 5 {
		t.Errorf("history has %d lines, then %d; want 5", len(before), len(after))
	}
	if _, err := os.Stat(filepath.Join(s.Dir, all[4], HeadArchive)); err == nil {
		t.Error("the head archive is in the store")
	}
}

// One command goes back to what was served before, a second one forth again;
// an id names any that is there.
func TestRollback(t *testing.T) {
	s := Store{t.TempDir()}
	a, b, c := publish(t, s, "a", 9), publish(t, s, "b", 9), publish(t, s, "c", 9)
	for _, tt := range []struct{ want, id string }{{"", b}, {"", c}, {a[:12], a}, {"", c}} {
		set, err := s.Rollback("", tt.want)
		if err != nil {
			t.Fatal(err)
		}
		if got := served(t, s); got != tt.id || set.Manifest.ID != tt.id {
			t.Errorf("Rollback(%q): %.8s is served; want %.8s", tt.want, got, tt.id)
		}
	}
	for _, want := range []string{"zz", "../x"} {
		if _, err := s.Rollback("", want); fault.KindOf(err) != fault.NotFound {
			t.Errorf("Rollback(%q) = %v; want not found", want, err)
		}
	}
	if _, err := s.Rollback("386", ""); fault.KindOf(err) != fault.NotFound {
		t.Errorf("Rollback of an architecture that is not there = %v; want not found", err)
	}
	// A damaged set is not gone back to.
	if err := os.WriteFile(filepath.Join(s.Dir, b, Kernel), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Rollback("", b); err == nil || served(t, s) != c {
		t.Errorf("Rollback to a damaged set = %v, %.8s is served", err, served(t, s))
	}
	// Published again it is whole.
	if publish(t, s, "b", 9); served(t, s) != b {
		t.Error("a damaged set is not replaced by a publish")
	}
}

func TestRollbackOfTheOnlySet(t *testing.T) {
	s := Store{t.TempDir()}
	only := publish(t, s, "a", 3)
	if _, err := s.Rollback("", ""); fault.KindOf(err) != fault.NotFound || served(t, s) != only {
		t.Errorf("Rollback = %v; want not found", err)
	}
}

// A store that was filled by hand can be published to, and gone back in.
func TestStoreMadeByHand(t *testing.T) {
	s := Store{t.TempDir()}
	tmp := t.TempDir()
	old := writeSet(t, tmp, "old").ID
	if err := os.CopyFS(filepath.Join(s.Dir, old), os.DirFS(tmp)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(old, filepath.Join(s.Dir, CurrentLink("amd64"))); err != nil {
		t.Fatal(err)
	}
	publish(t, s, "new", 3)
	if _, err := s.Rollback("amd64", ""); err != nil || served(t, s) != old {
		t.Errorf("Rollback = %v, %.8s is served; want what was there before", err, served(t, s))
	}
}

// What an interrupted publish left is neither listed nor served nor kept.
func TestInterruptedPublish(t *testing.T) {
	s := Store{t.TempDir()}
	id := publish(t, s, "a", 3)
	half := filepath.Join(s.Dir, incoming+"123")
	if err := os.MkdirAll(half, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.Dir, strings.Repeat("0", 64)), 0o755); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{id}, ids(t, s)); d != "" {
		t.Errorf("listed (-want +got):\n%s", d)
	}
	publish(t, s, "b", 3)
	if _, err := os.Stat(half); err == nil {
		t.Error("what an interrupted publish left is still there")
	}
}

// A set with other bytes than its manifest says is not published, and what is
// served stays.
func TestPublishChecksEveryByte(t *testing.T) {
	s := Store{t.TempDir()}
	good := publish(t, s, "a", 3)
	dir := t.TempDir()
	writeSet(t, dir, "kernel")
	if err := os.WriteFile(filepath.Join(dir, Kernel), []byte("KERNEL"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Publish(dir, 3); fault.KindOf(err) != fault.Untrusted {
		t.Errorf("Publish = %v; want untrusted", err)
	}
	if served(t, s) != good || len(ids(t, s)) != 1 {
		t.Errorf("%.8s is served and %d sets are there", served(t, s), len(ids(t, s)))
	}
	// Neither is a set published into a set, nor at the same time as another.
	if _, err := (Store{dir}).Publish(dir, 3); fault.KindOf(err) != fault.Usage {
		t.Errorf("Publish into a set = %v; want usage", err)
	}
	unlock, err := s.lock("test")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if _, err := s.Rollback("", ""); fault.KindOf(err) != fault.Unavailable {
		t.Errorf("Rollback during a publish = %v; want unavailable", err)
	}
}

// A manifest's words do not lead out of the store.
func TestPublishRefusesAPathAsArchitecture(t *testing.T) {
	s := Store{t.TempDir()}
	for _, arch := range []string{"", "../../x", "a/b", "amd64\n"} {
		dir := t.TempDir()
		m := writeSet(t, dir, "kernel")
		m.Arch = arch
		m.ID = m.ComputeID()
		if err := m.Write(dir); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Publish(dir, 3); err == nil || !strings.Contains(err.Error(), "architecture") {
			t.Errorf("Publish of a set for %q = %v; want a refusal", arch, err)
		}
	}
	if links, _ := filepath.Glob(filepath.Join(s.Dir, "current-*")); len(links) > 0 {
		t.Errorf("made: %v", links)
	}
}
