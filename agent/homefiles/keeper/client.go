package keeper

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"mosimg/agent/homefiles/direct"
	"mosimg/agent/homefiles/home"
	"mosimg/agent/homefiles/process"
	"mosimg/agent/homefiles/rootsock"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/upgrade"
)

// ClientConfig is what a Client needs.
type ClientConfig struct {
	Socket  string // of the keeper
	LogFile string // its messages
	Self    api.NodeID
	// Owner is as whom a job acts.
	Owner func(migrate.JobID) (home.Cred, error)
	Log   *slog.Logger // nil is silent
}

// Client is the agent's side: migrate.Files. It starts the keeper when there is
// none.
type Client struct {
	conf ClientConfig
	log  *slog.Logger

	starting sync.Mutex
}

// NewClient makes a client; it asks nothing yet.
func NewClient(conf ClientConfig) *Client {
	c := &Client{conf: conf, log: conf.Log}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	return c
}

// askTime bounds a question to a process on this machine; Sync may wait for a disk.
const askTime = 20 * time.Second

// dial connects to the keeper and sends the first line; start says whether
// the keeper is to be started if there is none.
func (c *Client) dial(ctx context.Context, first request, start bool) (net.Conn, error) {
	conn, err := rootsock.Dial(ctx, c.conf.Socket, first)
	if !start || !errors.Is(err, rootsock.ErrNobody) {
		return conn, err
	}
	c.starting.Lock()
	defer c.starting.Unlock()
	if conn, err := rootsock.Dial(ctx, c.conf.Socket, first); err == nil {
		return conn, nil
	}
	id, err := process.Start(c.conf.LogFile, Verb, c.conf.Socket)
	if err != nil {
		return nil, fault.New(fault.Environment, "start", "the keeper of home files", err, "")
	}
	c.log.Info("keeper of home files started", "pid", id.PID)
	return rootsock.Dial(ctx, c.conf.Socket, first)
}

// ask asks the keeper. Only Prepare starts one; without it nothing is served,
// and there is nothing to change.
func (c *Client) ask(ctx context.Context, r request) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	a, err := c.askOnce(ctx, r)
	for again := retries; r.Op == opPrepare && again > 0 && (err != nil || a.Ending); again-- {
		// That keeper has ended meanwhile, or is about to.
		select {
		case <-ctx.Done():
		case <-time.After(retryPause):
		}
		a, err = c.askOnce(ctx, r)
	}
	switch {
	case errors.Is(err, rootsock.ErrNobody) && r.Op.needsJob():
		return nil, lost(r)
	case errors.Is(err, rootsock.ErrNobody) && r.Op != opPrepare:
		return nil, nil
	case err == nil && a.Ending:
		err = errors.New("it ends")
	}
	if err != nil {
		return nil, fault.New(fault.Unavailable, string(r.Op), "home files of job "+r.Job, fault.HungUp("the process that serves them", err), "")
	}
	return a.Locks, a.Error.Err()
}

// A keeper that is ending is given retries × retryPause.
const (
	retries    = 10
	retryPause = 50 * time.Millisecond
)

func (c *Client) askOnce(ctx context.Context, r request) (a reply, err error) {
	conn, err := c.dial(ctx, r, r.Op == opPrepare)
	if err != nil {
		return a, err
	}
	defer conn.Close()
	stop := rootsock.Bound(ctx, conn)
	defer stop()
	err = rootsock.ReadLine(conn, &a)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return a, err
}

// Prepare implements migrate.Files.
func (c *Client) Prepare(ctx context.Context, job migrate.JobID, owner, next migrate.Placement) error {
	cred, err := c.conf.Owner(job)
	if err != nil {
		return err
	}
	_, err = c.ask(ctx, request{
		Op: opPrepare, Job: string(job), Epoch: next.Epoch, Node: next.Node,
		Cred: &cred, OwnerEpoch: owner.Epoch, OwnerNode: owner.Node,
	})
	return err
}

// Sync implements migrate.Files.
func (c *Client) Sync(ctx context.Context, job migrate.JobID) error {
	_, err := c.ask(ctx, request{Op: opSync, Job: string(job)})
	return err
}

// Locks implements migrate.Files.
func (c *Client) Locks(ctx context.Context, job migrate.JobID) ([]string, error) {
	return c.ask(ctx, request{Op: opLocks, Job: string(job)})
}

// Commit implements migrate.Files.
func (c *Client) Commit(ctx context.Context, job migrate.JobID, next migrate.Placement, pids map[uint32]uint32) error {
	_, err := c.ask(ctx, request{Op: opCommit, Job: string(job), Epoch: next.Epoch, Node: next.Node, Pids: pids})
	return err
}

// Reclaim implements migrate.Files.
func (c *Client) Reclaim(ctx context.Context, job migrate.JobID, now migrate.Placement) error {
	_, err := c.ask(ctx, request{Op: opReclaim, Job: string(job), Epoch: now.Epoch, Node: now.Node})
	return err
}

// Settle implements migrate.Files.
func (c *Client) Settle(ctx context.Context, job migrate.JobID) error {
	_, err := c.ask(ctx, request{Op: opSettle, Job: string(job)})
	return err
}

// Abort implements migrate.Files.
func (c *Client) Abort(ctx context.Context, job migrate.JobID, next migrate.Placement) error {
	_, err := c.ask(ctx, request{Op: opAbort, Job: string(job), Epoch: next.Epoch})
	return err
}

// Remove implements migrate.Files.
func (c *Client) Remove(ctx context.Context, job migrate.JobID) error {
	_, err := c.ask(ctx, request{Op: opRemove, Job: string(job)})
	return err
}

// Serve joins a stream, whose node was authenticated, with the keeper and returns
// when their session's connection has ended; the end of ctx ends it. It starts a
// keeper too: one that was killed has lost all open files, and guests are told so
// at once by the next instead of waiting for it. The stream stays the caller's,
// who must not use it but to hang up.
func (c *Client) Serve(ctx context.Context, stream net.Conn, node api.NodeID) error {
	var keeper net.Conn
	bare, err := direct.Answer(stream, func(mount direct.Key) (direct.Key, error) {
		var err error
		if keeper, err = c.dial(ctx, request{Session: node, Key: mount}, true); err != nil {
			return "", err
		}
		stop := rootsock.Bound(ctx, keeper)
		defer stop()
		var r reply
		err = rootsock.ReadLine(keeper, &r)
		return r.Key, err
	})
	if keeper != nil {
		defer keeper.Close()
	}
	if err == nil {
		err = rootsock.Hand(keeper, bare)
	}
	if err != nil {
		return fault.New(fault.Unavailable, "open a session of home files for", fmt.Sprintf("node %d", node), fault.HungUp("the process that serves them", err), "")
	}
	// A keeper that was killed does not close what we have, too.
	defer upgrade.HangUp(bare) //nolint:errcheck // it is over
	stop := rootsock.Bound(ctx, keeper)
	defer stop()
	_, _ = keeper.Read(make([]byte, 1)) // nothing comes but the end
	return nil
}
