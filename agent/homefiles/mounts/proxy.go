package mounts

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"

	"mosimg/agent/homefiles/direct"
	"mosimg/agent/homefiles/rootsock"
	"mosimg/internal/api"
	"mosimg/internal/upgrade"
)

// introduction is the line with which a mount asks for its home, and the one with
// which it is answered before it is handed the connection.
type introduction struct {
	Home api.NodeID `json:",omitempty"`
	Key  direct.Key // who asks, or answers
}

// Listen opens the socket of Introduce, for root only, in place of one that an
// earlier agent has left.
func Listen(path string) (net.Listener, error) { return rootsock.Listen(path) }

// Introduce connects mounts with their homes until ctx ends: dial opens a stream
// to the agent of a home that is authenticated and encrypted. A connection that
// was made goes on without this process.
func Introduce(ctx context.Context, l net.Listener, dial func(context.Context, api.NodeID) (net.Conn, error), log *slog.Logger) error {
	return rootsock.Serve(ctx, l, log, func(ctx context.Context, c net.Conn, r introduction) {
		defer c.Close()
		if err := introduce(ctx, c, r, dial); err != nil {
			log.Debug("home files", "home", r.Home, "err", err) // the mount tries again
		}
	})
}

func introduce(ctx context.Context, c net.Conn, r introduction, dial func(context.Context, api.NodeID) (net.Conn, error)) error {
	stream, err := dial(ctx, r.Home)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { upgrade.HangUp(stream) }) //nolint:errcheck // nobody is left to tell
	defer stop()
	key, bare, err := direct.Ask(stream, r.Key)
	if err == nil {
		err = json.NewEncoder(c).Encode(introduction{Key: key})
	}
	if err == nil {
		err = rootsock.Hand(c, bare)
	}
	if err != nil {
		upgrade.HangUp(stream) //nolint:errcheck // the first error is the cause
		return err
	}
	return bare.Close() // the mount has it
}

// dialHome is the mount's part.
func dialHome(ctx context.Context, socket string, home api.NodeID, self *direct.Identity) (net.Conn, error) {
	agent, err := rootsock.Dial(ctx, socket, introduction{Home: home, Key: self.Key})
	if err != nil {
		return nil, err
	}
	defer agent.Close()
	stop := rootsock.Bound(ctx, agent)
	defer stop()
	var peer introduction
	if err := rootsock.ReadLine(agent, &peer); err != nil {
		return nil, err
	}
	raw, err := rootsock.Take(agent)
	if err != nil {
		return nil, err
	}
	return self.Client(ctx, raw, peer.Key)
}
