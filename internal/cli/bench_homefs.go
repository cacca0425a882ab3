package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"mosimg/agent/homefiles/filebench"
	"mosimg/agent/homefiles/keeper"
	"mosimg/agent/homefiles/mounts"
	"mosimg/internal/fault"
)

// newBenchHomefsCmd is `mosimg bench homefs`.
func newBenchHomefsCmd(env *Env) *cobra.Command {
	var conf filebench.Config
	var links []string
	var asJSON, sshfs bool
	c := &cobra.Command{
		Use:   "homefs",
		Short: "Seconds that work on a guest's files takes: home files beside sshfs and beside the local disk",
		Long: `Homefs does the same work on home files, on sshfs and on the local disk by turns:
read a large file cold and warm, write and fsync one, unpack small files, git
clone and status, start an interpreter often. Home and node are this
machine. With --link 1ms all bytes come half a millisecond later in each
direction, by a relay in this program, for home files and sshfs alike. "Cold" is
a fresh mount: the home has the file in memory.

It needs root, and sshfs and sshd (Debian packages sshfs and openssh-server) unless
--sshfs=false leaves that peer out. All
runs in namespaces of its own, sshd too, and ends with the command. The defaults
take about half an hour, most of it for small files over 1 ms.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			for _, l := range links {
				d, err := parseLink("homefs", l)
				if err != nil {
					return err
				}
				conf.Links = append(conf.Links, d)
			}
			conf.NoSSHFS = !sshfs
			var table homefsTable
			err := filebench.Run(c.Context(), conf, env.Stderr, func(s filebench.Sample) {
				table.add(s)
				beside := ""
				if sshfs {
					beside = fmt.Sprintf("sshfs %.3f s, ", s.SSHFS)
				}
				fmt.Fprintf(env.Stderr, "run %d, %s: home files %.3f s, %sdisk %.3f s\n", s.Run, homefsName(s), s.Ours, beside, s.Disk)
			})
			if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() > 0 {
				return exitStatus(exit.ExitCode())
			}
			if err != nil {
				return err
			}
			return printBench(env, table, asJSON)
		},
	}
	f := c.Flags()
	f.StringVar(&conf.Dir, "dir", "/var/tmp", "folder on the disk to compare with")
	f.StringSliceVar(&links, "link", []string{"none", "1ms"}, "round-trip times of the link: none, or a time")
	f.IntVar(&conf.Runs, "runs", 3, "rounds for each link")
	f.IntVar(&conf.MiB, "mib", 256, "size of the file that is read and written, in MiB")
	f.IntVar(&conf.Files, "files", 5000, "small files to unpack; git has a tenth of it")
	f.IntVar(&conf.Starts, "starts", 50, "starts of the interpreter in a row")
	f.BoolVar(&sshfs, "sshfs", true, "measure sshfs, too; it needs a sshd")
	f.BoolVar(&asJSON, "json", false, "print the rows as JSON")
	return c
}

// parseLink reads a --link of `mosimg bench KIND`.
func parseLink(kind, s string) (time.Duration, error) {
	if s == "none" {
		return 0, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fault.New(fault.Usage, "read flags of", "mosimg bench "+kind, fmt.Sprintf("--link %q is neither none nor a time as 1ms", s), "")
	}
	return d, nil
}

// homefsTable has a row for each piece of work and peer, in the order of the first samples.
type homefsTable []*pairs

func homefsName(s filebench.Sample) string {
	link := "loopback"
	if s.Link > 0 {
		link = s.Link.String()
	}
	return "homefs-" + s.Work + "-" + link
}

func (t *homefsTable) add(s filebench.Sample) {
	for _, p := range []struct {
		name string
		took float64
	}{{"sshfs", s.SSHFS}, {"local disk", s.Disk}} {
		if p.took == 0 {
			continue // left out
		}
		i := slices.IndexFunc(*t, func(row *pairs) bool { return row.name == homefsName(s) && row.peerName == p.name })
		if i < 0 {
			i = len(*t)
			*t = append(*t, &pairs{name: homefsName(s), unit: "s", peerName: p.name})
		}
		(*t)[i].add(s.Ours, p.took)
	}
}

// The processes of bench homefs: the one that measures, and the two that agents
// have for home files.

func newHomefsInsideCmd(env *Env) *cobra.Command {
	return hidden(filebench.Verb, func(ctx context.Context, config string) error {
		return filebench.Main(ctx, config, env.Stdout)
	})
}

func newKeeperCmd(env *Env) *cobra.Command {
	return hidden(keeper.Verb, func(ctx context.Context, socket string) error {
		return keeper.Main(ctx, socket, slog.New(slog.NewTextHandler(env.Stderr, nil)))
	})
}

func newMountCmd(env *Env) *cobra.Command {
	return hidden(mounts.Verb, func(ctx context.Context, config string) error {
		return mounts.Main(ctx, config, slog.New(slog.NewTextHandler(env.Stderr, nil)))
	})
}

// hidden is a verb for this program's own processes, with one argument.
func hidden(verb string, run func(context.Context, string) error) *cobra.Command {
	return &cobra.Command{
		Use: verb, Hidden: true,
		Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error { return run(c.Context(), args[0]) },
	}
}
