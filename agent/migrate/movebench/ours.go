package movebench

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"mosimg/agent/capsule/cgroup"
	"mosimg/agent/capsule/control"
	"mosimg/agent/migrate"
	"mosimg/agent/pages"
	"mosimg/internal/api"
	"mosimg/internal/identity"
)

// cluster is two nodes in this process, the first of which is the home.
type cluster struct {
	b       *Bench
	dir     string
	ca      *identity.CA
	addr    map[api.NodeID]string
	key     map[api.NodeID]identity.Key
	cert    map[api.NodeID]*x509.Certificate
	node    map[api.NodeID]*migrate.Node
	home    *migrate.Home
	decided time.Time // when the home decided for the move: both copies stand still
	closers []func()
}

// sameTree is the root of both nodes' capsules: they are one machine.
type sameTree struct{}

func (sameTree) Open(context.Context, api.NodeID, migrate.JobID, uint64) (control.Root, error) {
	return control.Root{Dir: "/"}, nil
}
func (sameTree) Sync(context.Context, api.NodeID, migrate.JobID, uint64) error  { return nil }
func (sameTree) Close(context.Context, api.NodeID, migrate.JobID, uint64) error { return nil }

func (b *Bench) newCluster(ctx context.Context) (*cluster, error) {
	dir, err := os.MkdirTemp(b.dir, "ours-")
	if err != nil {
		return nil, err
	}
	c := &cluster{
		b: b, dir: dir, addr: map[api.NodeID]string{}, key: map[api.NodeID]identity.Key{},
		cert: map[api.NodeID]*x509.Certificate{}, node: map[api.NodeID]*migrate.Node{},
	}
	c.closers = append(c.closers, func() { os.RemoveAll(dir) })
	if c.ca, err = identity.NewCA("bench"); err != nil {
		return c, err
	}
	machine := migrate.Machine{Version: b.version}
	for id := api.NodeID(1); id <= 2; id++ {
		if c.key[id], err = identity.NewKey(); err != nil {
			return c, err
		}
		if c.cert[id], err = c.ca.IssueNode(c.key[id].Public(), id, net.IPv4(127, 0, 0, 1), time.Now()); err != nil {
			return c, err
		}
		own := filepath.Join(dir, strconv.Itoa(int(id)))
		c.node[id], err = migrate.OpenNode(migrate.NodeConfig{
			Self: id, Dir: own, Cgroup: filepath.Join(b.group, filepath.Base(dir), strconv.Itoa(int(id))), RootJobs: true,
			CRIU:    func() control.CRIU { return b.criu },
			Pages:   func() pages.Protocol { return pages.ProtocolOf(b.version) },
			Machine: func() migrate.Machine { return machine },
			Roots:   sameTree{},
			Dial:    func(ctx context.Context, to api.NodeID) (net.Conn, error) { return c.dial(ctx, id, to) },
			Judge:   judge{c},
		})
		if err != nil {
			return c, err
		}
	}
	journal, err := migrate.OpenJournal[migrate.Record](filepath.Join(dir, "home"))
	if err != nil {
		return c, err
	}
	c.home, err = migrate.NewHome(migrate.HomeConfig{Self: 1, Journal: journal, Trace: func(_ migrate.JobID, s migrate.Step) {
		if s == migrate.StepCommit {
			c.decided = time.Now()
		}
	}, Peer: func(id api.NodeID) migrate.Peer {
		if id == 1 {
			return c.node[1]
		}
		return migrate.Client{Node: id, Dial: func(ctx context.Context, to api.NodeID) (net.Conn, error) { return c.dial(ctx, 1, to) }}
	}})
	if err != nil {
		return c, err
	}
	for id := range c.node {
		if err := c.listen(ctx, id); err != nil {
			return c, err
		}
	}
	return c, nil
}

func (c *cluster) close() {
	for _, f := range slices.Backward(c.closers) {
		f()
	}
}

func (c *cluster) source(id api.NodeID) identity.Source {
	return func() (*tls.Certificate, error) {
		return identity.TLSCertificate(c.cert[id], c.ca.Cert, c.key[id]), nil
	}
}

func (c *cluster) listen(ctx context.Context, id api.NodeID) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	c.addr[id] = l.Addr().String()
	tl := tls.NewListener(l, identity.ServerConfig(c.source(id), c.ca.Cert, nobodyRevoked, false))
	server := migrate.Server{Node: c.node[id], Home: c.home, Log: slog.New(slog.DiscardHandler)}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := tl.Accept()
			if err != nil {
				return
			}
			go func() {
				tc := conn.(*tls.Conn)
				if tc.HandshakeContext(ctx) != nil {
					_ = tc.Close()
					return
				}
				from, err := identity.NodeOf(tc.ConnectionState().PeerCertificates[0])
				if err != nil {
					_ = tc.Close()
					return
				}
				server.Serve(ctx, tc, from)
			}()
		}
	})
	c.closers = append(c.closers, func() { l.Close(); wg.Wait() })
	return nil
}

func nobodyRevoked(string) bool { return false }

func (c *cluster) dial(ctx context.Context, from, to api.NodeID) (net.Conn, error) {
	d := tls.Dialer{Config: identity.ClientToNode(c.source(from), c.ca.Cert, to, nobodyRevoked)}
	return d.DialContext(ctx, "tcp", c.addr[to])
}

// judge is the home, for both.
type judge struct{ c *cluster }

func (j judge) Unlocked(ctx context.Context, home api.NodeID, job migrate.JobID, p migrate.Placement) error {
	return j.c.home.Unlocked(ctx, home, job, p)
}

func (j judge) Ended(ctx context.Context, home api.NodeID, job migrate.JobID, p migrate.Placement, end migrate.End) error {
	return j.c.home.Ended(ctx, home, job, p, end)
}

func (j judge) Ask(ctx context.Context, home api.NodeID, job migrate.JobID, p migrate.Placement) (migrate.Verdict, uint64, error) {
	return j.c.home.Ask(ctx, home, job, p)
}

// Ours moves a process from one node to another by the commit protocol.
func (b *Bench) Ours(ctx context.Context, size int64) (r Result, err error) {
	c, err := b.newCluster(ctx)
	if c != nil {
		defer c.close()
	}
	if err != nil {
		return r, err
	}
	const job = migrate.JobID("bench")
	if err := c.home.Start(ctx, job, 1, control.Spec{Argv: []string{b.exe, Verb, strconv.FormatInt(size, 10)}, Dir: "/"}); err != nil {
		return r, err
	}
	defer func() {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, c.end(rctx, job))
	}()
	out := filepath.Join(c.dir, "out")
	if err := c.follow(ctx, job, 1, out, "ready"); err != nil {
		return r, err
	}
	began := time.Now()
	if err := c.home.Move(ctx, job, 2); err != nil {
		return r, err
	}
	r.Total = time.Since(began)
	if err := c.follow(ctx, job, 2, out, ""); err != nil {
		return r, err
	}
	r.Downtime, _, err = pauseAt(out, c.decided)
	return r, err
}

// follow appends the job's output to a file until a line has come, or, with no
// line given, the pause of the move.
func (c *cluster) follow(ctx context.Context, job migrate.JobID, at api.NodeID, name, line string) error {
	cp, err := c.node[at].Capsule(job, uint64(at)) // epoch 1 is at node 1, 2 at node 2
	if err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	o, err := cp.Output(ctx, control.Stdout, uint64(fi.Size()))
	if err != nil {
		return err
	}
	defer func() { _ = o.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = o.Close() })
	defer stop()
	for buf := make([]byte, 4096); ; {
		n, err := o.Read(buf)
		if err != nil {
			return fmt.Errorf("output of the process: %w", err)
		}
		if _, err := f.Write(buf[:n]); err != nil {
			return err
		}
		done := false
		if line != "" {
			done, err = hasLine(name, line)
		} else {
			_, done, err = pauseAt(name, c.decided)
		}
		if done || err != nil {
			return err
		}
	}
}

// end removes the job and what held it.
func (c *cluster) end(ctx context.Context, job migrate.JobID) error {
	var errs []error
	for id, n := range c.node {
		for epoch := uint64(1); epoch <= 2; epoch++ {
			errs = append(errs, n.Discard(ctx, migrate.Order{Job: job, Home: 1, Epoch: epoch}))
		}
		errs = append(errs, cgroup.Remove(ctx, filepath.Join(c.b.group, filepath.Base(c.dir), strconv.Itoa(int(id)))))
	}
	return errors.Join(append(errs, cgroup.Remove(ctx, filepath.Join(c.b.group, filepath.Base(c.dir))))...)
}
