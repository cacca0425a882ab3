package cli

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"mosimg/internal/fault"
	"mosimg/pxe/imagetest"
)

// A session of an operator: publish, publish, look, go back.
func TestImagePublishAndRollback(t *testing.T) {
	store := filepath.Join(t.TempDir(), "images")
	var all []string
	for _, tag := range []string{"one", "two"} {
		dir := t.TempDir()
		id := imagetest.Make(t, dir, "amd64", imagetest.Files(tag))
		status, out, errs := mosimg(t, "image", "publish", dir, "--images", store)
		if want := id[:12] + " is served for amd64\n"; status != 0 || out != want {
			t.Fatalf("publish: status %d, %q, %q; want %q", status, out, errs, want)
		}
		all = append(all, id)
	}
	current := func() string {
		status, out, errs := mosimg(t, "image", "ls", "--images", store, "--json")
		var rows []imageRow
		if err := json.Unmarshal([]byte(out), &rows); err != nil || status != 0 || len(rows) != 2 {
			t.Fatalf("ls: status %d, %v, %q, %q; want two sets", status, err, out, errs)
		}
		for _, r := range rows {
			if r.Current {
				return r.ID
			}
		}
		return ""
	}
	if got := current(); got != all[1] {
		t.Errorf("%.12s is current; want the last one", got)
	}
	if status, out, errs := mosimg(t, "image", "rollback", "--images", store); status != 0 || !strings.HasPrefix(out, all[0][:12]) || current() != all[0] {
		t.Errorf("rollback: status %d, %q, %q", status, out, errs)
	}
	_, out, _ := mosimg(t, "image", "ls", "--images", store)
	lines := strings.Split(out, "\n")
	if f := strings.Fields(lines[1]); f[0] != all[0][:12] || f[2] != "now" {
		t.Errorf("ls:\n%s\nwant %.12s first, served now", out, all[0])
	}
	for _, args := range [][]string{{"publish", t.TempDir()}, {"publish", "x", "--keep", "0"}, {"rollback", "ffff0000"}, {"rollback", ""}, {"ls", "x"}} {
		status, _, errs := mosimg(t, append([]string{"image", "--images", store}, args...)...)
		if status != int(fault.NotFound) && status != int(fault.Usage) || strings.Count(errs, "\n") != 1 {
			t.Errorf("image %v: status %d, %q; want one line and not found or usage", args, status, errs)
		}
	}
}
