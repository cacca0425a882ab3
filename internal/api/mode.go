package api

// PathMode is the agent's, on its unix socket: what its node does with jobs.
//
//	GET  PathMode    ModeStatus
//	POST PathMode    ModeChange -> ModeStatus, at once; root's alone
const PathMode = "/v1/mode"

// Mode is what a node does with jobs, beside carrying them. The words are
// those of MOSIX's mosctl. It outlives the agent, not the machine.
type Mode struct {
	// Blocked takes no guests (block).
	Blocked bool `json:"blocked,omitempty"`
	// Stay lets no job leave by itself (stay), LocalStay none of this home's (lstay).
	Stay      bool `json:"stay,omitempty"`
	LocalStay bool `json:"local_stay,omitempty"`
	// Leaving sends the guests away, and takes none (expel, shutdown).
	Leaving bool `json:"leaving,omitempty"`
	// Bringing fetches this home's jobs (bring), until all are there.
	Bringing bool `json:"bringing,omitempty"`
}

// ModeChange changes what is not nil.
type ModeChange struct {
	Blocked   *bool `json:"blocked,omitempty"`
	Stay      *bool `json:"stay,omitempty"`
	LocalStay *bool `json:"local_stay,omitempty"`
	Leaving   *bool `json:"leaving,omitempty"`
	Bringing  *bool `json:"bringing,omitempty"`
}

// ModeStatus is a Mode and how far it is.
type ModeStatus struct {
	Mode
	// Drained says that the head wants this node empty (mosimg node drain).
	Drained bool `json:"drained,omitempty"`
	// Guests are here or on their way; Away are this home's jobs elsewhere.
	Guests int `json:"guests"`
	Away   int `json:"away"`
	// Why tells root of jobs that should leave, or come, why they have not yet.
	Why map[string]string `json:"why,omitempty"`
}
