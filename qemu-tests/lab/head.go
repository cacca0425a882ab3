package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/labport"
)

// The head's tools, where the head archive puts them.
const (
	mosimgPath = "/usr/bin/mosimg"
	mosmonPath = "/usr/bin/mosmon"
)

// Exec runs a command on the head.
func (l *Lab) Exec(ctx context.Context, c labport.Cmd) (labport.Exit, error) {
	return l.port.Run(ctx, c)
}

// Output runs a command on the head as root and returns its standard output.
// A status other than 0 is an error that carries standard error.
func (l *Lab) Output(ctx context.Context, argv ...string) ([]byte, error) {
	var out, errOut bytes.Buffer
	exit, err := l.Exec(ctx, labport.Cmd{Argv: argv, Stdout: &out, Stderr: &errOut})
	if err != nil {
		return nil, err
	}
	if exit.Status != 0 {
		return out.Bytes(), fault.New(fault.Kind(exit.Status), "run on the head", strings.Join(argv, " "),
			fmt.Sprintf("%v: %s", exit, strings.TrimSpace(errOut.String())), "")
	}
	return out.Bytes(), nil
}

func (l *Lab) outputJSON(ctx context.Context, v any, argv ...string) error {
	b, err := l.Output(ctx, argv...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s on the head printed no JSON: %w: %.200q", strings.Join(argv, " "), err, b)
	}
	return nil
}

// NodeList is the head's registry.
func (l *Lab) NodeList(ctx context.Context) (nodes []api.NodeRecord, err error) {
	return nodes, l.outputJSON(ctx, &nodes, mosimgPath, "node", "ls", "--json")
}

// Members is the cluster as the head's agent sees it.
func (l *Lab) Members(ctx context.Context) (t api.MemberTable, err error) {
	return t, l.outputJSON(ctx, &t, mosmonPath, "--once", "--json")
}

// Adopt opens an adoption window for the next n machines.
func (l *Lab) Adopt(ctx context.Context, n int, d time.Duration) error {
	_, err := l.Output(ctx, mosimgPath, "node", "approve", "--next", strconv.Itoa(n), "--for", d.String())
	return err
}

// Approve lets one machine in.
func (l *Lab) Approve(ctx context.Context, m *Machine) error {
	_, err := l.Output(ctx, mosimgPath, "node", "approve", m.MAC())
	return err
}

// Deny keeps one machine out, or throws it out.
func (l *Lab) Deny(ctx context.Context, m *Machine) error {
	_, err := l.Output(ctx, mosimgPath, "node", "deny", m.MAC())
	return err
}

// StartHead switches the head on and waits until its own agent is a member.
func (l *Lab) StartHead(ctx context.Context) error {
	head := l.Head()
	if err := head.PowerOn(ctx); err != nil {
		return err
	}
	defer head.settled()
	const what = "bring up"
	ctx, cancel := context.WithTimeoutCause(ctx, l.limits.head, fmt.Errorf("not ready after %.0f s", l.limits.head.Seconds()))
	defer cancel()
	ctx, stop := head.failFast(ctx)
	defer stop()
	if err := l.port.Ready(ctx); err != nil {
		return head.explain(what, err)
	}
	l.Say("head: its kernel and agent run")
	err := l.Until(ctx, "the head is a member of its own cluster", func(v View) (string, error) { return alive(v, head), nil })
	if err != nil {
		return head.explain(what, err)
	}
	l.Say("head: up, %.0f s after power on", head.Since().Seconds())
	return nil
}

// Processes are the numbers of the head's processes whose program has this
// name and whose first argument is arg.
func (l *Lab) Processes(ctx context.Context, name, arg string) ([]int, error) {
	// /proc is read in one go: the image has no pgrep.
	b, err := l.Output(ctx, "sh", "-c", `for d in /proc/[0-9]*; do echo "${d#/proc/} $(tr '\0' '\n' <$d/cmdline 2>/dev/null | head -2 | tr '\n' ' ')"; done`)
	if err != nil {
		return nil, err
	}
	var pids []int
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 3 || path.Base(f[1]) != name || f[2] != arg {
			continue
		}
		if pid, err := strconv.Atoi(f[0]); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// RunOnHead runs a command on the head of the lab in dir, which another
// process holds.
func RunOnHead(ctx context.Context, dir string, c labport.Cmd) (labport.Exit, error) {
	s, err := ReadState(dir)
	if err != nil {
		return labport.Exit{}, err
	}
	if !s.Process.Alive() {
		return labport.Exit{}, fault.New(fault.Unavailable, "run on the head of", dir, "this lab is not running", "start one with: mosimg lab up")
	}
	port := labport.Dial(s.ExecSocket(), nil)
	defer port.Close()
	ready, cancel := context.WithTimeout(ctx, queryTime)
	defer cancel()
	if err := port.Ready(ready); err != nil {
		return labport.Exit{}, err
	}
	return port.Run(ctx, c)
}

// AskHead is the registry of a lab that another process holds.
func AskHead(ctx context.Context, s *State) (nodes []api.NodeRecord, err error) {
	port := labport.Dial(s.ExecSocket(), nil)
	defer port.Close()
	remote := &Lab{port: port}
	return remote.NodeList(ctx)
}
