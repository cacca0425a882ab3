package migrate

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// An agent that is killed while it writes leaves neither half a record nor a file
// that nobody removes.
func TestJournalAfterACrash(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "journal")
	j, err := OpenJournal[int](dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.Put("job.1", 1); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".job.1.json.4245930339", ".job.2.json.1"} { // as package atomicfile names them
		if err := os.WriteFile(filepath.Join(dir, name), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if j, err = OpenJournal[int](dir); err != nil {
		t.Fatal(err)
	}
	all, err := j.All()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]int{"job.1": 1}, all); d != "" {
		t.Errorf("records (-want +got):\n%s", d)
	}
	names, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(names) > 0 {
		t.Errorf("%v is left, %v", names, err)
	}
	for _, key := range []string{"", ".x", "a/b", "a\x00"} {
		if err := j.Put(key, 1); err == nil {
			t.Errorf("key %q was taken", key)
		}
	}
}
