package jobs

import (
	"fmt"
	"os"
	"strings"
	"time"

	"mosimg/agent/migrate"
	"mosimg/internal/api"
)

// Info is what the home knows of a job beside its migrate.Record. It is
// journalled before the job is begun and deleted after the record is.
type Info struct {
	Job    migrate.JobID
	Token  string // of the request that began it
	UID    uint32
	GID    uint32
	Groups []uint32
	// PID, Began and Boot name the process of its mosrun, for as long as this machine
	// is up: Began is its start time in clock ticks.
	PID     int
	Began   uint64
	Boot    string
	Argv    []string
	Started time.Time
	Locked  bool `json:",omitempty"`
	NoStdin bool `json:",omitempty"`
	// Killed: it is to end, as soon as its node can be told.
	Killed bool `json:",omitempty"`
}

// tokenHex is the length of JobStart.Token, and idHex how much of it is in a
// job's name: enough for two jobs of one mosrun's pid.
const (
	tokenHex = 32
	idHex    = 6
)

// jobID names a job: by its home and mosrun, for people, and by its token, for
// pids that come again.
func jobID(home api.NodeID, pid int, token string) migrate.JobID {
	return migrate.JobID(fmt.Sprintf("%d-%d-%s", home, pid, token[:idHex]))
}

// bootID names the time since this machine was started.
func bootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data)), err
}
