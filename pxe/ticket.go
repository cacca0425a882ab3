package pxe

import (
	"cmp"
	"encoding/json"
	"os"
	"path/filepath"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
)

// writeTicket leaves a fresh LocalTicket for this machine's agent. Whoever
// can read it is root here and owns the cluster anyway.
func (h *Head) writeTicket(name string) error {
	n := h.nets[0]
	nonce, err := h.enrol.IssueTicket(n.MAC.String(), n.addr())
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(api.LocalTicket{
		Head: h.cfg.apiURL(n.addr()), CA: identity.Pin(h.store.CA().Cert), Nonce: nonce,
		MAC: n.MAC.String(), Address: n.addr().String(),
	}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err == nil {
		err = atomicfile.Write(name, append(data, '\n'), 0o600)
		if err == nil {
			return nil
		}
	}
	return fault.New(fault.Environment, "write local ticket", name, err, "name a folder that can be written with --run")
}

// removeTicket takes the ticket away: without a head it is good for nothing.
func removeTicket(name string) { os.Remove(name) }

// adoptFor is the window that flag and configuration ask for.
func adoptFor(flag, config time.Duration) api.Adopt { return api.Adopt{For: cmp.Or(flag, config)} }
