package cli

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"mosimg/initramfs/archive"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
)

// criuInImage is where an image has CRIU: package agent/criu looks there too.
const criuInImage = "usr/lib/mosimg/criu"

func newCRIUCmd(env *Env) *cobra.Command {
	var images, out string
	cmd := &cobra.Command{
		Use:   "criu",
		Short: "Unpack the CRIU of an image set for a machine that was not booted from it",
		Long: `criu takes CRIU with its libraries out of an image set. A head on an ordinary
Debian needs it: jobs move only between machines with the same CRIU, and the
agent looks for it at /` + criuInImage + ` or where --criu says.`,
		Example: `  mosimg criu --images out --output /` + criuInImage,
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			set, err := imageset.Open(images)
			if err != nil {
				return err
			}
			if _, err := os.Lstat(out); err == nil {
				return fault.New(fault.Refused, "unpack CRIU into", out, "it is there already", "remove it first")
			}
			n, err := unpackCRIU(set, out)
			if err != nil {
				return fault.New(fault.Environment, "unpack CRIU into", out, err, "")
			}
			fmt.Fprintf(env.Stdout, "%s: CRIU %s, %d files\n", out, set.Manifest.CRIUVersion, n)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&images, "images", "out", "image set `DIR`")
	f.StringVarP(&out, "output", "o", "/"+criuInImage, "`DIR` to make")
	return cmd
}

// unpackCRIU makes the folder beside its place and renames it, so that it is
// whole or not there.
func unpackCRIU(set *imageset.Set, out string) (files int, err error) {
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return 0, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(out), ".criu-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(tmp)
	in, err := os.Open(set.Path("initramfs"))
	if err != nil {
		return 0, err
	}
	defer in.Close()
	if files, err = archive.Unpack(in, criuInImage, tmp); err != nil {
		return 0, err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return 0, err
	}
	return files, os.Rename(tmp, out)
}
