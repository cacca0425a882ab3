package cli

import (
	"fmt"
	"io"
	"log/slog"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"mosimg/internal/api"
	"mosimg/pxe"
)

// newHeadCmd is `mosimg head`: serve the boot and keep the registry.
func newHeadCmd(env *Env) *cobra.Command {
	var cfg pxe.Config
	var dhcp string
	var verbose, asJSON bool
	c := &cobra.Command{
		Use:   "head",
		Short: "Serve images to booting machines and keep the registry of nodes",
		Long: `Head gives machines on a wired network their address (DHCP), boot loader (TFTP),
kernel and initramfs (HTTP), lets them into the cluster when they are approved,
and keeps the cluster's certificate authority and registry.

It serves the wired interfaces with a static address. One that got its own
address by DHCP, or that leads to other networks, is left alone unless it is
named with --interface.

It looks for other DHCP servers on each network. Where there is none it gives out
addresses; beside another one it only adds what to boot (proxy mode), and an
unknown machine goes on to its own disk unless an adoption window is open. When
another server appears later it steps down and says so. It runs until it gets
INT or TERM.`,
		Example: `  mosimg head --images out --interface eth1 --adopt 30m
  mosimg head --config /etc/mosimg/cluster.yaml`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			cfg.DHCP = pxe.DHCPMode(dhcp)
			cfg.Log = newLog(env.Stderr, asJSON, verbose)
			cfg.Started = func(i pxe.Info) { started(env.Stderr, cfg.Log, i, asJSON) }
			h, err := pxe.New(cfg)
			if err != nil {
				return err
			}
			return h.Run(c.Context())
		},
	}
	f := c.Flags()
	f.StringSliceVar(&cfg.Interfaces, "interface", nil, "serve this interface, by name or MAC (repeat for several)")
	f.StringVar(&cfg.Images, "images", pxe.DefaultImages, "image store, or the folder of one image set")
	f.StringVar(&cfg.ConfigFile, "config", "", "cluster.yaml")
	f.StringVar(&dhcp, "dhcp", string(pxe.DHCPAuto), "who gives out addresses: auto (this head unless another server does), server (this head), proxy (another server), off (no DHCP here at all)")
	f.DurationVar(&cfg.Adopt, "adopt", 0, "approve all machines that enrol in this time from now, for example 30m")
	f.StringVar(&cfg.State, "state", pxe.DefaultState, "folder of the registry, leases and keys")
	f.StringVar(&cfg.Run, "run", api.RunDir, "folder of the admin socket and the local ticket")
	f.IntVar(&cfg.HTTPPort, "http-port", 80, "port of the boot files")
	f.IntVar(&cfg.TFTPPort, "tftp-port", 69, "port of the boot loaders")
	f.StringVar(&cfg.TFTPPorts, "tftp-ports", "", "send boot loaders from these ports, for firewalls: a range such as 40000-40255, or single (that of --tftp-port)")
	f.IntVar(&cfg.APIPort, "api-port", api.HeadPort, "port of the head API")
	f.IntVar(&cfg.DHCPPort, "dhcp-port", 67, "port of DHCP, for tests")
	f.BoolVar(&verbose, "verbose", false, "log details")
	f.BoolVar(&asJSON, "json", false, "log in JSON, one object a line")
	if err := f.MarkHidden("dhcp-port"); err != nil {
		panic(err) // the flag is defined above
	}
	return c
}

// newLog is a log for people or for programs.
func newLog(w io.Writer, asJSON, verbose bool) *slog.Logger {
	opt := &slog.HandlerOptions{Level: slog.LevelInfo}
	if verbose {
		opt.Level = slog.LevelDebug
	}
	if asJSON {
		return slog.New(slog.NewJSONHandler(w, opt))
	}
	return slog.New(slog.NewTextHandler(w, opt))
}

// started says what is being served and where.
func started(w io.Writer, log *slog.Logger, i pxe.Info, asJSON bool) {
	if asJSON {
		log.Info("head is up", "cluster", i.Cluster, "ca", i.CA, "networks", i.Networks, "images", i.Images, "http", i.HTTP, "api", i.API, "dhcp", string(i.DHCP))
		return
	}
	fmt.Fprintf(w, "head of cluster %q is up\n", i.Cluster)
	for _, n := range i.Networks {
		fmt.Fprintf(w, "  network  %s\n", n)
	}
	var archs []string
	for a := range i.Images {
		archs = append(archs, a)
	}
	sort.Strings(archs)
	for _, a := range archs {
		fmt.Fprintf(w, "  image    %s %.12s\n", a, i.Images[a])
	}
	fmt.Fprintf(w, "  boot     %s\n  api      %s\n  ca       %s\n", i.HTTP, i.API, i.CA)
	if i.DHCP == pxe.DHCPOff {
		host := strings.TrimPrefix(i.HTTP, "http://")
		if j := strings.IndexByte(host, ':'); j >= 0 {
			host = host[:j]
		}
		fmt.Fprintf(w, "  dhcp     off: the other server must name next-server %s and, by client architecture,\n"+
			"           undionly.kpxe (BIOS) or snponly.efi (UEFI), and %s/ipxe/MAC for iPXE\n", host, i.HTTP)
	}
}

// age is a time span as people say it: 5s, 3m, 2h, 4d.
func age(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
