package cli

import (
	"context"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"mosimg/pxe/bootbench"
)

// newBenchTFTPCmd is `mosimg bench tftp`.
func newBenchTFTPCmd(env *Env) *cobra.Command {
	return newBenchServingCmd(env, bootbench.Config{Kind: bootbench.TFTP, KiB: 2048}, &cobra.Command{
		Use:   "tftp",
		Short: "MB/s of boot loaders: our TFTP server beside dnsmasq and tftpd-hpa",
		Long: `Tftp fetches a file from our TFTP server, dnsmasq and tftpd-hpa by turns, with the
same client, blocks of 1468 bytes and the same windows asked for: 1, 4 as EDK2
does, 64. The row says which window the peer grants. "Best" is the best of all
windows on each side. With --link 1ms packets take half a millisecond in each
direction and share 1 Gbit/s, by a relay in this program. It needs root, for a
network namespace, and the peers' programs (Debian: dnsmasq-base, tftpd-hpa).`,
	})
}

// newBenchHTTPCmd is `mosimg bench http`.
func newBenchHTTPCmd(env *Env) *cobra.Command {
	return newBenchServingCmd(env, bootbench.Config{Kind: bootbench.HTTP, KiB: 64 << 10}, &cobra.Command{
		Use:   "http",
		Short: "MB/s and CPU of images: our HTTP server beside nginx with sendfile",
		Long: `Http fetches a file from our HTTP server and from nginx with sendfile by turns, with
1 and with 8 clients at a time: MB/s of all clients together, and the CPU
seconds of the server for a GB. Clients throw the bytes away in the kernel. With
--link 1ms bytes come half a millisecond later in each direction, by a relay in
this program. It needs root, for a network namespace, and nginx.`,
	})
}

func newBenchServingCmd(env *Env, conf bootbench.Config, c *cobra.Command) *cobra.Command {
	var links []string
	var asJSON bool
	c.Args = usageArgs(cobra.NoArgs)
	c.RunE = func(c *cobra.Command, _ []string) error {
		for _, l := range links {
			d, err := parseLink(conf.Kind, l)
			if err != nil {
				return err
			}
			conf.Links = append(conf.Links, d)
		}
		var table servingTable
		err := bootbench.Run(c.Context(), conf, env.Stderr, func(s bootbench.Sample) {
			table.add(s)
			fmt.Fprintf(env.Stderr, "%s: %.2f %s, %s %.2f\n", s.Name, s.Ours, s.Unit, s.Peer, s.That)
		})
		if err != nil {
			return err
		}
		return printBench(env, table, asJSON)
	}
	f := c.Flags()
	f.StringSliceVar(&links, "link", []string{"none", "1ms"}, "round-trip times of the link: none, or a time")
	f.IntVar(&conf.Runs, "runs", 3, "rounds for each link")
	f.IntVar(&conf.KiB, "kib", conf.KiB, "size of the file, in KiB")
	f.BoolVar(&asJSON, "json", false, "print the rows as JSON")
	return c
}

// servingTable has a row for each figure and peer, in the order of the first samples.
type servingTable []*pairs

func (t *servingTable) add(s bootbench.Sample) {
	i := slices.IndexFunc(*t, func(p *pairs) bool { return p.name == s.Name && p.peerName == s.Peer })
	if i < 0 {
		i = len(*t)
		*t = append(*t, &pairs{name: s.Name, unit: s.Unit, peerName: s.Peer})
	}
	(*t)[i].add(s.Ours, s.That)
}

// The processes of bench tftp and bench http: the one that measures, and our
// server.

func newServingInsideCmd(env *Env) *cobra.Command {
	return hidden(bootbench.Verb, func(ctx context.Context, config string) error {
		return bootbench.Main(ctx, config, env.Stdout)
	})
}

func newServingServerCmd(*Env) *cobra.Command {
	return hidden(bootbench.ServerVerb, bootbench.ServerMain)
}
