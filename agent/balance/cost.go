package balance

import (
	"fmt"
	"math"
	"strings"
	"time"

	"mosimg/internal/api"
)

// cost is how many seconds a process takes, among so many that want to run, for what
// the reference CPU does in one. A process has at most one CPU.
func cost(n Node, load float64) float64 {
	return max(1, load/float64(n.CPUs)) * StandardSpeed / float64(n.Speed)
}

// expected is a node's load with what was sent there and does not show yet.
func (c Cluster) expected(n Node) float64 {
	load := n.Load
	for _, s := range c.Sent {
		if s.To == n.ID {
			load += s.Load * unseen(s.Ago-n.Age)
		}
	}
	return load
}

// unseen is the share of a job that the load of its node does not show, when that
// was measured so long after the job was sent.
func unseen(after time.Duration) float64 {
	if after <= 0 {
		return 1
	}
	return math.Pow(RiseLeft, after.Seconds())
}

// best is the node at which a job costs least, of those that can take it; or
// why none can.
func (c Cluster) best(j Job) (*Node, string) {
	var best *Node
	var reasons []string
	lowest := math.Inf(1)
	for _, n := range c.Others {
		if n.ID == c.Self.ID {
			continue
		}
		if reason := c.refusal(j, n); reason != "" {
			reasons = append(reasons, fmt.Sprintf("node %d: %s", n.ID, reason))
			continue
		}
		there := cost(n, c.expected(n)+Stability*j.Load)
		if there < lowest || there == lowest && c.before(j, n.ID, best.ID) {
			best, lowest = &n, there
		}
	}
	if best == nil && len(reasons) == 0 {
		return nil, "there is no other node"
	}
	return best, strings.Join(reasons, "; ")
}

// before chooses between nodes that are equally good: home first, where the files are.
func (c Cluster) before(j Job, a, b api.NodeID) bool {
	if a == j.Home || b == j.Home {
		return a == j.Home
	}
	return c.mix(a) < c.mix(b)
}

// mix is the finaliser of splitmix64 (Steele, Lea, Flood 2014).
func (c Cluster) mix(n api.NodeID) uint64 {
	x := c.Seed + uint64(n)*0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// refusal is why a job cannot go to a node; "" if it can.
func (c Cluster) refusal(j Job, n Node) string {
	switch {
	case n.Away != "":
		return n.Away
	case n.Age > Fresh:
		return fmt.Sprintf("not heard of for %s", n.Age.Round(time.Second))
	case j.Refused[n.ID] != "":
		return j.Refused[n.ID]
	case n.Leaving:
		return "it is leaving"
	case n.Blocked && n.ID != j.Home: // at home it is no guest
		return "it takes no guests"
	case n.Speed <= 0 || n.CPUs <= 0:
		return "its speed is not known yet"
	}
	return c.misfit(j, n)
}
