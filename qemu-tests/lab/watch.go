package lab

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"mosimg/internal/api"
)

// View is the cluster as the head's tools show it at one moment.
type View struct {
	Nodes   []api.NodeRecord // mosimg node ls
	Members api.MemberTable  // mosmon --once
	Err     error            // why there is nothing, when there is nothing
}

// Record is the registry's entry for a machine.
func (v View) Record(m *Machine) (api.NodeRecord, bool) {
	i := slices.IndexFunc(v.Nodes, func(r api.NodeRecord) bool { return r.MAC == m.MAC() })
	if i < 0 {
		return api.NodeRecord{}, false
	}
	return v.Nodes[i], true
}

// Member is the head's agent's view of a machine.
func (v View) Member(m *Machine) (api.Member, bool) {
	r, ok := v.Record(m)
	if !ok || r.Node == 0 {
		return api.Member{}, false
	}
	i := slices.IndexFunc(v.Members.Members, func(x api.Member) bool { return x.Node == r.Node })
	if i < 0 {
		return api.Member{}, false
	}
	return v.Members.Members[i], true
}

// pollEvery is the pause between two looks at the cluster. Each look starts
// two programs on the head, and under emulation they take processor time away
// from what is waited for.
const pollEvery = time.Second

// queryTime bounds one look.
const queryTime = 30 * time.Second

// watch looks at the cluster for all who wait for it to change, and only
// while someone does.
type watch struct {
	lab *Lab

	mu      sync.Mutex // guards the following
	waiting int
	running bool // poll runs
	looking bool // a view is being made
	seq     uint64
	view    View
	changed chan struct{} // closed and renewed with each view
}

func (w *watch) init(l *Lab) { w.lab, w.changed = l, make(chan struct{}) }

// next is a view whose making began after the call.
func (w *watch) next(ctx context.Context) (View, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting++
	defer func() { w.waiting-- }()
	// The view that is being made now may have begun before the call.
	want := w.seq + 1
	if w.looking {
		want++
	}
	if !w.running {
		w.running = true
		go w.poll()
	}
	for w.seq < want {
		changed := w.changed
		w.mu.Unlock()
		select {
		case <-changed:
			w.mu.Lock()
		case <-ctx.Done():
			w.mu.Lock()
			return View{}, context.Cause(ctx)
		}
	}
	return w.view, nil
}

func (w *watch) poll() {
	for {
		w.mu.Lock()
		if w.waiting == 0 {
			w.running = false
			w.mu.Unlock()
			return
		}
		w.looking = true
		w.mu.Unlock()
		v := w.look()
		w.mu.Lock()
		w.looking = false
		w.view = v
		w.seq++
		close(w.changed)
		w.changed = make(chan struct{})
		w.mu.Unlock()
		time.Sleep(pollEvery)
	}
}

func (w *watch) look() View {
	ctx, cancel := context.WithTimeout(context.Background(), queryTime)
	defer cancel()
	var v View
	if v.Nodes, v.Err = w.lab.NodeList(ctx); v.Err != nil {
		return View{Err: v.Err}
	}
	if v.Members, v.Err = w.lab.Members(ctx); v.Err != nil {
		return View{Nodes: v.Nodes, Err: v.Err}
	}
	return v
}

// Until waits until the cluster looks as cond wants. cond says what is still
// missing, "" when nothing is; an error ends the wait.
func (l *Lab) Until(ctx context.Context, what string, cond func(View) (missing string, err error)) error {
	missing := "the head has not answered yet"
	for {
		v, err := l.watch.next(ctx)
		if err != nil {
			if errors.Is(err, context.Canceled) {
				return err
			}
			return fmt.Errorf("wait until %s: %w: %s", what, err, missing)
		}
		if m, err := cond(v); err != nil {
			return fmt.Errorf("wait until %s: %w", what, err)
		} else if m == "" && v.Err == nil {
			return nil
		} else if missing = m; v.Err != nil {
			missing = v.Err.Error()
		}
	}
}
