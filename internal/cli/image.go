package cli

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/pxe"
)

// newImageCmd is `mosimg image`: what a head serves, and what it served before.
func newImageCmd(env *Env) *cobra.Command {
	var store string
	c := &cobra.Command{
		Use:   "image",
		Short: "Publish image sets to a head's store, list them, roll back",
		Long: `Image looks after an image store, from which a running head serves the current set
of each architecture. A change takes effect with the next boot of each machine;
machines that are downloading finish with what they began with, and
"mosimg node ls" shows which ones a reboot would change.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.PersistentFlags().StringVar(&store, "images", pxe.DefaultImages, "image store")
	c.AddCommand(newImagePublishCmd(env, &store), newImageLsCmd(env, &store), newImageRollbackCmd(env, &store))
	return c
}

func newImagePublishCmd(env *Env, store *string) *cobra.Command {
	keep := 5
	c := &cobra.Command{
		Use:   "publish DIR",
		Short: "Copy the image set in DIR into the store and serve it from now on",
		Args:  usageArgs(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			if keep < 1 {
				return fault.New(fault.Usage, "publish image set", args[0], fmt.Sprintf("--keep %d", keep), "want a number from 1")
			}
			set, err := imageset.Store{Dir: *store}.Publish(args[0], keep)
			if err != nil {
				return err
			}
			fmt.Fprintf(env.Stdout, "%s is served for %s\n", short(set.Manifest.ID), set.Manifest.Arch)
			return nil
		},
	}
	c.Flags().IntVar(&keep, "keep", keep, "how many sets of its architecture the store keeps, with this one")
	return c
}

func newImageRollbackCmd(env *Env, store *string) *cobra.Command {
	var arch string
	c := &cobra.Command{
		Use:   "rollback [ID]",
		Short: "Serve the set that was served before, or the one whose id begins with ID",
		Args:  usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			want := ""
			if len(args) > 0 {
				if want = args[0]; want == "" {
					return fault.New(fault.Usage, "roll back", "", "the id is empty", "see: mosimg image ls")
				}
			}
			set, err := imageset.Store{Dir: *store}.Rollback(arch, want)
			if err != nil {
				return err
			}
			fmt.Fprintf(env.Stdout, "%s is served for %s\n", short(set.Manifest.ID), set.Manifest.Arch)
			return nil
		},
	}
	c.Flags().StringVar(&arch, "arch", "", "architecture, when no ID is given and the store has several")
	return c
}

// imageRow is one set of a store.
type imageRow struct {
	ID      string             `json:"id"`
	Arch    string             `json:"arch"`
	Current bool               `json:"current"`
	Profile string             `json:"profile"`
	Kernel  string             `json:"kernel_release"`
	Served  []imageset.Serving `json:"served"` // when it became the current one
}

func newImageLsCmd(env *Env, store *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "ls",
		Short: "List the sets of the store, those that were served last first",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			rows, err := imageRows(imageset.Store{Dir: *store})
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(env.Stdout, rows)
			}
			t := tabwriter.NewWriter(env.Stdout, 0, 8, 2, ' ', 0)
			fmt.Fprintln(t, "ID\tARCH\tSERVED\tSINCE\tPROFILE\tKERNEL")
			for _, r := range rows {
				served, since := "-", "-"
				if r.Current {
					served = "now"
				} else if len(r.Served) > 0 {
					served = "before"
				}
				if n := len(r.Served); n > 0 {
					since = r.Served[n-1].Since.Local().Format(time.DateTime)
				}
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", short(r.ID), r.Arch, served, since, dash(r.Profile), dash(r.Kernel))
			}
			return t.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func imageRows(store imageset.Store) ([]imageRow, error) {
	sets, err := store.List()
	if err != nil {
		return nil, err
	}
	rows := []imageRow{}
	for _, set := range sets {
		m := set.Manifest
		r := imageRow{ID: m.ID, Arch: m.Arch, Current: store.Current(m.Arch) == m.ID, Profile: m.Profile, Kernel: m.KernelRelease, Served: []imageset.Serving{}}
		past, err := store.History(m.Arch)
		if err != nil {
			return nil, err
		}
		for _, x := range past {
			if x.ID == m.ID {
				r.Served = append(r.Served, x)
			}
		}
		rows = append(rows, r)
	}
	return rows, nil
}
