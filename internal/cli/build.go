package cli

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mosimg/image"
	"mosimg/image/profile"
	"mosimg/image/steps"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
)

func newBuildCmd(env *Env) *cobra.Command {
	var o image.Options
	var name, ca string
	var explain, asJSON bool
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Build a bootable image set",
		Long: `build makes an image set: kernel, initramfs, boot loaders, head archive and a
manifest of what is in them. The payload comes from a signed Debian archive, by
the mirror that this machine's apt uses; the node's programs are built from the
checkout around the current folder. Root is not needed.

--outputs adds what machines boot that do not boot from the network: uki, one
EFI program; disk, for USB sticks and disks (BIOS and UEFI); iso, for CDs and
USB sticks (BIOS and UEFI); qcow2, the disk for virtual machines. Such a
machine knows its head by --head and --ca; without them it boots and says so.

The old output folder stays as it is until the new set is complete.`,
		Example: `  mosimg build
  mosimg build -o /srv/images/new --mirror file:///srv/debian
  mosimg build --profile lab.yaml --explain
  mosimg build --outputs disk,iso --head https://10.77.0.1:4660 --ca ca.pem`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			var err error
			if o.Profile, err = profile.Load(name); err != nil {
				return err
			}
			if o.CA, err = pinOf(ca); err != nil {
				return err
			}
			o.Report = stepReporter(env.Stderr, explain)
			o.Log = slog.New(slog.NewTextHandler(env.Stderr, &slog.HandlerOptions{ReplaceAttr: withoutTime}))
			s, err := image.Build(c.Context(), o)
			if err != nil {
				if c.Context().Err() != nil {
					return errors.New("build: interrupted; the output folder is as it was")
				}
				return err
			}
			if asJSON {
				return printJSON(env.Stdout, s)
			}
			fmt.Fprintf(env.Stdout, "%s %s\n", s.Dir, s.ID)
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&name, "profile", profile.Default, "built-in profile ("+strings.Join(profile.Names(), ", ")+") or a .yaml `FILE`")
	f.StringVar(&o.Arch, "arch", "", "architecture: amd64 or 386 (default: the profile's)")
	f.StringVarP(&o.Out, "output", "o", "out", "`DIR` for the image set")
	f.StringSliceVar(&o.Outputs, "outputs", image.Outputs[:1], "kinds of output: "+strings.Join(image.Outputs, ", "))
	f.StringVar(&o.Head, "head", "", "`URL` of the head that machines booted from disk, iso or uki enrol at: https://ADDRESS:PORT")
	f.StringVar(&ca, "ca", "", "CA of that head: its certificate's `FILE`, or sha256:HEX")
	f.StringVar(&o.Mirror, "mirror", "", "`URL` of a Debian archive: http, https or file (default: those of this machine's apt)")
	f.StringVar(&o.Keyring, "keyring", "", "OpenPGP keys that may sign the archive (default: debian-archive-keyring's)")
	f.StringVar(&o.Cache, "cache", "", "`DIR` for downloads and results of steps (default: ~/.cache/mosimg)")
	f.StringVar(&o.Source, "source", "", "`DIR` of the mosimg checkout (default: around the current folder)")
	f.BoolVar(&explain, "explain", false, "say for each step whether it was reused, or which input changed")
	f.BoolVar(&asJSON, "json", false, "print the manifest and the steps' seconds as JSON")
	return cmd
}

// pinOf is the pin of a CA that is named by its pin or by a PEM file.
func pinOf(ca string) (string, error) {
	if ca == "" || strings.HasPrefix(ca, "sha256:") {
		return ca, nil
	}
	bad := func(cause any) error {
		return fault.New(fault.Usage, "read CA", ca, cause, "give --ca the file of the CA's certificate, or sha256:HEX")
	}
	data, err := os.ReadFile(ca)
	if err != nil {
		return "", bad(err)
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return "", bad("it is no certificate in PEM form")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	switch {
	case err != nil:
		return "", bad(err)
	case !cert.IsCA:
		return "", bad("its certificate is not a CA's")
	}
	return identity.Pin(cert), nil
}

// maxReasons is how many changed inputs of a step --explain lists.
const maxReasons = 8

// stepReporter writes a line for each step as it ends, and more when asked.
func stepReporter(w io.Writer, explain bool) func(steps.Event) {
	return func(e steps.Event) {
		switch e.Kind {
		case steps.Progress:
			fmt.Fprintf(w, "%-16s %s\n", e.Step, e.Text)
		case steps.Started:
			switch {
			case len(e.Why) == 0:
			case !explain:
				fmt.Fprintf(w, "%-16s ...\n", e.Step)
			default:
				fmt.Fprintf(w, "%-16s to be built, because:\n", e.Step)
				for i, why := range e.Why {
					if i == maxReasons {
						fmt.Fprintf(w, "%-16s   and %d more\n", "", len(e.Why)-i)
						break
					}
					fmt.Fprintf(w, "%-16s   %s\n", "", why)
				}
			}
		case steps.Done:
			if e.Reused {
				fmt.Fprintf(w, "%-16s reused\n", e.Step)
			} else {
				fmt.Fprintf(w, "%-16s %.1f s\n", e.Step, e.Took.Round(100*time.Millisecond).Seconds())
			}
		}
	}
}

func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey && len(groups) == 0 {
		return slog.Attr{}
	}
	return a
}
