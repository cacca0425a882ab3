package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"mosimg/internal/unixhttp"
)

// victimEnv makes this test program an agent that can be killed: one that
// ends in the same process always says goodbye.
const victimEnv = "MOSIMG_TEST_VICTIM"

func TestMain(m *testing.M) {
	text := os.Getenv(victimEnv)
	if text == "" {
		os.Exit(m.Run())
	}
	var cfg Config
	if err := json.Unmarshal([]byte(text), &cfg); err != nil {
		panic(err)
	}
	cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := Run(context.Background(), cfg); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

type victim struct {
	*node
	cmd *exec.Cmd
}

func startVictim(t *testing.T, n *node) *victim {
	t.Helper()
	cfg := n.cfg
	cfg.Log, cfg.setClock = nil, nil
	text, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), victimEnv+"="+string(text))
	cmd.Stderr = t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.client = unixhttp.New(n.cfg.Socket, "agent")
	v := &victim{n, cmd}
	t.Cleanup(v.kill)
	return v
}

func (v *victim) kill() {
	v.cmd.Process.Kill()
	v.cmd.Wait()
}
