package agent

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"sync"

	"mosimg/agent/agentapi"
	"mosimg/internal/api"
	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// modeFile in the state folder keeps the mode over a restart of the agent.
const modeFile = "mode.json"

// modeKeeper holds the node's mode. Its methods may be called concurrently.
type modeKeeper struct {
	path string

	mu   sync.Mutex // guards the following
	mode api.Mode
	// drained is what the head wants.
	drained bool
}

// openMode reads what an earlier agent left. A file that cannot be read is no
// reason to have no agent: the node then takes jobs, as it does at first.
func openMode(dir string) (*modeKeeper, error) {
	k := &modeKeeper{path: filepath.Join(dir, modeFile)}
	data, err := os.ReadFile(k.path)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &k.mode)
	}
	return k, err
}

// get is the mode in force: a node that the head drains is leaving.
func (k *modeKeeper) get() api.Mode {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.mode
	m.Leaving = m.Leaving || k.drained
	return m
}

// drain notes what the head wants.
func (k *modeKeeper) drain(yes bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.drained = yes
}

func (k *modeKeeper) isDrained() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.drained
}

// change writes the new mode before it is in force.
func (k *modeKeeper) change(c api.ModeChange) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	m := k.mode
	for _, x := range []struct{ to, from *bool }{
		{&m.Blocked, c.Blocked}, {&m.Stay, c.Stay}, {&m.LocalStay, c.LocalStay}, {&m.Leaving, c.Leaving}, {&m.Bringing, c.Bringing},
	} {
		if x.from != nil {
			*x.to = *x.from
		}
	}
	data, err := json.Marshal(m)
	if err == nil {
		err = atomicfile.Write(k.path, data, 0o600)
	}
	if err != nil {
		return fault.New(fault.Environment, "keep", "the mode of this node", err, "")
	}
	k.mode = m
	return nil
}

// handleMode serves api.PathMode.
func (a *Agent) handleMode() {
	a.server.Handle("GET "+api.PathMode, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		st := a.modeStatus()
		if who := agentapi.CallerOf(r.Context()); !who.Local || who.UID != 0 {
			st.Why = nil // others' jobs are not everybody's business
		}
		unixhttp.Reply(w, st)
	}))
	a.server.Handle("POST "+api.PathMode, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if who := agentapi.CallerOf(r.Context()); !who.Local || who.UID != 0 {
			unixhttp.Fail(w, fault.New(fault.Refused, "change", "the mode of this node", "only root of this machine may", "run this as root"))
			return
		}
		var change api.ModeChange
		err := unixhttp.ReadJSON(w, r, &change)
		if err == nil {
			err = a.mode.change(change)
		}
		if err != nil {
			unixhttp.Fail(w, err)
			return
		}
		a.log.Info("mode", "is", a.mode.get())
		unixhttp.Reply(w, a.modeStatus())
	}))
}

func (a *Agent) modeStatus() api.ModeStatus {
	st := api.ModeStatus{Mode: a.mode.get(), Drained: a.mode.isDrained()}
	if e := a.engine.Load(); e != nil {
		st.Guests, st.Away, st.Why = e.balancer.pending(st.Mode)
	}
	return st
}
