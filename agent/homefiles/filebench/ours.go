package filebench

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"time"

	"mosimg/agent/homefiles/home"
	"mosimg/agent/homefiles/keeper"
	"mosimg/agent/homefiles/mounts"
	"mosimg/agent/migrate"
	"mosimg/internal/api"
	"mosimg/internal/identity"
	"mosimg/internal/slowlink"
)

// The two nodes, and the job that is at one of them and has its home at the other.
const (
	homeNode = api.NodeID(1)
	nodeHere = api.NodeID(2)
	job      = migrate.JobID("bench")
)

// ours is home files. This process is both agents, who bring mount and keeper together.
type ours struct {
	files *keeper.Client
	roots *mounts.Roots
	home  string // where the home's agent listens
	link  chan string
}

func newOurs(ctx context.Context) (*ours, error) {
	o := &ours{link: make(chan string, 1)}
	o.files = keeper.NewClient(keeper.ClientConfig{
		Socket: filepath.Join(run, "keeper.sock"), LogFile: filepath.Join(run, "keeper.log"), Self: homeNode,
		Owner: func(migrate.JobID) (home.Cred, error) { return home.Cred{}, nil },
	})
	socket := filepath.Join(run, "agent.sock")
	var err error
	if o.roots, err = mounts.New(mounts.Config{Dir: filepath.Join(run, "files"), Self: nodeHere, Socket: socket}); err != nil {
		return nil, err
	}
	ca, err := identity.NewCA("bench")
	if err != nil {
		return nil, err
	}
	atHome, err := source(ca, homeNode)
	if err != nil {
		return nil, err
	}
	here, err := source(ca, nodeHere)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { l.Close() })
	o.home = l.Addr().String()
	go o.serve(ctx, tls.NewListener(l, identity.ServerConfig(atHome, ca.Cert, nobodyRevoked, false)))
	proxy, err := mounts.Listen(socket)
	if err != nil {
		return nil, err
	}
	go mounts.Introduce(ctx, proxy, func(ctx context.Context, to api.NodeID) (net.Conn, error) { //nolint:errcheck // ends with ctx
		addr := <-o.link
		o.link <- addr
		d := tls.Dialer{Config: identity.ClientToNode(here, ca.Cert, to, nobodyRevoked)}
		return d.DialContext(ctx, "tcp", addr)
	}, slog.New(slog.DiscardHandler))
	return o, nil
}

func nobodyRevoked(string) bool { return false }

func source(ca *identity.CA, id api.NodeID) (identity.Source, error) {
	key, err := identity.NewKey()
	if err != nil {
		return nil, err
	}
	var cert *x509.Certificate
	if cert, err = ca.IssueNode(key.Public(), id, net.IPv4(127, 0, 0, 1), time.Now()); err != nil {
		return nil, err
	}
	return func() (*tls.Certificate, error) { return identity.TLSCertificate(cert, ca.Cert, key), nil }, nil
}

// serve is the home's agent.
func (o *ours) serve(ctx context.Context, l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			tc := c.(*tls.Conn)
			defer c.Close()
			if tc.HandshakeContext(ctx) != nil {
				return
			}
			node, err := identity.NodeOf(tc.ConnectionState().PeerCertificates[0])
			if err != nil {
				return
			}
			_ = o.files.Serve(ctx, tc, node) // the mount tries again
		}()
	}
}

func (o *ours) mount(ctx context.Context, link time.Duration) (string, func() error, error) {
	lctx, cut := context.WithCancel(ctx)
	addr, err := o.home, error(nil)
	if link > 0 {
		addr, err = slowlink.TCP(lctx, o.home, link)
	}
	if err != nil {
		cut()
		return "", nil, err
	}
	o.link <- addr
	unmount := func() error {
		// Also when ctx is over: a mount must not be left to walk into.
		ctx := context.WithoutCancel(ctx)
		err := errors.Join(o.roots.Close(ctx, homeNode, job, 2), o.files.Remove(ctx, job))
		<-o.link
		cut()
		return err
	}
	err = o.files.Prepare(ctx, job, migrate.Placement{Node: homeNode, Epoch: 1}, migrate.Placement{Node: nodeHere, Epoch: 2})
	if err != nil {
		return "", nil, errors.Join(err, unmount())
	}
	root, err := o.roots.Open(ctx, homeNode, job, 2)
	if err == nil {
		err = o.files.Commit(ctx, job, migrate.Placement{Node: nodeHere, Epoch: 2}, nil)
	}
	if err != nil {
		return "", nil, errors.Join(err, unmount())
	}
	return root.Dir, unmount, nil
}
