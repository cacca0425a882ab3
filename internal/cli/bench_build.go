package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mosimg/image"
	"mosimg/image/cache"
	"mosimg/image/profile"
	"mosimg/internal/fault"
)

// newBenchBuildCmd is `mosimg bench build`: our builder beside the u-root
// command with the same commands.
func newBenchBuildCmd(env *Env) *cobra.Command {
	var o image.Options
	var uroot string
	var runs int
	var asJSON bool
	c := &cobra.Command{
		Use:   "build",
		Short: "Seconds to build an image set, beside the u-root command",
		Long: `Build makes the image set three times in each run: with an empty cache of steps
(Debian packages and Go's build cache are kept), again with nothing changed, and
again with one line of the agent changed. Beside each it runs the u-root command
with the same utilities and the agent, which has no cache of its own; it neither
fetches packages nor compresses.

Everything happens in temporary folders, on a copy of the checkout.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			if runs < 1 {
				return fault.New(fault.Usage, "read flags of", "mosimg bench build", "--runs must be 1 or more", "")
			}
			var err error
			if o.Profile, err = profile.Load(profile.Default); err != nil {
				return err
			}
			b := &buildBench{Options: o, uroot: uroot, stderr: env.Stderr}
			all, err := b.run(c.Context(), runs)
			if err != nil {
				return err
			}
			return printBench(env, all, asJSON)
		},
	}
	f := c.Flags()
	f.StringVar(&o.Source, "source", ".", "`DIR` of the mosimg checkout")
	f.StringVar(&o.Mirror, "mirror", "", "`URL` of a Debian archive (default: those of this machine's apt)")
	f.StringVar(&uroot, "u-root", "", "the u-root command (default: built from its released source)")
	f.IntVar(&runs, "runs", 3, "runs")
	f.BoolVar(&asJSON, "json", false, "print the rows as JSON")
	return c
}

// urootModule is the release that our utilities come from, too.
const urootModule = "github.com/u-root/u-root@v0.16.0"

type buildBench struct {
	image.Options
	uroot  string
	stderr io.Writer
	dir    string // temporary; holds everything below
}

func (b *buildBench) run(ctx context.Context, runs int) (_ []*pairs, err error) {
	b.dir, err = os.MkdirTemp("", "mosimg-bench-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(b.dir)
	checkout := filepath.Join(b.dir, "checkout")
	if err := copyCheckout(b.Source, checkout); err != nil {
		return nil, fault.New(fault.Environment, "copy checkout", b.Source, err, "name one with --source")
	}
	b.Source, b.Out = checkout, filepath.Join(b.dir, "out")
	if b.uroot == "" {
		fmt.Fprintln(b.stderr, "building the u-root command")
		if err := b.command(ctx, b.dir, []string{"GOBIN=" + b.dir}, "go", "install", urootModule); err != nil {
			return nil, err
		}
		b.uroot = filepath.Join(b.dir, "u-root")
	}
	// What is common to all runs is fetched and compiled before the clock
	// starts: packages, and Go's own cache.
	fmt.Fprintln(b.stderr, "warming up")
	if _, err := b.ours(ctx); err != nil {
		return nil, err
	}
	if _, err := b.peer(ctx); err != nil {
		return nil, err
	}
	const peer = "u-root command, same utilities and agent"
	cold := &pairs{name: "build-cold", unit: "s", peerName: peer}
	warm := &pairs{name: "build-unchanged", unit: "s", peerName: peer}
	agent := &pairs{name: "build-agent-changed", unit: "s", peerName: peer}
	for i := range runs {
		if b.Cache, err = b.freshCache(i); err != nil {
			return nil, err
		}
		for _, p := range []*pairs{cold, warm, agent} {
			if p == agent {
				line := fmt.Sprintf("package agent\n\n// benchRun makes this source differ from the last one.\nconst benchRun = %d\n\nvar _ = benchRun\n", time.Now().UnixNano())
				if err := os.WriteFile(filepath.Join(checkout, "agent", "bench_run.go"), []byte(line), 0o644); err != nil {
					return nil, err
				}
			}
			ours, err := b.ours(ctx)
			if err != nil {
				return nil, err
			}
			theirs, err := b.peer(ctx)
			if err != nil {
				return nil, err
			}
			fmt.Fprintf(b.stderr, "run %d %s: %.1f s, peer %.1f s\n", i+1, p.name, ours, theirs)
			p.add(ours, theirs)
		}
	}
	return []*pairs{cold, warm, agent}, nil
}

// ours is the seconds of one build.
func (b *buildBench) ours(ctx context.Context) (float64, error) {
	s, err := image.Build(ctx, b.Options)
	if err != nil {
		return 0, err
	}
	return s.Seconds, nil
}

// peer is the seconds of one run of the u-root command.
func (b *buildBench) peer(ctx context.Context) (float64, error) {
	start := time.Now()
	agent := filepath.Join(b.dir, "mosagent")
	err := b.command(ctx, b.Source, []string{"CGO_ENABLED=0", "GOAMD64=v1"}, "go", "build", "-trimpath", "-ldflags", "-s -w -buildid=", "-o", agent, "./cmd/mosagent")
	if err != nil {
		return 0, err
	}
	argv := []string{b.uroot, "-o", filepath.Join(b.dir, "peer.cpio"), "-files", agent + ":usr/bin/mosagent", "-initcmd", "", "-defaultsh", "", "-skip-ldd"}
	for _, u := range b.Profile.Utilities {
		argv = append(argv, "github.com/u-root/u-root/cmds/core/"+u)
	}
	err = b.command(ctx, filepath.Join(b.Source, "initramfs", "uroot"), []string{"CGO_ENABLED=0", "GOAMD64=v1"}, argv[0], argv[1:]...)
	return time.Since(start).Seconds(), err
}

func (b *buildBench) command(ctx context.Context, dir string, env []string, name string, args ...string) error {
	c := exec.CommandContext(ctx, name, args...)
	c.Dir, c.Env = dir, append(os.Environ(), env...)
	if out, err := c.CombinedOutput(); err != nil {
		return fault.New(fault.Environment, "run", strings.Join(c.Args, " "), fmt.Errorf("%w: %s", err, tail(out)), "")
	}
	return nil
}

// tail is the end of a program's output, for an error text.
func tail(out []byte) string {
	const most = 400
	if len(out) > most {
		out = out[len(out)-most:]
	}
	return strings.TrimSpace(string(out))
}

// freshCache is a cache with the packages of the user's and without results.
func (b *buildBench) freshCache(run int) (string, error) {
	from, err := cache.DefaultDir()
	if err != nil {
		return "", err
	}
	to := filepath.Join(b.dir, fmt.Sprintf("cache%d", run))
	for _, sub := range []string{"blobs", "index"} {
		if err := copyTree(filepath.Join(from, sub), filepath.Join(to, sub), nil); err != nil {
			return "", fault.New(fault.Environment, "copy package cache", from, err, "")
		}
	}
	return to, nil
}

// copyCheckout copies what a build reads of a checkout.
func copyCheckout(from, to string) error {
	if _, err := os.Stat(filepath.Join(from, "go.mod")); err != nil {
		return err
	}
	return copyTree(from, to, func(name string) bool { return name == ".git" || name == "out" || name == "bin" })
}

// copyTree copies folders and regular files; skip names entries of the top
// folder to leave out.
func copyTree(from, to string, skip func(name string) bool) error {
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		dst := filepath.Join(to, rel)
		switch {
		case skip != nil && skip(rel) && d.IsDir():
			return fs.SkipDir
		case d.IsDir():
			return os.MkdirAll(dst, 0o755)
		case !d.Type().IsRegular():
			return nil
		}
		return copyFile(path, dst)
	})
}

func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}
