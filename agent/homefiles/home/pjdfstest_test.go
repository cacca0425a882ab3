package home_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"mosimg/agent/homefiles/home"
)

// TestPjdfstest runs the POSIX test suite pjdfstest over the mount, if
// HOMEFILES_PJDFSTEST names its tests folder (built from source: no
// distribution packages it).
func TestPjdfstest(t *testing.T) {
	tests := os.Getenv("HOMEFILES_PJDFSTEST")
	if tests == "" {
		t.Skip("HOMEFILES_PJDFSTEST does not name pjdfstest's tests folder")
	}
	p := newPair(t, options{users: pjdUsers()})
	work := p.mnt
	if os.Getenv("HOMEFILES_PJD_LOCAL") != "" {
		work = p.dir // the oracle: the same on the local disk
	}
	files, err := filepath.Glob(filepath.Join(tests, os.Getenv("HOMEFILES_PJD_ONLY")+"*/*.t"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no tests in %s: %v", tests, err)
	}
	for _, f := range files {
		name := strings.TrimPrefix(f, tests+"/")
		cmd := exec.CommandContext(context.Background(), "bash", "-c", in(work, "exec bash "+f))
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		err := cmd.Run()
		bad := 0
		for line := range strings.Lines(out.String()) {
			if strings.HasPrefix(line, "not ok") && !strings.Contains(line, "TODO") {
				if bad++; bad <= 5 {
					t.Errorf("%s: %s", name, strings.TrimSpace(line))
				}
			}
		}
		if bad > 5 {
			t.Errorf("%s: %d subtests fail", name, bad)
		}
		if err != nil && bad == 0 {
			t.Errorf("%s: %v: %s", name, err, out.String())
		}
	}
}

// pjdUsers are the users of the suite, with the groups in which it uses them.
// Group 0 is that of a test which changes only the user.
func pjdUsers() []home.Cred {
	users := []home.Cred{{Groups: []uint32{65531, 65532, 65533, 65534, 65535}}}
	for u := uint32(65530); u <= 65535; u++ {
		users = append(users, home.Cred{UID: u, GID: u, Groups: []uint32{0, 65531, 65532}})
	}
	return users
}
