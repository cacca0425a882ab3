package table

import (
	"fmt"
	"os/user"
	"strconv"
	"strings"
	"time"

	"mosimg/internal/api"
)

// Jobs says how a table of jobs is to look.
type Jobs struct {
	// Names are those of the nodes; one without a name is shown by its number.
	Names map[api.NodeID]string
	Self  api.NodeID
	Now   time.Time
	// Guests says that the jobs are other homes', and shows which.
	Guests bool
	// Users adds whose job it is.
	Users bool
	// Why adds why a job does not move, and shows lines whole.
	Why bool
	// Width is the terminal's; 0 is any width.
	Width int
}

// Names are those of the machines of a cluster.
func Names(t api.MemberTable) map[api.NodeID]string {
	out := make(map[api.NodeID]string, len(t.Members))
	for _, m := range t.Members {
		out[m.Node] = m.Name
	}
	return out
}

// whyCommand is how much of a command is shown beside the reason why a job does
// not move.
const whyCommand = 40

// Text is one line for each job, below a header.
func (o Jobs) Text(jobs []api.JobStatus) string {
	head := []string{"ID", "PID"}
	left := []int{0}
	if o.Users {
		left = append(left, len(head))
		head = append(head, "USER")
	}
	left = append(left, len(head))
	where, at := "WHERE", o.Where
	if o.Guests {
		where, at = "FROM", func(j api.JobStatus) string { return o.Node(j.Home) }
	}
	head = append(head, where, "SINCE", "MOVES", "SIZE")
	left = append(left, len(head), len(head)+1)
	head = append(head, "STATE", "COMMAND")
	if o.Why {
		left = append(left, len(head))
		head = append(head, "WHY")
	}
	rows := [][]string{head}
	users := map[int]string{}
	for _, j := range jobs {
		row := []string{Printable(j.ID), strconv.Itoa(j.PID)}
		if o.Users {
			if _, ok := users[j.UID]; !ok {
				users[j.UID] = User(j.UID)
			}
			row = append(row, users[j.UID])
		}
		size := "-"
		if j.Bytes > 0 {
			size = Bytes(j.Bytes)
		}
		row = append(row, at(j), o.since(j.Since), strconv.Itoa(j.Moves), size, string(j.State))
		command := Command(j)
		if !o.Why {
			rows = append(rows, append(row, command))
			continue
		}
		if r := []rune(command); len(r) > whyCommand {
			command = string(r[:whyCommand-3]) + "..."
		}
		rows = append(rows, append(row, command, Printable(Why(j))))
	}
	width := o.Width
	if o.Why {
		width = 0
	}
	return Cut(Align(rows, left...), width)
}

// Where names the node that a job is on: home, unless it is a guest, then by
// name or number.
func (o Jobs) Where(j api.JobStatus) string {
	switch j.Node {
	case j.Home:
		return "home"
	case 0:
		return "-"
	}
	return o.Node(j.Node)
}

// Node is the name of a node, or its number.
func (o Jobs) Node(id api.NodeID) string {
	if name := o.Names[id]; name != "" {
		return Printable(name)
	}
	return fmt.Sprint(int(id))
}

func (o Jobs) since(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	// Two clocks of one machine may differ by a step of NTP.
	return Age(max(0, o.Now.Sub(t)))
}

// Command is what the job runs, on one line.
func Command(j api.JobStatus) string { return Printable(strings.Join(j.Argv, " ")) }

// Why is why a job does not move, as far as there is a reason.
func Why(j api.JobStatus) string {
	var why []string
	if j.Locked {
		why = append(why, "locked")
	}
	if j.Pinned != "" {
		why = append(why, j.Pinned)
	}
	if j.Reason != "" && j.Reason != j.Pinned {
		why = append(why, "last move: "+j.Reason)
	}
	if j.Stays != "" && j.Stays != j.Pinned && !j.Locked {
		why = append(why, "stays: "+j.Stays)
	}
	if len(why) == 0 {
		return "-"
	}
	return strings.Join(why, "; ")
}

// User is a user's name, or the number of one without.
func User(uid int) string {
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return Printable(u.Username)
	}
	return strconv.Itoa(uid)
}
