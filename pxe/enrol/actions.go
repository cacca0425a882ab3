package enrol

import (
	"cmp"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/pxe/nodename"
	"mosimg/pxe/registry"
)

// List is every machine's record, by number.
func (s *Service) List() ([]api.NodeRecord, error) {
	out := []api.NodeRecord{}
	err := s.Store.View(func(tx *registry.Tx) error {
		for _, n := range tx.Nodes() {
			out = append(out, s.public(n))
		}
		return nil
	})
	return out, err
}

// public is a record as the API shows it.
func (s *Service) public(n *registry.Node) api.NodeRecord {
	r := n.NodeRecord
	if t := s.seen.last(n.MAC); t.After(r.LastSeen) {
		r.LastSeen = t
	}
	if s.Offered != nil {
		arch := ""
		if n.Inventory != nil {
			arch = n.Inventory.Arch
		}
		r.Offered = s.Offered(arch)
	}
	return r
}

// Act does what an operator asks for one machine.
func (s *Service) Act(a api.NodeAct) (api.NodeRecord, error) {
	var out api.NodeRecord
	err := s.Store.Update(func(tx *registry.Tx) error {
		n, err := find(tx, a.Node)
		if err != nil {
			return err
		}
		switch a.Action {
		case "approve":
			s.approve(tx, n)
			tx.PutNode(n)
		case "deny":
			err = deny(tx, n)
		case "rm":
			err = remove(tx, n)
		case "rename":
			err = rename(tx, n, a.Name)
		case "drain", "undrain":
			err = drain(tx, n, a.Action == "drain")
		default:
			err = fault.New(fault.Usage, "act on node", a.Node, fmt.Sprintf("unknown action %q", a.Action), "approve, deny, rm, rename, drain or undrain")
		}
		out = s.public(n)
		return err
	})
	if err == nil {
		s.log().Info("node", slog.String("action", a.Action), slog.Int("node", int(out.Node)), slog.String("name", out.Name), slog.String("mac", out.MAC), slog.String("state", string(out.State)))
	}
	return out, err
}

// Adopt opens or closes the adoption window.
func (s *Service) Adopt(a api.Adopt) error {
	const most = 30 * 24 * time.Hour
	if a.For < 0 || a.Next < 0 || a.For > most {
		return fault.New(fault.Usage, "open adoption window", "", fmt.Sprintf("for %v, next %d", a.For, a.Next), "a time from 0 (close) to 720h and a number of machines that is not negative")
	}
	err := s.Store.Update(func(tx *registry.Tx) error {
		tx.PutAdoption(registry.Adoption{From: tx.Now(), Until: tx.Now().Add(a.For), Limited: a.Next > 0, Left: a.Next})
		return nil
	})
	if err == nil {
		s.log().Info("adoption window", slog.Duration("for", a.For), slog.Int("next", a.Next))
	}
	return err
}

// find is the record that an operator means.
func find(tx *registry.Tx, what string) (*registry.Node, error) {
	nodes := tx.Nodes()
	recs := make([]api.NodeRecord, len(nodes))
	for i, n := range nodes {
		recs[i] = n.NodeRecord
	}
	i, err := Find(recs, what)
	if err != nil {
		return nil, err
	}
	return nodes[i], nil
}

// Find is the index of the record that an operator means: by number, name,
// MAC, or a fingerprint's beginning that only one record has.
func Find(recs []api.NodeRecord, what string) (int, error) {
	mac, _ := net.ParseMAC(what)
	number, _ := strconv.Atoi(what)
	for i, r := range recs {
		if r.MAC == mac.String() && mac != nil || number > 0 && int(r.Node) == number || r.Name != "" && strings.EqualFold(r.Name, what) {
			return i, nil
		}
	}
	const shortest = 4 // hex digits: less is a guess
	prefix := strings.ReplaceAll(strings.ToLower(what), "-", "")
	var hits []int
	var macs []string
	for i, r := range recs {
		if len(prefix) >= shortest && strings.HasPrefix(strings.ReplaceAll(r.Fingerprint, "-", ""), prefix) {
			hits, macs = append(hits, i), append(macs, r.MAC)
		}
	}
	switch len(hits) {
	case 1:
		return hits[0], nil
	case 0:
		return 0, fault.New(fault.NotFound, "find node", what, "no machine has this number, name, MAC or fingerprint", "see: mosimg node ls")
	}
	return 0, fault.New(fault.Usage, "find node", what, "several machines have a fingerprint that begins so: "+strings.Join(macs, ", "), "give more digits, or the MAC")
}

// approve makes a machine one that may be a member, with a lasting number.
// On a member it acknowledges an alert.
func (s *Service) approve(tx *registry.Tx, n *registry.Node) {
	n.State, n.Alert = api.Approved, ""
	if n.Node == 0 {
		n.Node = tx.FreeID()
	}
	if n.Name == "" {
		n.Name = freeName(tx, s.defaultName(n))
	}
}

// defaultName is the name from cluster.yaml, "head", or nodeN.
func (s *Service) defaultName(n *registry.Node) string {
	switch {
	case s.Names[n.MAC] != "":
		return s.Names[n.MAC]
	case n.Role == RoleHead:
		return RoleHead
	}
	return "node" + strconv.Itoa(int(n.Node))
}

// freeName is the name wished for, or that with a number behind it.
func freeName(tx *registry.Tx, wish string) string {
	taken := map[string]bool{}
	for _, n := range tx.Nodes() {
		taken[n.Name] = true
	}
	name := wish
	for i := 2; taken[name]; i++ {
		name = fmt.Sprintf("%s-%d", wish, i)
	}
	return name
}

func notTheHead(op string, n *registry.Node) error {
	if n.Role != RoleHead {
		return nil
	}
	return fault.New(fault.Refused, op, n.Name, "it is the machine that this head runs on", "stop the head to take the cluster down")
}

// deny turns a machine away. A member becomes Revoked: its certificates and
// the gossip key that it knows are void.
func deny(tx *registry.Tx, n *registry.Node) error {
	if err := notTheHead("deny node", n); err != nil {
		return err
	}
	switch n.State {
	case api.Approved:
		n.State = api.Revoked
		tx.Revoke(n)
		tx.Rotate()
	case api.Pending:
		n.State = api.Denied
	}
	tx.PutNode(n)
	return nil
}

// remove forgets a machine. If it boots again it is a new one.
func remove(tx *registry.Tx, n *registry.Node) error {
	if err := notTheHead("remove node", n); err != nil {
		return err
	}
	if n.State == api.Approved {
		tx.Revoke(n)
		tx.Rotate()
	}
	tx.DeleteNode(n.MAC)
	return nil
}

// drain tells a member, by the cluster view, to send its guests away, or that
// it may take some again. It lasts over a reboot of either machine.
func drain(tx *registry.Tx, n *registry.Node, yes bool) error {
	if n.State != api.Approved {
		return fault.New(fault.Refused, "drain node", cmp.Or(n.Name, n.MAC), fmt.Sprintf("it is %s", n.State), "only members have guests")
	}
	n.Drain = yes
	tx.PutNode(n)
	return nil
}

func rename(tx *registry.Tx, n *registry.Node, name string) error {
	bad := func(cause, hint string) error {
		return fault.New(fault.Usage, "rename node", n.Name, cause, hint)
	}
	if err := nodename.Check(name); err != nil {
		return bad(err.Error(), "")
	}
	for _, o := range tx.Nodes() {
		if o.MAC != n.MAC && o.Name == name {
			return bad(fmt.Sprintf("%s is the name of %s", name, o.MAC), "choose another name")
		}
	}
	// A name that says another number would be a trap for whoever reads it.
	if num, ok := strings.CutPrefix(name, "node"); ok && num != strconv.Itoa(int(n.Node)) {
		if _, err := strconv.Atoi(num); err == nil {
			return bad(fmt.Sprintf("%s would be node %s's own name", name, num), "choose another name")
		}
	}
	if name == RoleHead && n.Role != RoleHead {
		return bad("it is not the head", "choose another name")
	}
	n.Name = name
	tx.PutNode(n)
	return nil
}
