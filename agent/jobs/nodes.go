package jobs

import (
	"fmt"
	"strconv"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// homeName is how a user calls the job's home.
const homeName = "home"

// resolve finds the node that a user means: home, a number or a name. Home is
// always there, though this machine may not be a member of anything now.
func resolve(nodes []api.Member, self api.NodeID, name string) (api.Member, error) {
	number, err := strconv.Atoi(name)
	isNumber := err == nil
	if name == homeName || isNumber && api.NodeID(number) == self {
		for _, m := range nodes {
			if m.Node == self {
				m.Liveness = api.Alive
				return m, nil
			}
		}
		// What it can do is for whoever carries the job there to find out.
		return api.Member{Node: self, Self: true, Liveness: api.Alive, Migration: true}, nil
	}
	for _, m := range nodes {
		if isNumber && m.Node == api.NodeID(number) || !isNumber && m.Name == name {
			return m, nil
		}
	}
	return api.Member{}, fault.New(fault.NotFound, "find", fmt.Sprintf("node %q", name), "it is not a member of the cluster", "mosmon lists the members; one that is pending has to be approved first")
}

func called(m api.Member) string {
	if m.Name == "" {
		return fmt.Sprintf("node %d", m.Node)
	}
	return fmt.Sprintf("node %d (%s)", m.Node, m.Name)
}

// takesJobs tells why no job can be started on a node.
func takesJobs(m api.Member) error {
	var cause string
	switch m.Liveness {
	case api.Alive:
		return nil
	case api.Suspect:
		cause = "it does not answer"
	case api.Dead:
		cause = "it is down"
	case api.Left:
		cause = "it has left the cluster"
	default:
		cause = fmt.Sprintf("it is %q", m.Liveness)
	}
	if !m.Since.IsZero() {
		cause += " since " + m.Since.Format(time.TimeOnly)
	}
	return fault.New(fault.Unavailable, "use", called(m), cause, "")
}

// takesMoves tells why no job can be moved to a node.
func takesMoves(m api.Member) error {
	if err := takesJobs(m); err != nil {
		return err
	}
	if !m.Migration {
		return noMigration(m)
	}
	return nil
}

func noMigration(m api.Member) error {
	return fault.New(fault.Refused, "use", called(m), "jobs cannot be moved to or from it: CRIU does not work there", "mosagent status on that machine says why")
}
