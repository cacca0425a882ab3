package keeper

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/home"
	"mosimg/agent/homefiles/process"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// Verb is the first argument that makes a program which calls Main the keeper;
// the second is the socket.
const Verb = "homefiles-keeper"

// Main is the keeper's process, started by Client.
func Main(ctx context.Context, socket string, log *slog.Logger) error {
	l, err := Listen(socket)
	process.Ready(err)
	if err != nil {
		return err
	}
	return Run(ctx, l, log)
}

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

// dial connects to the keeper; nobody there is a fault of kind NotFound.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.conf.Socket)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, fault.New(fault.NotFound, "ask", "the keeper of home files", "it does not run", "")
	}
	return conn, err
}

// connect is dial that starts the keeper.
func (c *Client) connect(ctx context.Context) (net.Conn, error) {
	conn, err := c.dial(ctx)
	if fault.KindOf(err) != fault.NotFound || err == nil {
		return conn, err
	}
	c.starting.Lock()
	defer c.starting.Unlock()
	if conn, err := c.dial(ctx); err == nil {
		return conn, nil
	}
	id, err := process.Start(c.conf.LogFile, Verb, c.conf.Socket)
	if err != nil {
		return nil, fault.New(fault.Environment, "start", "the keeper of home files", err, "")
	}
	c.log.Info("keeper of home files started", "pid", id.PID)
	return c.dial(ctx)
}

// ask asks the keeper; start says whether one is to be started if there is none.
// Without one, nothing is served, and there is nothing to change.
func (c *Client) ask(ctx context.Context, r request, start bool) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	connect := c.dial
	if start {
		connect = c.connect
	}
	conn, err := connect(ctx)
	if err != nil {
		if !start && fault.KindOf(err) == fault.NotFound {
			return nil, nil
		}
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var a reply
	if err = json.NewEncoder(conn).Encode(r); err == nil {
		a, err = readReply(conn)
	}
	if err != nil {
		return nil, fault.New(fault.Unavailable, string(r.Op), "home files of job "+r.Job, err, "")
	}
	return a.Locks, a.Error.Err()
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
	}, true)
	return err
}

// Sync implements migrate.Files.
func (c *Client) Sync(ctx context.Context, job migrate.JobID) error {
	_, err := c.ask(ctx, request{Op: opSync, Job: string(job)}, false)
	return err
}

// Locks implements migrate.Files.
func (c *Client) Locks(ctx context.Context, job migrate.JobID) ([]string, error) {
	return c.ask(ctx, request{Op: opLocks, Job: string(job)}, false)
}

// Commit implements migrate.Files.
func (c *Client) Commit(ctx context.Context, job migrate.JobID, next migrate.Placement, pids map[uint32]uint32) error {
	_, err := c.ask(ctx, request{Op: opCommit, Job: string(job), Epoch: next.Epoch, Node: next.Node, Pids: pids}, false)
	return err
}

// Reclaim implements migrate.Files.
func (c *Client) Reclaim(ctx context.Context, job migrate.JobID, now migrate.Placement) error {
	_, err := c.ask(ctx, request{Op: opReclaim, Job: string(job), Epoch: now.Epoch, Node: now.Node}, false)
	return err
}

// Settle implements migrate.Files.
func (c *Client) Settle(ctx context.Context, job migrate.JobID) error {
	_, err := c.ask(ctx, request{Op: opSettle, Job: string(job)}, false)
	return err
}

// Abort implements migrate.Files.
func (c *Client) Abort(ctx context.Context, job migrate.JobID, next migrate.Placement) error {
	_, err := c.ask(ctx, request{Op: opAbort, Job: string(job), Epoch: next.Epoch}, false)
	return err
}

// Remove implements migrate.Files.
func (c *Client) Remove(ctx context.Context, job migrate.JobID) error {
	_, err := c.ask(ctx, request{Op: opRemove, Job: string(job)}, false)
	return err
}

// Session opens a session of home files for a node that was authenticated. A
// keeper that has died is followed by a new one, which knows nothing of the
// files: it is to say so to the guest, which would wait for the old one otherwise.
func (c *Client) Session(ctx context.Context, node api.NodeID) (net.Conn, error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := json.NewEncoder(conn).Encode(request{Session: node}); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}
