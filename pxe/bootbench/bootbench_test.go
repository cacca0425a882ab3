package bootbench

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/fault"
)

// TestMain makes this binary also the processes that a measurement starts.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 {
		var err error
		switch ctx := context.Background(); os.Args[1] {
		case Verb:
			err = Main(ctx, os.Args[2], os.Stdout)
		case ServerVerb:
			err = ServerMain(ctx, os.Args[2])
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

// standIn puts a script into PATH that does a peer's work with a program that
// make test has installed: the measurement is tested, not the peer.
func standIn(t *testing.T, peer, program, script string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for a network namespace")
	}
	if _, err := look(program); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, peer), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH")+":/usr/sbin")
}

// run measures and checks that all figures are there, and nothing is left.
func run(t *testing.T, conf Config, want []string) {
	t.Helper()
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	var got []string
	err := Run(t.Context(), conf, t.Output(), func(s Sample) {
		got = append(got, s.Name)
		if s.Ours <= 0 || s.That <= 0 || s.Unit == "" || s.Peer == "" {
			t.Errorf("sample %+v; want two figures, a unit and a peer", s)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("figures (-want +got):\n%s", d)
	}
	if left, _ := filepath.Glob(tmp + "/*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if data, _ := os.ReadFile(p); strings.Contains(string(data), tmp) {
			t.Errorf("still runs: %q", data)
		}
	}
}

func TestRunTFTP(t *testing.T) {
	standIn(t, "in.tftpd", "dnsmasq", `
for root; do :; done
exec dnsmasq --no-daemon --conf-file=/dev/null --port=0 --enable-tftp --tftp-root="$root" --listen-address=127.0.0.3 --bind-interfaces --user=root
`)
	var want []string
	for _, link := range []string{"loopback", "1ms"} {
		for _, window := range []string{"window1", "window4", "window64", "best"} {
			want = append(want, "tftp-"+link+"-"+window, "tftp-"+link+"-"+window) // two peers
		}
	}
	run(t, Config{Kind: TFTP, Links: []time.Duration{0, time.Millisecond}, Runs: 1, KiB: 64}, want)
}

func TestRunHTTP(t *testing.T) {
	standIn(t, "nginx", "python3", `
test "$1" = -v && { echo "nginx version: nginx/0.0"; exit; }
exec python3 -m http.server --bind 127.0.0.2 --directory "$2/boot" 80
`)
	run(t, Config{Kind: HTTP, Links: []time.Duration{time.Millisecond}, Runs: 1, KiB: 64}, []string{"http-1ms-1clients", "http-1ms-8clients"})
}

// A peer that does not start is named with what it said, and soon.
func TestPeerThatDoesNotStart(t *testing.T) {
	standIn(t, "nginx", "python3", "echo no such module >&2; exit 3\n")
	var said strings.Builder
	err := Run(t.Context(), Config{Kind: HTTP, Links: []time.Duration{0}, Runs: 1, KiB: 1}, &said, func(Sample) { t.Error("it measures") })
	if fault.KindOf(err) != fault.Environment || !strings.Contains(said.String(), "no such module") || !strings.Contains(said.String(), "exit status 3") {
		t.Errorf("Run = %v and said %q; want the peer's own words", err, said.String())
	}
}

// A wrong flag is told before anything is started, and all of them at once; a
// peer that is missing with its package.
func TestRefusals(t *testing.T) {
	for _, tt := range []struct {
		conf Config
		want []string
	}{
		{Config{Kind: TFTP}, []string{"--runs", "--kib", "--link"}},
		{Config{Kind: HTTP, Runs: 1, KiB: 1 << 30, Links: []time.Duration{time.Hour}}, []string{"--kib", "1h0m0s"}},
	} {
		err := Run(t.Context(), tt.conf, io.Discard, func(Sample) {})
		for _, w := range tt.want {
			if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), w) {
				t.Errorf("Run(%+v) = %v; want a fault of kind Usage that names %s", tt.conf, err, w)
			}
		}
	}
	if os.Geteuid() != 0 {
		return // refused for that
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := exec.LookPath("/usr/sbin/nginx"); err == nil {
		return // it is there
	}
	err := Run(t.Context(), Config{Kind: HTTP, Runs: 1, KiB: 1, Links: []time.Duration{0}}, io.Discard, func(Sample) {})
	if fault.KindOf(err) != fault.Environment || !strings.Contains(err.Error(), "apt-get install nginx") {
		t.Errorf("Run without nginx = %v; want its package named", err)
	}
}
