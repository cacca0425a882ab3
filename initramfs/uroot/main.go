// Command uroot makes the archive of a node's utilities: u-root's commands in
// busybox mode, one binary with a link for each command.
//
//	uroot -o ARCHIVE -tmp DIR -arch GOARCH COMMAND...
//
// It is a program of its own, in a module of its own, for three reasons:
// u-root's many dependencies stay out of mosimg's, its versions are pinned by
// this folder's go.mod, and mkuimage takes no context, but a process can be
// killed. The builder runs it with GOAMD64 and the like in the environment.
package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"

	"github.com/u-root/gobusybox/src/pkg/golang"
	"github.com/u-root/mkuimage/cpio"
	"github.com/u-root/mkuimage/uimage"
	"github.com/u-root/uio/llog"
)

func main() {
	out := flag.String("o", "", "archive to write")
	tmp := flag.String("tmp", "", "empty folder for unfinished work")
	arch := flag.String("arch", "", "GOARCH of the commands")
	flag.Parse()
	if err := run(*out, *tmp, *arch, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(out, tmp, arch string, commands []string) error {
	if out == "" || tmp == "" || arch == "" || len(commands) == 0 {
		return errors.New("-o, -tmp, -arch and at least one command are needed")
	}
	packages := make([]string, len(commands))
	for i, c := range commands {
		packages[i] = "github.com/u-root/u-root/cmds/core/" + c
	}
	log := llog.New(slog.LevelInfo, func(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) })
	return uimage.Create(log,
		uimage.WithEnv(golang.DisableCGO(), golang.WithGOARCH(arch), golang.WithGOOS("linux")),
		uimage.WithBusyboxCommands(packages...),
		// gobusybox always passes -a, which rebuilds the standard library
		// each time. The last flag wins: same bytes, six times faster.
		uimage.WithBusyboxBuildOpts(&golang.BuildOpts{ExtraArgs: []string{"-a=false"}}),
		uimage.WithBaseArchive(cpio.InMemArchive()),
		uimage.WithTempDir(tmp),
		uimage.WithCPIOOutput(out),
	)
}
