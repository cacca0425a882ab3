package migrate_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"mosimg/agent/migrate"
	"mosimg/internal/fault"
)

// keeperless is a file that says that the home's file server has died.
func (c agentConfig) keeperless() string { return filepath.Join(c.Dir, "keeperless") }

// mortalFiles is a home's file server as far as a move sees it: all trees are
// the same, but it can die, and Prepare starts another one.
type mortalFiles struct{ dead string }

func (f mortalFiles) alive() error {
	if _, err := os.Stat(f.dead); err == nil {
		return fault.New(fault.NotFound, "find", "home files", "the process that served them has died", "")
	}
	return nil
}

func (f mortalFiles) Prepare(context.Context, migrate.JobID, migrate.Placement, migrate.Placement) error {
	if err := os.Remove(f.dead); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
func (f mortalFiles) Sync(context.Context, migrate.JobID) error            { return f.alive() }
func (mortalFiles) Locks(context.Context, migrate.JobID) ([]string, error) { return nil, nil }
func (f mortalFiles) Commit(context.Context, migrate.JobID, migrate.Placement, map[uint32]uint32) error {
	return f.alive()
}
func (mortalFiles) Reclaim(context.Context, migrate.JobID, migrate.Placement) error { return nil }
func (mortalFiles) Settle(context.Context, migrate.JobID) error                     { return nil }
func (mortalFiles) Abort(context.Context, migrate.JobID, migrate.Placement) error   { return nil }
func (mortalFiles) Remove(context.Context, migrate.JobID) error                     { return nil }

// keeperDies is a fault.
func keeperDies(c *cluster) {
	if err := os.WriteFile(c.agents[1].conf.keeperless(), nil, 0o600); err != nil {
		c.t.Error(err)
	}
}

// A job that has come home has its files without a server: one that has died
// must not take back a move that is decided.
func TestHomeNeedsNoKeeper(t *testing.T) {
	c := newCluster(t, 2)
	c.start(1)
	c.agents[1].must(command{Do: "move", Job: "j", To: 2})
	c.progress()
	c.agents[1].send(command{Do: "move", Job: "j", To: 1})
	if e, ok := c.agents[1].done(func(s migrate.Step) {
		if s == migrate.StepCommit {
			keeperDies(c)
		}
	}); !ok || e.Error != "" {
		t.Errorf("move home: %q, alive %v", e.Error, ok)
	}
	c.finish(1)
}

// A copy that has run is the job, though neither that is in the home's journal nor
// its files' server is there any more: to take the job back would run it twice.
func TestDeadKeeperAfterResume(t *testing.T) {
	c := newCluster(t, 2)
	c.start(1)
	c.agents[1].must(command{Do: "move", Job: "j", To: 2})
	c.progress()
	c.agents[1].kill()
	journal, err := migrate.OpenJournal[migrate.Record](c.agents[1].conf.Journal)
	if err != nil {
		t.Fatal(err)
	}
	all, err := journal.All()
	if err != nil {
		t.Fatal(err)
	}
	// As it is when the home dies before it has noted the node's answer.
	rec := all["j"]
	rec.Running, rec.Prev = false, &migrate.Placement{Node: 1, Epoch: 1}
	if err := journal.Put("j", rec); err != nil {
		t.Fatal(err)
	}
	keeperDies(c)
	c.agents[1].start()
	c.settle()
	c.finish(2)
}
