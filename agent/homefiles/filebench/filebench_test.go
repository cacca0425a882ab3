package filebench

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/agent/homefiles/keeper"
	"mosimg/agent/homefiles/mounts"
	"mosimg/internal/fault"
)

// TestMain makes this binary also the processes that a measurement starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 {
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		var err error
		switch ctx := context.Background(); os.Args[1] {
		case Verb:
			err = Main(ctx, os.Args[2], os.Stdout)
		case keeper.Verb:
			err = keeper.Main(ctx, os.Args[2], log)
		case mounts.Verb:
			err = mounts.Main(ctx, os.Args[2], log)
		default:
			os.Exit(m.Run())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// ready skips what cannot measure; the rest of a small measurement takes seconds.
func ready(t *testing.T) Config {
	t.Helper()
	if os.Getenv("MOSIMG_HOMEFILES") == "" {
		t.Skip("mounts FUSE for some seconds: MOSIMG_HOMEFILES=1 runs it, as make test does")
	}
	conf := Config{Dir: t.TempDir(), Links: []time.Duration{0, time.Millisecond}, Runs: 1, MiB: 1, Files: 30, Starts: 2}
	// make test installs no sshd, which would run on its user's machine from then on.
	conf.NoSSHFS = conf.checkMachine(path) != nil
	if err := conf.checkMachine(path); err != nil {
		t.Fatal(err)
	}
	return conf
}

// left is what a measurement may not leave: files, mounts, processes.
func left(t *testing.T, dir string) (all []string) {
	t.Helper()
	names, err := filepath.Glob(dir + "/*")
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) || strings.Contains(line, "sshfs") {
			all = append(all, line)
		}
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		data, _ := os.ReadFile(p) // it may have ended
		if bytes.Contains(data, []byte(dir)) {
			all = append(all, string(data))
		}
	}
	return append(all, names...)
}

// A measurement does all of its work in all places, over each link, and leaves nothing.
func TestRun(t *testing.T) {
	conf := ready(t)
	var got, want []string
	err := Run(t.Context(), conf, t.Output(), func(s Sample) {
		got = append(got, fmt.Sprint(s.Link, " ", s.Work))
		if s.Ours <= 0 || (s.SSHFS > 0) == conf.NoSSHFS || s.Disk <= 0 || s.Run != 1 {
			t.Errorf("sample %+v; want a time in each place", s)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range conf.Links {
		for _, w := range worksOf(conf) {
			want = append(want, fmt.Sprint(l, " ", w.name))
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	if l := left(t, conf.Dir); len(l) > 0 {
		t.Errorf("left: %v", l)
	}
}

// Who presses ctrl-C in the middle of it gets the machine back as it was.
func TestInterrupted(t *testing.T) {
	conf := ready(t)
	conf.Runs = 1000
	ctx, cancel := context.WithCancel(t.Context())
	err := Run(ctx, conf, t.Output(), func(Sample) { cancel() })
	if fault.KindOf(err) != fault.Unavailable {
		t.Errorf("Run = %v; want a fault of kind Unavailable", err)
	}
	if l := left(t, conf.Dir); len(l) > 0 {
		t.Errorf("left: %v", l)
	}
}

// A wrong flag is told before anything is made, and all of them at once.
func TestBadConfig(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		conf Config
		want []string
	}{
		{Config{Links: []time.Duration{0}}, []string{"--runs", "--mib", "--files", "--starts"}},
		{Config{Runs: 1, MiB: 1, Files: 1, Starts: 1}, []string{"--link"}},
		{Config{Runs: 1, MiB: 1, Files: -1, Starts: 1, Links: []time.Duration{-1, time.Hour}}, []string{"--files", "1h0m0s"}},
	} {
		c.conf.Dir = dir
		err := Run(t.Context(), c.conf, io.Discard, func(Sample) { t.Error("it measures") })
		if fault.KindOf(err) != fault.Usage {
			t.Errorf("Run(%+v) = %v; want a fault of kind Usage", c.conf, err)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("Run(%+v) = %v; want it to name %s", c.conf, err, w)
			}
		}
	}
	if l := left(t, dir); len(l) > 0 {
		t.Errorf("left: %v", l)
	}
}

// Without a peer there is nothing to compare with; the error names what to install.
func TestMissingPeer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: others are refused before")
	}
	err := Config{}.checkMachine(t.TempDir())
	for _, word := range []string{"sshfs", "apt-get install sshfs openssh-server", "--sshfs=false"} {
		if fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), word) {
			t.Errorf("checkMachine = %v; want it to say %q", err, word)
		}
	}
	if err := (Config{NoSSHFS: true}).checkMachine(t.TempDir()); err == nil || strings.Contains(err.Error(), "sshfs") {
		t.Errorf("checkMachine = %v; want it to miss all but sshfs", err)
	}
}

// Each run unpacks the same archive, with as many files as were asked for.
func TestWriteTar(t *testing.T) {
	var one, two bytes.Buffer
	if err := errors.Join(writeTar(&one, 250), writeTar(&two, 250)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("two archives differ")
	}
	var names []string
	sizes := map[int64]bool{}
	for r := tar.NewReader(&one); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			names, sizes[h.Size] = append(names, h.Name), true
		}
	}
	slices.Sort(names)
	if n := len(slices.Compact(names)); n != 250 || len(sizes) < 50 {
		t.Errorf("%d files of %d sizes; want 250 of many", n, len(sizes))
	}
}
