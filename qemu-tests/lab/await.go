package lab

import (
	"context"
	"fmt"
	"time"

	"mosimg/internal/api"
)

// failFast ends a wait for a machine when the machine cannot get on any more.
func (m *Machine) failFast(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		look := time.NewTicker(2 * time.Second)
		defer look.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-look.C:
				if err := m.Running(); err != nil {
					cancel(err)
					return
				}
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

// freshLoad is how old a living member's load may be. Loads are told once a
// second; one from before the machine's last boot is older than this.
const freshLoad = 8 * time.Second

// alive says what keeps a machine from being a living member with a load in
// both of the head's lists; "" when nothing does.
func alive(v View, m *Machine) string {
	r, ok := v.Record(m)
	if !ok {
		return "the head has not seen it"
	}
	if r.State != api.Approved {
		return fmt.Sprintf("the head says %s", r.State)
	}
	x, ok := v.Member(m)
	switch {
	case !ok:
		return fmt.Sprintf("the head approved it as node %d, but mosmon does not show it", r.Node)
	case x.Liveness != api.Alive:
		return fmt.Sprintf("mosmon shows node %d as %s", r.Node, x.Liveness)
	case x.Load == nil:
		return fmt.Sprintf("mosmon shows no load of node %d yet", r.Node)
	case x.AgeMillis > freshLoad.Milliseconds():
		return fmt.Sprintf("mosmon's load of node %d is %.0f s old", r.Node, float64(x.AgeMillis)/1000)
	case r.Liveness != api.Alive:
		return fmt.Sprintf("node ls shows node %d as %q", r.Node, r.Liveness)
	}
	return ""
}

// Alive is the registry entry of a machine, and whether it is a living member in v.
func (v View) Alive(m *Machine) (api.NodeRecord, bool) {
	rec, _ := v.Record(m)
	return rec, alive(v, m) == ""
}

// AwaitMember waits until a machine that was switched on is a living member
// of the cluster, and returns its registry entry.
func (l *Lab) AwaitMember(ctx context.Context, m *Machine) (api.NodeRecord, error) {
	var rec api.NodeRecord
	err := l.await(ctx, m, "join", m.Name()+" is a member", func(v View) string {
		rec, _ = v.Record(m)
		return alive(v, m)
	})
	if err == nil {
		took := m.Since()
		m.mu.Lock()
		m.joined = took
		m.mu.Unlock()
		l.Say("%s: member as node %d, %.0f s after power on", m.Name(), rec.Node, took.Seconds())
	}
	return rec, err
}

// AwaitState waits until the head has put a machine into a state, such as
// Pending.
func (l *Lab) AwaitState(ctx context.Context, m *Machine, want api.NodeState) (api.NodeRecord, error) {
	var rec api.NodeRecord
	err := l.await(ctx, m, "enrol", fmt.Sprintf("%s is %s", m.Name(), want), func(v View) string {
		var ok bool
		if rec, ok = v.Record(m); !ok {
			return "the head has not seen it"
		}
		if rec.State != want || m.Stage() < Enrolling {
			return fmt.Sprintf("the head says %s", rec.State)
		}
		return ""
	})
	if err == nil {
		l.Say("%s: %s", m.Name(), want)
	}
	return rec, err
}

// await waits for a booting machine, from its first packet on.
func (l *Lab) await(ctx context.Context, m *Machine, op, what string, missing func(View) string) error {
	defer m.settled()
	defer l.save()
	ctx, cancel := context.WithTimeoutCause(ctx, l.limits.join, fmt.Errorf("not after %.0f s", l.limits.join.Seconds()))
	defer cancel()
	ctx, stop := m.failFast(ctx)
	defer stop()
	if err := m.awaitFirstPacket(ctx); err != nil {
		return m.explain(op, err)
	}
	if err := l.Until(ctx, what, func(v View) (string, error) { return missing(v), nil }); err != nil {
		return m.explain(op, err)
	}
	return nil
}

// AwaitLiveness waits until the cluster believes a member to be in one of
// some states. A member that mosmon no longer lists counts as Dead.
func (l *Lab) AwaitLiveness(ctx context.Context, m *Machine, want ...api.Liveness) error {
	return l.Until(ctx, fmt.Sprintf("%s is %v", m.Name(), want), func(v View) (string, error) {
		r, ok := v.Record(m)
		if !ok {
			return "", fmt.Errorf("the head forgot %s", m.Name())
		}
		x, ok := v.Member(m)
		got := x.Liveness
		if !ok {
			got = api.Dead
		}
		for _, w := range want {
			if got == w && r.Liveness == w {
				return "", nil
			}
		}
		return fmt.Sprintf("mosmon says %s, node ls says %q", got, r.Liveness), nil
	})
}

// Never watches the cluster for d and fails as soon as bad finds something.
func (l *Lab) Never(ctx context.Context, d time.Duration, what string, bad func(View) string) error {
	looks := 0
	for end := time.Now().Add(d); time.Now().Before(end) || looks < 2; {
		v, err := l.watch.next(ctx)
		if err != nil {
			return fmt.Errorf("watch that never %s: %w", what, err)
		}
		if v.Err != nil {
			continue
		}
		looks++
		if text := bad(v); text != "" {
			return fmt.Errorf("%s, which must never happen: %s", what, text)
		}
	}
	return nil
}
