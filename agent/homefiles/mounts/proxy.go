package mounts

import (
	"context"
	"log/slog"
	"net"

	"mosimg/agent/homefiles/rootsock"
	"mosimg/internal/api"
	"mosimg/internal/upgrade"
)

// proxyRequest is the line with which a mount asks for its home.
type proxyRequest struct{ Home api.NodeID }

// Listen opens the socket of Proxy, for root only, in place of one that an earlier
// agent has left.
func Listen(path string) (net.Listener, error) { return rootsock.Listen(path) }

// Proxy connects mounts with their homes until ctx ends: dial makes a connection
// to a home that is authenticated and encrypted.
func Proxy(ctx context.Context, l net.Listener, dial func(context.Context, api.NodeID) (net.Conn, error), log *slog.Logger) error {
	return rootsock.Serve(ctx, l, log, func(ctx context.Context, c net.Conn, r proxyRequest) {
		defer c.Close()
		home, err := dial(ctx, r.Home)
		if err != nil {
			log.Debug("home files", "home", r.Home, "err", err) // the mount tries again
			return
		}
		stop := context.AfterFunc(ctx, func() { home.Close(); c.Close() })
		defer stop()
		upgrade.Splice(c, home)
	})
}
