package lab

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
	"mosimg/qemu-tests/vm"
)

// Phase is what a lab as a whole is doing.
type Phase string

// Phases.
const (
	Starting Phase = "starting"
	Up       Phase = "up"
	Stopping Phase = "stopping"
	Failed   Phase = "failed"
)

// State is a lab as its folder tells other processes about it (lab.json).
type State struct {
	Version  int            `json:"version"`
	Phase    Phase          `json:"phase"`
	Error    string         `json:"error,omitempty"` // when failed
	Process  vm.Process     `json:"process"`         // of the lab itself
	Started  time.Time      `json:"started"`
	Images   string         `json:"images"`
	Image    string         `json:"image"` // id of the image set
	KVM      bool           `json:"kvm"`
	Sockets  string         `json:"sockets"` // folder
	Machines []MachineState `json:"machines"`
}

// MachineState is one machine of a lab.
type MachineState struct {
	Name     string      `json:"name"`
	MAC      string      `json:"mac"`
	Firmware vm.Firmware `json:"firmware,omitempty"`
	On       bool        `json:"on"`
	Process  vm.Process  `json:"process"` // of QEMU; zero when it is off
	Console  string      `json:"console"`
}

const stateVersion = 1

// ReadState reads a lab's state from its folder.
func ReadState(dir string) (*State, error) {
	name := filepath.Join(dir, stateFile)
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.NotFound, "find lab", dir, "no lab is in this folder", "start one with: mosimg lab up")
	}
	if err != nil {
		return nil, fault.New(fault.Environment, "find lab", dir, err, "")
	}
	s := new(State)
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fault.New(fault.Environment, "read lab state", name, err, "")
	}
	if s.Version != stateVersion {
		return nil, fault.New(fault.Usage, "read lab state", name, "it is of another version of mosimg", "")
	}
	return s, nil
}

func (s *State) write(dir string) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, stateFile), append(b, '\n'), 0o600)
}

// ExecSocket is where a running lab lets other processes reach its head, by
// the protocol of package labport.
func (s *State) ExecSocket() string { return filepath.Join(s.Sockets, execSocket) }

const execSocket = "exec"

// downTime is how long a lab may take to stop by itself.
const downTime = 20 * time.Second

// Down stops the lab in dir: exactly its processes. It reports whether
// anything was running. Remains of a lab that was killed are removed.
func Down(dir string) (bool, error) {
	s, err := ReadState(dir)
	if err != nil {
		return false, err
	}
	ran := s.Process.Alive()
	if ran {
		if err := s.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return false, fault.New(fault.Environment, "stop lab", dir, err, "are you the user who started it?")
		}
		waitGone(s.Process, downTime)
		if err := kill(s.Process); err != nil {
			return true, fault.New(fault.Environment, "stop lab", dir, err, "")
		}
	}
	for _, m := range s.Machines {
		if m.Process.Alive() {
			ran = true
			if err := kill(m.Process); err != nil {
				return true, fault.New(fault.Environment, "stop machine", m.Name, err, "")
			}
		}
	}
	// A lab that stopped by itself has removed its folder, and a failed one
	// has kept what it wanted to keep.
	if f, err := openExisting(dir); err == nil {
		f.sockets = s.Sockets
		f.close(false)
	}
	return ran, nil
}

// openExisting takes the folder of a lab that is gone.
func openExisting(dir string) (*folder, error) {
	if _, err := ReadState(dir); err != nil {
		return nil, err
	}
	f := &folder{dir: dir, made: true}
	return f, f.relock()
}

// kill ends a process that may be gone already.
func kill(p vm.Process) error {
	if err := p.Signal(os.Kill); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	waitGone(p, time.Second)
	return nil
}

func waitGone(p vm.Process, limit time.Duration) {
	const step = 200 * time.Millisecond
	for end := time.Now().Add(limit); p.Alive() && time.Now().Before(end); {
		time.Sleep(step)
	}
}
