package balance

import (
	"fmt"

	"mosimg/internal/api"
)

// Place is where a job starts that its user wants on the best node (mosrun
// -b), with the reason: home, unless another node runs it faster by more than a start there
// costs. bytes is how much memory it asks for, and may be 0.
func Place(c Cluster, bytes int64) (api.NodeID, string) {
	// A new job is a process that wants a CPU.
	j := Job{Home: c.Self.ID, Load: 1, Bytes: bytes}
	fits := c.misfit(j, c.Self) == ""
	to, reasons := c.best(j)
	switch {
	case to == nil && fits:
		return c.Self.ID, reasons
	case to == nil:
		return 0, "no node has the memory: " + reasons
	case !fits:
		return to.ID, "home has not the memory"
	case c.kept(j) != "":
		return c.Self.ID, c.kept(j)
	case c.Self.Speed <= 0 || c.Self.CPUs <= 0:
		return c.Self.ID, "home's speed is not known yet"
	}
	load := c.expected(c.Self) + j.Load
	if load <= float64(c.Self.CPUs) {
		// A short program would be over before it had begun elsewhere; a long one
		// can move to a faster CPU.
		return c.Self.ID, "home has a CPU to spare"
	}
	here := cost(c.Self, load)
	there := cost(*to, c.expected(*to)+Stability*j.Load)
	if there*MinGain >= here {
		return c.Self.ID, fmt.Sprintf("home would be at %.2f, node %d at %.2f", here, to.ID, there)
	}
	return to.ID, fmt.Sprintf("home would be at %.2f, node %d at %.2f", here, to.ID, there)
}

// Admit tells why a job that another node's balancer sends is not taken: many
// may have chosen this node at the same time, from the same news. Sent are
// the jobs that have just come here or are on their way; load and limit are
// Move's.
func Admit(self Node, sent []Sent, load, limit float64) error {
	c := Cluster{Self: self, Sent: sent}
	switch {
	case limit <= 0:
		return nil // it does not come for speed
	case self.Speed <= 0 || self.CPUs <= 0:
		return fmt.Errorf("its speed is not known yet")
	}
	// Stability is the sender's to add; here the load is known better.
	if there := cost(self, c.expected(self)+load); there >= limit {
		return fmt.Errorf("others were quicker: it would be at %.2f, and no better than %.2f", there, limit)
	}
	return nil
}
