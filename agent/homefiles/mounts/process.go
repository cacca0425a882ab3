package mounts

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"time"

	"mosimg/agent/homefiles/direct"
	"mosimg/agent/homefiles/forward"
	"mosimg/agent/homefiles/process"
	"mosimg/agent/homefiles/rootsock"
	"mosimg/internal/api"
	"mosimg/internal/urgent"
)

// Verb is the first argument that makes a program which calls Main the process
// of one mount; the second is its configuration.
const Verb = "homefiles-mount"

// forwardConfig is what such a process is told.
type forwardConfig struct {
	Dir     string // the mount's folder
	Capsule string
	Epoch   uint64
	Home    api.NodeID
	Socket  string // of the agent's Introduce
	Lease   time.Duration
}

// Main is the process of one mount.
func Main(ctx context.Context, config string, log *slog.Logger) error {
	if err := urgent.Raise(); err != nil {
		log.Warn("a job's files are no more urgent than the job", "why", err)
	}
	var conf forwardConfig
	err := json.Unmarshal([]byte(config), &conf)
	m := mount(conf.Dir)
	if err == nil {
		err = m.record()
	}
	var self *direct.Identity
	if err == nil {
		self, err = direct.New()
	}
	var l net.Listener
	if err == nil {
		l, err = rootsock.Listen(m.path(socketName))
	}
	process.Ready(err)
	if err != nil {
		return err
	}
	s := &state{dir: m, log: log, ready: make(chan struct{}), over: make(chan struct{})}
	cfg := forward.Config{
		Capsule: conf.Capsule, Epoch: conf.Epoch, Mountpoint: m.path(mountName), Lease: conf.Lease, Log: log,
		Ready:   func() { close(s.ready) },
		Failed:  s.end,
		Control: func(c forward.Control) { s.forward = c },
		Dial: func(ctx context.Context) (net.Conn, error) {
			return dialHome(ctx, conf.Socket, conf.Home, self)
		},
	}
	answering, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	go func() {
		if err := rootsock.Serve(answering, l, log, s.answer); err != nil {
			log.Error("the agent cannot ask any more", "err", err)
		}
	}()
	err = forward.Run(ctx, cfg)
	s.end(err)
	return err
}
