package lab

import (
	"context"
	"errors"
	"sync"
	"time"
)

// adoptTime is how long the head takes strangers in while a lab comes up.
const adoptTime = 15 * time.Minute

// BringUp starts the head and every node, and waits until all are members.
func (l *Lab) BringUp(ctx context.Context) error {
	if err := l.StartHead(ctx); err != nil {
		return err
	}
	if len(l.Nodes()) > 0 {
		if err := l.Adopt(ctx, len(l.Nodes()), adoptTime); err != nil {
			return err
		}
	}
	if err := l.JoinAll(ctx, l.Nodes()...); err != nil {
		return err
	}
	l.SetPhase(Up, nil)
	return nil
}

// JoinAll switches machines on and waits until all are members. The first
// failure ends the others' wait, and is the one that is returned.
func (l *Lab) JoinAll(ctx context.Context, machines ...*Machine) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wait sync.WaitGroup
	for _, m := range machines {
		wait.Go(func() {
			err := m.PowerOn(ctx)
			if err == nil {
				_, err = l.AwaitMember(ctx, m)
			}
			if err != nil {
				cancel(err)
			}
		})
	}
	wait.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return nil
}

// Interrupted reports whether err only says that the user gave up.
func Interrupted(err error) bool { return errors.Is(err, context.Canceled) }
