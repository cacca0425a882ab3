// Package api holds the words that head, agents and tools say to each other:
// the types of the control API, its paths and its ports. It has no logic, so
// that every side can import it.
//
// Transport: JSON over HTTP. Three servers exist:
//
//	head API    TCP HeadPort    TLS 1.3, server certificate from the cluster CA
//	            POST PathEnrol    anyone (a CSR proves the key)   EnrolRequest -> EnrolReply
//	            GET  PathCluster  members only (mTLS)             ClusterView, long poll with ?have=GENERATION
//	            POST PathRenew    members only (mTLS)             RenewRequest -> RenewReply
//	head admin  unix socket HeadSocket, mode 0600 (root)
//	            GET PathNodes, POST PathNodeAct, POST PathAdopt
//	agent API   TCP AgentPort, mTLS members only, and unix socket AgentSocket, mode 0666 (local users)
//	            GET PathStatus    AgentStatus
//	            GET PathMembers   MemberTable
//
// Every error reply is a Problem with the HTTP status of its fault.Kind.
package api

import "time"

// Ports. openMosix used TCP 4660 for migration; we start there.
const (
	HeadPort   = 4660 // head API (TLS)
	AgentPort  = 4661 // agent API (mTLS)
	GossipPort = 4662 // membership and load gossip (UDP and TCP, encrypted)
)

// Places on a machine. Programs take flags to use others (tests do).
const (
	RunDir      = "/run/mosimg"
	HeadSocket  = RunDir + "/head.sock"
	AgentSocket = RunDir + "/agent.sock"
	// LocalJoin is where a head leaves a LocalTicket for the agent on its
	// own machine: mode 0600, root's.
	LocalJoin = RunDir + "/join.json"
)

// Paths of the APIs above.
const (
	PathEnrol   = "/v1/enrol"
	PathRenew   = "/v1/renew"
	PathCluster = "/v1/cluster"
	PathNodes   = "/v1/nodes"
	PathNodeAct = "/v1/nodes/act"
	PathAdopt   = "/v1/adopt"
	PathStatus  = "/v1/status"
	PathMembers = "/v1/members"
)

// NodeID is a node's lasting number, from 1; 0 means "none yet".
type NodeID int

// NodeState is what the head has decided about a machine.
type NodeState string

const (
	Pending  NodeState = "pending"  // seen, waits for approval
	Approved NodeState = "approved" // may be a member
	Denied   NodeState = "denied"   // refused until an operator changes it
	Revoked  NodeState = "revoked"  // was a member; its certificates and gossip key are void
)

// NIC is one network interface of a machine.
type NIC struct {
	Name    string `json:"name"`
	MAC     string `json:"mac"` // lower case, colons
	Driver  string `json:"driver,omitempty"`
	Carrier bool   `json:"carrier"`
	Mbit    int    `json:"mbit,omitempty"` // link speed, 0 when unknown
}

// CRIUStatus says whether live migration works on a machine, and if not why.
type CRIUStatus struct {
	Usable  bool   `json:"usable"`
	Version string `json:"version,omitempty"`
	Reason  string `json:"reason,omitempty"` // set when not usable: the node then takes only jobs placed at start
}

// Inventory is what a machine reports about itself when it enrols.
type Inventory struct {
	Arch        string     `json:"arch"` // GOARCH: amd64, 386
	CPUModel    string     `json:"cpu_model"`
	CPUs        int        `json:"cpus"`
	CPUFlags    []string   `json:"cpu_flags,omitempty"`
	XSaveBytes  int        `json:"xsave_bytes,omitempty"` // CPUID leaf 0xD size; CRIU wants it equal or larger at the destination
	MemoryBytes int64      `json:"memory_bytes"`
	Kernel      string     `json:"kernel"`
	NICs        []NIC      `json:"nics"`
	TPM         bool       `json:"tpm"`
	CRIU        CRIUStatus `json:"criu"`
	Product     string     `json:"product,omitempty"` // DMI vendor and product
}

// EnrolRequest asks the head to let a machine in. The same request is sent
// again while the answer is Pending; CSR, Nonce and MAC must not change.
type EnrolRequest struct {
	Protocol  int       `json:"protocol"`
	CSR       []byte    `json:"csr"`   // PKCS #10, DER; its signature proves the key
	Nonce     string    `json:"nonce"` // one-shot boot nonce from the kernel command line or a LocalTicket
	MAC       string    `json:"mac"`   // of the NIC that booted
	Address   string    `json:"address"`
	Image     string    `json:"image,omitempty"` // id of the running image set
	Hostname  string    `json:"hostname,omitempty"`
	Inventory Inventory `json:"inventory"`
	// WaitMillis lets the head hold a Pending answer back for so long (at
	// most 30 s), so that an approval arrives at once.
	WaitMillis int `json:"wait_ms,omitempty"`
}

// EnrolReply is the head's answer.
type EnrolReply struct {
	State       NodeState    `json:"state"`
	Node        NodeID       `json:"node"`
	Name        string       `json:"name"`
	Reason      string       `json:"reason,omitempty"`      // why not Approved
	Certificate []byte       `json:"certificate,omitempty"` // DER, when Approved
	CA          []byte       `json:"ca,omitempty"`          // DER, when Approved
	Cluster     *ClusterView `json:"cluster,omitempty"`     // when Approved
	RetryMillis int          `json:"retry_ms,omitempty"`    // when Pending
	HeadTime    time.Time    `json:"head_time"`             // for machines whose clock is wrong
}

// RenewRequest asks for a fresh certificate for the same node; the CSR may
// carry the same key or a new one.
type RenewRequest struct {
	CSR []byte `json:"csr"`
}

// RenewReply carries the new certificate, DER.
type RenewReply struct {
	Certificate []byte `json:"certificate"`
}

// Peer is a node that may be a member.
type Peer struct {
	Node    NodeID `json:"node"`
	Name    string `json:"name"`
	Address string `json:"address"` // IP
	MAC     string `json:"mac"`
	// Drain: its guests are to go elsewhere, and none to come.
	Drain bool `json:"drain,omitempty"`
}

// ClusterView is what the head tells members. It changes as a whole:
// Generation rises by one at each change and never goes back.
type ClusterView struct {
	Generation uint64 `json:"generation"`
	Name       string `json:"name"` // cluster name
	// GossipKeys are 32-byte AES keys. The first one encrypts; all decrypt.
	// A rotation publishes [old,new], then [new,old], then [new].
	GossipKeys [][]byte `json:"gossip_keys"`
	Peers      []Peer   `json:"peers"`
	// Revoked holds the serial numbers (lower-case hex) of certificates that
	// are void although they have not expired.
	Revoked []string `json:"revoked,omitempty"`
}

// LoadVector is one machine's load, as measured by itself.
type LoadVector struct {
	Node        NodeID  `json:"node"`
	Seq         uint64  `json:"seq"`         // rises by one a second; restarts at the agent's start time in Unix seconds
	Load        float64 `json:"load"`        // runnable processes, decayed (MOSIX 5:3 when it rises, 7:1 when it falls)
	Utilisation float64 `json:"utilisation"` // 0..1 over the last second, all CPUs
	CPUs        int     `json:"cpus"`
	MemTotal    int64   `json:"mem_total"` // bytes
	MemFree     int64   `json:"mem_free"`  // bytes, MemAvailable
	Guests      int     `json:"guests"`    // jobs here whose home is elsewhere
	UptimeSec   int64   `json:"uptime_s"`
	Speed       int     `json:"speed"`             // of one CPU; 10000 is the reference, 0 not yet known
	Blocked     bool    `json:"blocked,omitempty"` // takes no guests (mosctl block)
	Leaving     bool    `json:"leaving,omitempty"` // sends its jobs away and takes none (drain, shutdown)
}

// Liveness is what membership knows of a node.
type Liveness string

const (
	Alive   Liveness = "alive"
	Suspect Liveness = "suspect" // misses probes, not yet given up
	Dead    Liveness = "dead"
	Left    Liveness = "left" // said goodbye
)

// Member is one node as one agent sees it.
type Member struct {
	Node      NodeID      `json:"node"`
	Name      string      `json:"name"`
	Address   string      `json:"address"`
	Self      bool        `json:"self,omitempty"`
	Liveness  Liveness    `json:"liveness"`
	Since     time.Time   `json:"since"`          // of Liveness
	Load      *LoadVector `json:"load,omitempty"` // last heard, nil when nothing was
	AgeMillis int64       `json:"age_ms"`         // age of Load when the reply was made
	Migration bool        `json:"migration"`      // CRIU usable there
}

// MemberTable is the reply of PathMembers, sorted by node number.
type MemberTable struct {
	Cluster string   `json:"cluster"`
	Self    NodeID   `json:"self"`
	Members []Member `json:"members"`
}

// AgentState is where an agent is on its way into the cluster.
type AgentState string

const (
	StateStarting AgentState = "starting"
	StateNoLink   AgentState = "no carrier"
	StateNoLease  AgentState = "no address"
	StateNoHead   AgentState = "no head"
	StatePending  AgentState = "pending"
	StateDenied   AgentState = "denied"
	StateMember   AgentState = "member"
)

// AgentStatus is the reply of PathStatus.
type AgentStatus struct {
	Version     string     `json:"version"`
	Protocol    int        `json:"protocol"`
	State       AgentState `json:"state"`
	Reason      string     `json:"reason,omitempty"`
	Node        NodeID     `json:"node"`
	Name        string     `json:"name"`
	Address     string     `json:"address"`
	MAC         string     `json:"mac"`
	Fingerprint string     `json:"fingerprint"` // identity.Fingerprint of the public key
	Image       string     `json:"image,omitempty"`
	Head        string     `json:"head"` // URL
	Generation  uint64     `json:"generation"`
	CertExpires time.Time  `json:"cert_expires,omitzero"`
	CRIU        CRIUStatus `json:"criu"`
}

// NodeRecord is one machine in the head's registry, as PathNodes lists it.
type NodeRecord struct {
	Node        NodeID     `json:"node"` // 0 while pending and never approved
	Name        string     `json:"name"`
	MAC         string     `json:"mac"`
	Address     string     `json:"address"`
	State       NodeState  `json:"state"`
	Role        string     `json:"role"` // "head" or "node"
	Fingerprint string     `json:"fingerprint,omitempty"`
	Image       string     `json:"image,omitempty"`   // running
	Offered     string     `json:"offered,omitempty"` // what the next boot would get
	FirstSeen   time.Time  `json:"first_seen"`
	LastSeen    time.Time  `json:"last_seen"`
	Inventory   *Inventory `json:"inventory,omitempty"`
	Drain       bool       `json:"drain,omitempty"` // its guests are to go elsewhere, and none to come
	Alert       string     `json:"alert,omitempty"` // e.g. another key tried to enrol with this MAC
	// Liveness comes from the agent on the head's machine; "" when none runs there.
	Liveness Liveness  `json:"liveness,omitempty"`
	Since    time.Time `json:"since,omitzero"`
}

// NodeAct asks for one action on one machine.
type NodeAct struct {
	Action string `json:"action"` // approve, deny, rm, rename, drain, undrain
	Node   string `json:"node"`   // number, name, MAC or a unique fingerprint prefix
	Name   string `json:"name,omitempty"`
}

// Adopt opens an adoption window: machines that enrol while it is open are
// approved without a question. Zero For closes it.
type Adopt struct {
	For  time.Duration `json:"for"`            // nanoseconds
	Next int           `json:"next,omitempty"` // at most so many machines; 0 = no limit
}

// LocalTicket is what a head leaves at LocalJoin for its own machine's agent.
type LocalTicket struct {
	Head    string `json:"head"`  // https://ADDRESS:HeadPort
	CA      string `json:"ca"`    // identity.Pin of the CA
	Nonce   string `json:"nonce"` // approves the bearer as role "head"
	MAC     string `json:"mac"`
	Address string `json:"address"`
}

// Problem is the body of every error reply.
type Problem struct {
	Kind  int    `json:"kind"` // fault.Kind
	Error string `json:"error"`
	// Errno is the error number of the system call that failed, if one did: of
	// the exec of a job's program, from which mosrun takes its status.
	Errno int `json:"errno,omitempty"`
}
