package cgroup

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestFindMount(t *testing.T) {
	for name, tt := range map[string]struct{ table, want string }{
		"unified":   {"30 22 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup"},
		"hybrid":    {"31 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n40 30 0:37 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n", "/sys/fs/cgroup/unified"},
		"blank":     {`40 30 0:37 / /a\040b rw - cgroup2 none rw`, "/a b"},
		"bind":      {"40 30 0:37 /leaf /mnt rw - cgroup2 none rw\n41 30 0:37 / /cg rw - cgroup2 none rw\n", "/cg"},
		"none":      {"31 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", ""},
		"truncated": {"31 30\n - \n", ""},
	} {
		if got, err := findMount(strings.NewReader(tt.table)); err != nil || got != tt.want {
			t.Errorf("%s: findMount = %q, %v; want %q", name, got, err, tt.want)
		}
	}
}

func TestFreezeThawKill(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("cgroups need root")
	}
	mount, err := Mount()
	if err != nil {
		t.Skip(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	parent := filepath.Join(mount, fmt.Sprintf("mosimg-test-%d", os.Getpid()))
	dir := filepath.Join(parent, "leaf")
	l, err := Create(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, d := range []string{dir, parent} {
			if err := Remove(context.Background(), d); err != nil {
				t.Error(err)
			}
		}
	})
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	if err := l.Move(cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if got, err := l.Procs(); err != nil || !slices.Equal(got, []int{cmd.Process.Pid}) {
		t.Errorf("Procs = %v, %v; want %d", got, err, cmd.Process.Pid)
	}
	for _, freeze := range []bool{true, false, true} {
		if freeze {
			err = l.Freeze(ctx)
		} else {
			err = l.Thaw()
		}
		if got, ferr := l.Frozen(); err != nil || ferr != nil || got != freeze {
			t.Errorf("frozen %v: %v, Frozen = %v, %v", freeze, err, got, ferr)
		}
	}
	if err := l.Kill(); err != nil { // a frozen process dies too
		t.Fatal(err)
	}
	cmd.Wait()
	if err := l.AwaitEmpty(ctx); err != nil {
		t.Error(err)
	}
}
