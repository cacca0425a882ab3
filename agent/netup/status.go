package netup

import (
	"encoding/json"
	"fmt"
	"os"

	"mosimg/internal/api"
	"mosimg/internal/atomicfile"
)

// StatusFile is where a machine's network service tells the agent how far it is.
const StatusFile = api.RunDir + "/net.json"

// Status is the state of the network of a machine that we own.
type Status struct {
	// State is StateNoLink or StateNoLease while there is no address, and
	// "" once there is one.
	State api.AgentState `json:"state"`
	// Reason says what is missing. It may be set beside an address: a cable
	// was pulled, the DHCP server is gone.
	Reason    string `json:"reason,omitempty"`
	Interface string `json:"interface,omitempty"`
	MAC       string `json:"mac,omitempty"`
	Address   string `json:"address,omitempty"` // IP, "" when there is none
	Prefix    int    `json:"prefix,omitempty"`  // bits of the subnet
	Gateway   string `json:"gateway,omitempty"`
}

// Up reports whether the machine has an address.
func (s Status) Up() bool { return s.Address != "" }

func (s Status) String() string {
	switch {
	case s.Up() && s.Reason != "":
		return fmt.Sprintf("%s has %s/%d, but %s", s.Interface, s.Address, s.Prefix, s.Reason)
	case s.Up():
		return fmt.Sprintf("%s (%s) has %s/%d", s.Interface, s.MAC, s.Address, s.Prefix)
	}
	return s.Reason
}

// ReadStatus reads what a network service wrote; a file that is not there
// yet is the zero Status and no error.
func ReadStatus(path string) (Status, error) {
	var s Status
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return Status{State: api.StateStarting}, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	return s, err
}

func (s Status) write(path string) error {
	data, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, data, 0o644)
}
