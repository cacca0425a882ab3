package scenario

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"

	"mosimg/internal/labport"
	"mosimg/qemu-tests/leak"
)

// headStore is the head's database on its machine.
const headStore = "/var/lib/mosimg/head.db"

func noImageLeak(ctx context.Context, r *Run) error {
	// With a member in it the store has all kinds of secrets.
	if _, err := r.member(ctx, bios); err != nil {
		return err
	}
	return r.step("no secret of the head is in the image set", func() (string, error) {
		dir, err := os.MkdirTemp("", "mosimg-leak-")
		if err != nil {
			return "", err
		}
		defer os.RemoveAll(dir)
		store := filepath.Join(dir, "head.db")
		if err := r.copyStore(ctx, store); err != nil {
			return "", err
		}
		secrets, err := leak.Secrets(store)
		if err != nil {
			return "", err
		}
		found, scanned, err := leak.Scan(ctx, r.Lab.Set(), secrets)
		if err != nil {
			return "", err
		}
		if len(found) > 0 {
			return "", fmt.Errorf("the image set holds what only the head may know: %v", found)
		}
		return fmt.Sprintf("%d secrets, %d MiB searched", len(secrets), scanned>>20), nil
	})
}

// copyStore copies the head's database while the head stands still, so that
// the copy is one moment's.
func (r *Run) copyStore(ctx context.Context, name string) (err error) {
	pids, err := r.Lab.Processes(ctx, "mosimg", "head")
	if err != nil {
		return err
	}
	if len(pids) != 1 {
		return fmt.Errorf("the head runs %d processes `mosimg head`; want 1", len(pids))
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	var errOut bytes.Buffer
	exit, err := r.Lab.Exec(ctx, labport.Cmd{
		Argv:   []string{"sh", "-c", fmt.Sprintf("kill -STOP %d && cat %s; s=$?; kill -CONT %d; exit $s", pids[0], headStore, pids[0])},
		Stdout: f, Stderr: &errOut,
	})
	if err == nil && exit.Status != 0 {
		err = fmt.Errorf("read %s on the head: %v: %s", headStore, exit, errOut.String())
	}
	return err
}
