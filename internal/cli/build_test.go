package cli

import (
	"bytes"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"mosimg/image/steps"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
)

// runBuild runs "mosimg build" as a user does.
func runBuild(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = Main(t.Context(), &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs, Args: append([]string{"build"}, args...)})
	return status, out.String(), errs.String()
}

// Each refusal is one line with the right exit status, and makes nothing.
func TestBuildRefuses(t *testing.T) {
	dir := t.TempDir()
	profile := filepath.Join(dir, "bad.yaml")
	if err := os.WriteFile(profile, []byte("arch: vax\nno: 1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "new", "out")
	for _, tc := range []struct {
		args []string
		kind fault.Kind
		want string
	}{
		{[]string{"--nope"}, fault.Usage, "--help"},
		{[]string{"what"}, fault.Usage, "--help"},
		{[]string{"--profile", "nope"}, fault.Usage, "there are: x86_64"},
		{[]string{"--profile", profile}, fault.Usage, `line 2: unknown key "no"`},
		{[]string{"--profile", profile}, fault.Usage, `line 1: arch: "vax"`},
		{[]string{"--arch", "386"}, fault.Usage, "amd64 only"},
		{[]string{"--arch", "vax"}, fault.Usage, "amd64 and 386"},
		{[]string{"--outputs", "pxe,floppy"}, fault.Usage, "makes: pxe, uki, disk, iso, qcow2"},
		{[]string{"--outputs", "iso", "--head", "https://10.0.0.1:4660"}, fault.Usage, "belong together"},
		{[]string{"--ca", "/nonexistent"}, fault.Usage, "no such file"},
		{[]string{"--ca", profile}, fault.Usage, "no certificate in PEM form"},
		{[]string{"-o", profile}, fault.Environment, "it is a file"},
		{[]string{"-o", dir}, fault.Environment, "not an image set"},
		{[]string{"-o", profile + "/x"}, fault.Environment, "prepare output folder"},
		{[]string{"--cache", profile}, fault.Environment, "open cache"},
		{[]string{"--source", dir}, fault.Usage, "not a checkout of mosimg"},
		{[]string{"--mirror", "gopher://x"}, fault.Usage, "--mirror"},
		{[]string{"--mirror", "file:///nonexistent", "--keyring", profile}, fault.Usage, "OpenPGP"},
		{[]string{"--keyring", "/nonexistent"}, fault.Usage, "no such file"},
	} {
		// Later flags win, so the defaults keep each run inside the test.
		args := append([]string{"-o", out, "--cache", filepath.Join(dir, "cache"), "--mirror", "file:///nonexistent"}, tc.args...)
		status, stdout, stderr := runBuild(t, args...)
		if status != int(tc.kind) || !strings.Contains(stderr, tc.want) || !strings.HasPrefix(stderr, "mosimg: ") {
			t.Errorf("build %q = %d, %q; want %d with %q", tc.args, status, stderr, tc.kind, tc.want)
		}
		if stdout != "" {
			t.Errorf("build %q wrote %q to standard output", tc.args, stdout)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); err == nil {
		t.Error("a refused build left a folder")
	}
}

// --ca takes the file that a head's operator has, and the pin that its nodes show.
func TestPinOf(t *testing.T) {
	ca, err := identity.NewCA("test")
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	want := identity.Pin(ca.Cert)
	for _, given := range []string{name, want} {
		if got, err := pinOf(given); err != nil || got != want {
			t.Errorf("pinOf(%s) = %s, %v; want %s", given, got, err, want)
		}
	}
}

func TestStepReporter(t *testing.T) {
	events := []steps.Event{
		{Step: "kernel", Kind: steps.Started, Why: []string{"package linux changed from 1 to 2"}},
		{Step: "kernel", Kind: steps.Progress, Text: "fetched 3 of 9 MB"},
		{Step: "kernel", Kind: steps.Done, Took: 1230 * time.Millisecond},
		{Step: "criu", Kind: steps.Done, Reused: true},
		{Step: "agent", Kind: steps.Started, Why: []string{"1", "2", "3", "4", "5", "6", "7", "8", "9", "10"}},
	}
	for explain, want := range map[bool][]string{
		false: {"kernel           ...", "kernel           fetched 3 of 9 MB", "kernel           1.2 s", "criu             reused", "agent            ..."},
		true: {
			"kernel           to be built, because:", "                   package linux changed from 1 to 2", "kernel           fetched 3 of 9 MB", "kernel           1.2 s",
			"criu             reused", "agent            to be built, because:", "1", "2", "3", "4", "5", "6", "7", "8", "and 2 more",
		},
	} {
		var b bytes.Buffer
		report := stepReporter(&b, explain)
		for _, e := range events {
			report(e)
		}
		lines := strings.Split(strings.TrimSpace(b.String()), "\n")
		if len(lines) != len(want) {
			t.Errorf("explain %v: %d lines, want %d:\n%s", explain, len(lines), len(want), b.String())
			continue
		}
		for i := range want {
			if strings.TrimSpace(lines[i]) != strings.TrimSpace(want[i]) {
				t.Errorf("explain %v: line %d = %q; want %q", explain, i, lines[i], want[i])
			}
		}
	}
}
