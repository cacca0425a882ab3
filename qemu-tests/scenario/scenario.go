// Package scenario holds what the lab plays through: each scenario is a
// function with a name, used by `mosimg lab run NAME` and by this package's
// tests alike. All of them work on the same machines, so that they can share
// one lab, and each brings the machines that it needs into the state it
// needs: they may run alone and in any order.
package scenario

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/qemu-tests/lab"
	"mosimg/qemu-tests/vm"
)

// Scenario is one thing that has to work.
type Scenario struct {
	Name string
	Doc  string // one line
	Run  func(ctx context.Context, r *Run) error
}

// all is the registry, in the order that saves most boots when one lab plays
// them all. The demo wants strangers, so it is first.
var all = []Scenario{
	{"demo", "the tour of make demo", demo},
	{"bios-join", "a BIOS machine boots by PXE and becomes a member", biosJoin},
	{"uefi-join", "a UEFI machine boots by PXE and becomes a member", uefiJoin},
	{"revoked", "a member that is thrown out disappears and is not heard any more", revoked},
	{"unapproved", "an unknown machine stays pending, a denied one stays out, an approved one joins", unapproved},
	{"counter", "a threaded program with a file and a pipe is moved ten times and loses no number", counter},
	{"come-back", "a member that loses power is dead within seconds and comes back with its number", comeBack},
	{"no-image-leak", "no key, hash or nonce of the head is in the image set", noImageLeak},
	{"head-restart", "the head is killed, then loses power, while nodes are up: nothing is forgotten", headRestart},
}

// All are the scenarios, in the order in which they are best run.
func All() []Scenario { return slices.Clone(all) }

// Find is the scenario of that name.
func Find(name string) (Scenario, error) {
	var names []string
	for _, s := range all {
		if s.Name == name {
			return s, nil
		}
		names = append(names, s.Name)
	}
	return Scenario{}, fault.New(fault.Usage, "find scenario", name, "there is none of that name", "there are "+strings.Join(names, ", "))
}

// The lab's machines, as every scenario knows them.
const (
	bios   = "n1"
	uefi   = "n2"
	fourth = "n3" // the one that nobody approved
)

// Machines are the nodes that scenarios need.
func Machines() []lab.NodeConfig {
	return []lab.NodeConfig{
		{Name: bios, Firmware: vm.BIOS},
		{Name: uefi, Firmware: vm.UEFI},
		{Name: fourth, Firmware: vm.BIOS},
	}
}

// adoption is how long an adoption window stays open: longer than any boot.
const adoption = 10 * time.Minute

// Run is one scenario being played in a lab.
type Run struct {
	Lab   *lab.Lab
	Out   io.Writer // what a user is to see of the cluster
	Steps []Step
}

// Step is one line of the table at the end.
type Step struct {
	Name    string  `json:"step"`
	Seconds float64 `json:"seconds"`
	OK      bool    `json:"ok"`
	Comment string  `json:"comment,omitempty"`
}

// Play runs one scenario.
func (r *Run) Play(ctx context.Context, s Scenario) error {
	r.Lab.Say("scenario %s: %s", s.Name, s.Doc)
	if err := s.Run(ctx, r); err != nil {
		return fmt.Errorf("scenario %s: %w", s.Name, err)
	}
	return nil
}

// step runs and times one step; the comment goes into the table.
func (r *Run) step(name string, f func() (comment string, err error)) error {
	start := time.Now()
	comment, err := f()
	r.Steps = append(r.Steps, Step{Name: name, Seconds: time.Since(start).Seconds(), OK: err == nil, Comment: comment})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	r.Lab.Say("done: %s", name)
	return nil
}

// Table is the steps as a table: step, seconds, ok.
func (r *Run) Table(w io.Writer) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "STEP\tSECONDS\tOK\t")
	for _, s := range r.Steps {
		ok := "yes"
		if !s.OK {
			ok = "NO"
		}
		fmt.Fprintf(t, "%s\t%.1f\t%s\t%s\n", s.Name, s.Seconds, ok, s.Comment)
	}
	t.Flush()
}

// JSON writes the steps and how it all ended.
func (r *Run) JSON(w io.Writer, err error) error {
	result := struct {
		OK    bool   `json:"ok"`
		Error string `json:"error,omitempty"`
		KVM   bool   `json:"kvm"`
		Steps []Step `json:"steps"`
	}{err == nil, "", r.Lab.KVM(), r.Steps}
	if err != nil {
		result.Error = err.Error()
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(result)
}

// head makes sure that the head is up.
func (r *Run) head(ctx context.Context) error {
	if r.Lab.Head().VM() != nil {
		return nil
	}
	return r.step("head boots and joins its own cluster", func() (string, error) { return "", r.Lab.StartHead(ctx) })
}

// view is the cluster now.
func (r *Run) view(ctx context.Context) (lab.View, error) {
	var v lab.View
	err := r.Lab.Until(ctx, "the head answers", func(now lab.View) (string, error) {
		v = now
		return "", nil
	})
	return v, err
}

// member makes sure that a machine is a living member, and returns its record.
func (r *Run) member(ctx context.Context, name string) (api.NodeRecord, error) {
	if err := r.head(ctx); err != nil {
		return api.NodeRecord{}, err
	}
	m := r.Lab.Machine(name)
	v, err := r.view(ctx)
	if err != nil {
		return api.NodeRecord{}, err
	}
	if rec, ok := v.Alive(m); ok && m.VM() != nil {
		return rec, nil
	}
	switch rec, known := v.Record(m); {
	case !known:
		if err := r.Lab.Adopt(ctx, 1, adoption); err != nil {
			return rec, err
		}
	case rec.State != api.Approved:
		if err := r.Lab.Approve(ctx, m); err != nil {
			return rec, err
		}
	}
	var rec api.NodeRecord
	if m.VM() != nil {
		return r.Lab.AwaitMember(ctx, m)
	}
	err = r.step(fmt.Sprintf("%s (%s) boots by PXE and joins", name, m.Firmware()), func() (string, error) {
		if err := m.PowerOn(ctx); err != nil {
			return "", err
		}
		var err error
		rec, err = r.Lab.AwaitMember(ctx, m)
		return fmt.Sprintf("node %d, %.0f s after power on", rec.Node, m.Joined().Seconds()), err
	})
	return rec, err
}

// show prints the real output of a command of the head's operator.
func (r *Run) show(ctx context.Context, argv ...string) error {
	b, err := r.Lab.Output(ctx, argv...)
	if err != nil {
		return err
	}
	fmt.Fprintf(r.Out, "head# %s\n%s\n", strings.Join(argv, " "), b)
	return nil
}
