package api

import "time"

// Jobs. On the agent's unix socket, for the users of the machine: a caller
// sees and steers its own jobs, root all of this home's.
//
//	POST PathJobs                 JobStart -> JobStarted; the same Token again is the same job
//	GET  PathJobs                 JobTable
//	GET  PathJobs/ID              JobStatus; ID may be the pid of the job's mosrun
//	POST PathJobs/ID/move         JobMove -> JobStatus, when the move is over
//	POST PathJobs/ID/kill         Kill it wherever it is
//	GET  PathJobs/ID/attach       Upgrade: UpgradeJob; mosrun's stream, see package agent/jobs/wire
//
// Between members, over mutual TLS, each an upgrade of the connection:
//
//	GET  PathMigrate              Upgrade: UpgradeMigrate, see package agent/migrate
//	GET  PathHomeFiles            Upgrade: UpgradeHomeFiles, see package agent/homefiles
const (
	PathJobs      = "/v1/jobs"
	PathMigrate   = "/v1/migrate"
	PathHomeFiles = "/v1/homefiles"

	UpgradeJob       = "mosimg-job/1"
	UpgradeMigrate   = "mosimg-migrate/1"
	UpgradeHomeFiles = "mosimg-homefiles/2"
)

// JobStart asks for a new job, of the caller.
type JobStart struct {
	// Token is 16 random bytes in hex that name the request: asked again, after
	// an agent's restart, it finds the job that it began.
	Token string   `json:"token"`
	Argv  []string `json:"argv"` // program, looked up in Env's PATH, and arguments
	Env   []string `json:"env"`
	Dir   string   `json:"dir"`
	Umask int      `json:"umask"`
	Nice  int      `json:"nice"`
	// Ignored are the numbers of the signals that the caller ignores: a
	// program inherits that (nohup).
	Ignored []int `json:"ignored,omitempty"`
	// Groups are the caller's supplementary groups; the agent checks them.
	Groups []uint32   `json:"groups,omitempty"`
	Limits []JobLimit `json:"limits,omitempty"`
	// Node is where the job is to run from its start: a number, a name, or
	// "" for home.
	Node string `json:"node,omitempty"`
	// Best lets the agent choose the node, from what it has heard; Node is then "".
	Best bool `json:"best,omitempty"`
	// Bytes is the memory that the node must have free; 0 is any. With Best only.
	Bytes int64 `json:"bytes,omitempty"`
	// Locked says that the job is moved only when its user says so (-L), or when its node is leaving.
	Locked bool `json:"locked,omitempty"`
	// NoStdin says that stdin was closed or is empty from the start.
	NoStdin bool `json:"no_stdin,omitempty"`
}

// JobLimit is a resource limit; Resource is a number of setrlimit(2), and
// RLIM_INFINITY is the largest uint64.
type JobLimit struct {
	Resource int    `json:"resource"`
	Cur      uint64 `json:"cur"`
	Max      uint64 `json:"max"`
}

// JobStarted is the reply to JobStart.
type JobStarted struct {
	ID string `json:"id"`
}

// JobMove asks for a move, to a node's number or name, or to "home".
type JobMove struct {
	To string `json:"to"`
}

// JobState is what a job is doing.
type JobState string

const (
	JobRuns    JobState = "runs"
	JobStopped JobState = "stopped" // by its user, with SIGTSTP
	JobMoves   JobState = "moves"   // a move is under way
	JobWaits   JobState = "waits"   // its node does not answer
	JobEnded   JobState = "ended"   // its mosrun has not taken its status yet
)

// JobStatus is one job, as its home knows it.
type JobStatus struct {
	ID      string    `json:"id"`
	PID     int       `json:"pid"` // of its mosrun
	UID     int       `json:"uid"`
	Argv    []string  `json:"argv"`
	State   JobState  `json:"state"`
	Home    NodeID    `json:"home"`
	Node    NodeID    `json:"node"`  // where it is
	Since   time.Time `json:"since"` // it is there
	Started time.Time `json:"started"`
	Moves   int       `json:"moves"`
	Epoch   uint64    `json:"epoch"`
	Locked  bool      `json:"locked,omitempty"`
	// Bytes is its resident memory and Processes how many it has, as last
	// measured; CPUSeconds what it has used, everywhere.
	Bytes      int64   `json:"bytes"`
	Processes  int     `json:"processes"`
	CPUSeconds float64 `json:"cpu_s"`
	// Reason is why its last move was called off; "" after a good one.
	Reason string `json:"reason,omitempty"`
	// Pinned is why it cannot move now; "" if it can.
	Pinned string `json:"pinned,omitempty"`
	// Stays is why the balancer of its node leaves it there.
	Stays string `json:"stays,omitempty"`
	// Downtime is how long the job stood still in its last move.
	Downtime time.Duration `json:"downtime_ns,omitempty"`
}

// JobTable is the reply of PathJobs, in the order in which jobs were started.
type JobTable struct {
	Self NodeID      `json:"self"`
	Jobs []JobStatus `json:"jobs"`
	// Guests are jobs of other homes that are here; only for root.
	Guests []JobStatus `json:"guests,omitempty"`
}
