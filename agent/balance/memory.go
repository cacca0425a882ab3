package balance

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// What a node keeps free. MOSIX "endeavors to keep some memory free on all
// machines"; its thresholds are not published.
const (
	// MinFree of the memory, in percent: with less, or when MemFull is above
	// MaxFull, a node starves, and jobs leave until KeepFree is free.
	MinFree  = 5
	KeepFree = 10
	MaxFull  = 0.05
	// fullWindow is how long MemFull remembers what was before a job left.
	fullWindow = 10 * time.Second
	// margin is what migrate.Node keeps for itself in any case.
	margin = 16 << 20
	// restoring is how often a job's memory is needed while it comes: what has
	// come and what is restored of it are both there for a moment (migrate.Node).
	restoring = 2
)

func (n Node) keepFree() int64 { return n.MemTotal / 100 * KeepFree }

func (n Node) minFree() int64 { return n.MemTotal / 100 * MinFree }

// starves tells whether jobs have to leave for the memory that they take.
func (c Cluster) starves() bool {
	if c.Self.MemTotal <= 0 {
		return false
	}
	for _, s := range c.Sent {
		if s.To != c.Self.ID && s.Ago < fullWindow { // MemFull does not show yet what that has mended
			return c.Self.MemFree < c.Self.minFree()
		}
	}
	return c.Self.MemFree < c.Self.minFree() || c.Self.MemFull > MaxFull
}

// free is a node's memory less what was sent there after it was measured.
func (c Cluster) free(n Node) int64 {
	free := n.MemFree
	for _, s := range c.Sent {
		if s.To == n.ID && s.Ago <= n.Age+time.Second {
			free -= restoring * s.Bytes
		}
	}
	return free
}

// misfit is why a job's memory is too much for a node; "" if it is not. What
// the node is to keep stays free, so that it does not starve in its turn; for the
// guests of a node that is leaving it is enough that they fit.
func (c Cluster) misfit(j Job, n Node) string {
	keep := max(n.keepFree(), margin)
	if c.Self.Leaving {
		keep = margin
	}
	if need, free := max(0, j.Bytes), c.free(n)-keep; need > free/restoring {
		return fmt.Sprintf("it needs %d MiB for a moment, %d MiB are free there", restoring*need>>20, max(0, free)>>20)
	}
	return ""
}

// relieve sends from a node that runs out of memory the smallest job whose end
// here is enough; if none is, the largest.
func relieve(c Cluster, why map[string]string) *Move {
	if !c.starves() {
		return nil
	}
	// By MemFull alone it is not known how much it takes.
	need := max(c.Self.keepFree()-c.Self.MemFree, c.Self.minFree())
	jobs := slices.Clone(c.Jobs)
	slices.SortFunc(jobs, func(a, b Job) int {
		enoughA, enoughB := a.Bytes >= need, b.Bytes >= need
		switch {
		case enoughA && enoughB:
			return cmp.Or(cmp.Compare(a.Bytes, b.Bytes), cmp.Compare(a.ID, b.ID))
		case enoughA:
			return -1
		case enoughB:
			return 1
		}
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(a.ID, b.ID))
	})
	for _, j := range jobs {
		if why[j.ID] != "" || j.Bytes <= 0 {
			continue
		}
		switch {
		case stuck(j) != "":
			why[j.ID] = stuck(j)
		case j.Locked:
			why[j.ID] = "locked"
		case c.kept(j) != "":
			why[j.ID] = c.kept(j)
		default:
			to, reasons := c.best(j)
			if to == nil {
				why[j.ID] = "this node is short of memory, and no other has enough: " + reasons
				continue
			}
			return &Move{Job: j.ID, To: to.ID, Load: j.Load, Reason: fmt.Sprintf("this node is short of memory: %d of %d MiB are free", c.Self.MemFree>>20, c.Self.MemTotal>>20)}
		}
	}
	return nil
}
