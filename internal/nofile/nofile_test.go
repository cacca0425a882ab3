package nofile_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"mosimg/internal/nofile"
)

func TestMain(m *testing.M) {
	if os.Getenv("NOFILE_TELL") != "" {
		fmt.Println(nofile.Soft())
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// `ulimit -n 77; mosrun PROGRAM` must run PROGRAM with 77 and not with the hard limit.
func TestSoft(t *testing.T) {
	cmd := exec.Command("sh", "-c", "ulimit -Sn 77; exec \"$0\"", os.Args[0])
	cmd.Env = append(os.Environ(), "NOFILE_TELL=1")
	out, err := cmd.Output()
	if got := strings.TrimSpace(string(out)); err != nil || got != "77 true" {
		t.Errorf("started with 77: %q, %v; want \"77 true\"", got, err)
	}
}
