package cli

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"mosimg/internal/fault"
)

// runLab runs `mosimg lab ARGS` in this process.
func runLab(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	status = Main(context.Background(), &Env{Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errOut, Args: append([]string{"lab"}, args...)})
	return status, out.String(), errOut.String()
}

func TestLabDryRunPrintsEveryMachine(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "l")
	status, out, stderr := runLab(t, "up", "-n", "2", "--firmware", "uefi", "--images", "no/such/images", "--dir", dir, "--dry-run")
	if status != 0 {
		t.Fatalf("status %d: %s", status, stderr)
	}
	for _, want := range []string{"-name head", "-name n1", "-name n2", "if=pflash", "mosimg.role=head", "no/such/images/vmlinuz"} {
		if !strings.Contains(out, want) {
			t.Errorf("a dry run does not print %q:\n%s", want, out)
		}
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a dry run made the lab's folder")
	}
	if status, out, _ := runLab(t, "demo", "--dry-run"); status != 0 || strings.Count(out, "-name ") != 4 {
		t.Errorf("lab demo --dry-run: status %d, want four machines:\n%s", status, out)
	}
}

func TestLabRefusals(t *testing.T) {
	empty := t.TempDir()
	for _, c := range []struct {
		args []string
		kind fault.Kind
		want string
	}{
		{[]string{"up", "--firmware", "coreboot"}, fault.Usage, "bios and uefi"},
		{[]string{"up", "-n", "100"}, fault.Usage, "0 and 99"},
		{[]string{"up", "-n", "-1"}, fault.Usage, "0 and 99"},
		{[]string{"up", "--link", "fast"}, fault.Usage, "100mbit"},
		{[]string{"up", "--memory", "-5"}, fault.Usage, "--memory -5"},
		{[]string{"up", "-n", "1", "--nic", "wifi", "--dry-run"}, fault.Usage, "e1000"},
		{[]string{"up", "extra"}, fault.Usage, "extra"},
		{[]string{"run"}, fault.Usage, "--list"},
		{[]string{"run", "no-such"}, fault.Usage, "bios-join"},
		{[]string{"demo", "--images", empty}, fault.NotFound, "mosimg build"},
		{[]string{"up", "--images", empty, "--dir", filepath.Join(empty, "l")}, fault.NotFound, "mosimg build"},
		{[]string{"down", "--dir", empty}, fault.NotFound, "mosimg lab up"},
		{[]string{"status", "--dir", empty}, fault.NotFound, "mosimg lab up"},
		{[]string{"exec", "--dir", empty, "head", "--", "true"}, fault.NotFound, "mosimg lab up"},
		{[]string{"exec", "--dir", empty, "n1", "--", "true"}, fault.Usage, "only the head"},
		{[]string{"exec", "head", "--"}, fault.Usage, "command"},
	} {
		status, out, stderr := runLab(t, c.args...)
		if status != int(c.kind) || !strings.Contains(stderr, c.want) || out != "" {
			t.Errorf("mosimg lab %s: status %d, %q; want %d and %q", strings.Join(c.args, " "), status, stderr, c.kind, c.want)
		}
		if n := strings.Count(strings.TrimSpace(stderr), "\n"); n > 0 {
			t.Errorf("mosimg lab %s: %d lines, want one:\n%s", strings.Join(c.args, " "), n+1, stderr)
		}
	}
	if left, _ := os.ReadDir(empty); len(left) > 0 {
		t.Errorf("refused labs left %v behind", left)
	}
}

func TestLabRunList(t *testing.T) {
	status, out, _ := runLab(t, "run", "--list")
	if status != 0 || !strings.Contains(out, "head-restart") {
		t.Errorf("lab run --list: status %d:\n%s", status, out)
	}
}
