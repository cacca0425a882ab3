// Package agentapi serves the agent's part of the control API: to members
// over mutual TLS, and to every local user over a unix socket. What it tells
// itself comes from a Source; others add their handlers.
package agentapi

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/identity"
	"mosimg/internal/unixhttp"
	"mosimg/internal/upgrade"
)

// Limits of one connection: nobody may hold one by being slow.
const (
	headerTimeout = 5 * time.Second
	requestLimit  = 30 * time.Second
	idleTimeout   = 2 * time.Minute
	maxHeader     = 16 << 10
)

// Source is the agent, as the API sees it. Its methods are called concurrently.
type Source interface {
	Status() api.AgentStatus
	Members() api.MemberTable
}

// Caller is who sent a request.
type Caller struct {
	// Local is set for the unix socket; UID, GID and PID are then what the
	// kernel says of the process that connected.
	Local         bool
	UID, GID, PID int
	// Groups are its supplementary groups.
	Groups []uint32
	// Node is the member that called over TLS.
	Node api.NodeID
}

func (c Caller) String() string {
	if c.Local {
		return fmt.Sprintf("uid %d pid %d", c.UID, c.PID)
	}
	return fmt.Sprintf("node %d", c.Node)
}

type (
	callerKey struct{}
	connKey   struct{}
)

// CallerOf is who sent the request with this context.
func CallerOf(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}

// Server serves the API on any number of listeners.
type Server struct {
	src Source
	log *slog.Logger

	// more are the handlers that others have added.
	more map[string]http.Handler

	mu sync.Mutex // guards the following
	// conns holds the open connections of members, those too that became streams.
	conns   map[net.Conn]struct{}
	revoked identity.Revocation // as CloseRevoked was last told; nil is none
}

// New makes a server; a nil log is silent.
func New(src Source, log *slog.Logger) *Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Server{src: src, log: log, more: make(map[string]http.Handler), conns: make(map[net.Conn]struct{})}
}

// Handle adds a handler for a pattern of http.ServeMux, before anything is
// served. It is called for members and for local users: see CallerOf.
func (s *Server) Handle(pattern string, h http.Handler) { s.more[pattern] = h }

// Stream makes a request's connection a stream of another protocol. release
// must be called when the stream is over. A stream of a node whose certificate
// becomes void is closed. If it fails it has answered.
func (s *Server) Stream(w http.ResponseWriter, r *http.Request, protocol string) (conn net.Conn, release func(), err error) {
	conn, err = upgrade.Accept(w, r, protocol)
	if err != nil {
		return nil, nil, err
	}
	raw, ok := r.Context().Value(connKey{}).(net.Conn)
	if !ok {
		return conn, func() { conn.Close() }, nil
	}
	s.mu.Lock()
	s.conns[raw] = struct{}{}
	revoked := s.revoked
	s.mu.Unlock()
	if revoked != nil && r.TLS != nil && revoked(identity.Serial(r.TLS.PeerCertificates[0])) {
		conn.Close() // since the request came
	}
	return conn, func() {
		s.mu.Lock()
		delete(s.conns, raw)
		s.mu.Unlock()
		conn.Close()
	}, nil
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathStatus, func(w http.ResponseWriter, _ *http.Request) { unixhttp.Reply(w, s.src.Status()) })
	mux.HandleFunc("GET "+api.PathMembers, func(w http.ResponseWriter, _ *http.Request) { unixhttp.Reply(w, s.src.Members()) })
	for pattern, h := range s.more {
		mux.Handle(pattern, h)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		unixhttp.Fail(w, fault.New(fault.NotFound, r.Method, r.URL.Path, "this agent does not know that", "is the caller of another version?"))
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, unixhttp.MaxBody)
		if r.TLS != nil {
			// The handshake has checked the certificate; here it only names the caller.
			node, err := identity.NodeOf(r.TLS.PeerCertificates[0])
			if err != nil {
				unixhttp.Fail(w, fault.New(fault.Refused, "call", "agent", err, "only nodes of the cluster may call"))
				return
			}
			r = r.WithContext(context.WithValue(r.Context(), callerKey{}, Caller{Node: node}))
		}
		s.log.Debug("request", "method", r.Method, "path", r.URL.Path, "from", CallerOf(r.Context()))
		mux.ServeHTTP(w, r)
	})
}

func (s *Server) httpServer() *http.Server {
	return &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestLimit,
		WriteTimeout:      requestLimit,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          log.New(errorLog{s.log}, "", 0),
	}
}

// errorLog takes net/http's complaints about single connections.
type errorLog struct{ to *slog.Logger }

func (l errorLog) Write(p []byte) (int, error) {
	if bytes.HasPrefix(p, []byte("http: panic serving")) {
		l.to.Error("a fault in this program", "at", string(p))
	} else {
		l.to.Debug("connection refused", "why", string(p))
	}
	return len(p), nil
}

// ListenUnix opens the socket for local users. A socket that a dead agent
// left is replaced; one that answers is not.
func ListenUnix(path string) (net.Listener, error) {
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fault.New(fault.Environment, "listen on", path, "another agent answers there", "stop it first")
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Environment, "listen on", path, err, "")
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fault.New(fault.Environment, "listen on", path, err, "run this as root")
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, fault.New(fault.Environment, "open for all users", path, err, "")
	}
	return l, nil
}

// ServeUnix serves local users until ctx ends.
func (s *Server) ServeUnix(ctx context.Context, l net.Listener) error {
	srv := s.httpServer()
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		who, err := peerOf(c)
		if err != nil {
			s.log.Warn("local caller not known", "why", err)
			who = Caller{Local: true, UID: -1, GID: -1, PID: -1}
		}
		return context.WithValue(ctx, callerKey{}, who)
	}
	return serve(ctx, srv, l)
}

func peerOf(c net.Conn) (Caller, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return Caller{}, fmt.Errorf("connection is a %T", c)
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return Caller{}, err
	}
	var cred *unix.Ucred
	var groups []uint32
	cerr := raw.Control(func(fd uintptr) {
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			groups, err = peerGroups(fd)
		}
	})
	if err = errors.Join(cerr, err); err != nil {
		return Caller{}, err
	}
	return Caller{Local: true, UID: int(cred.Uid), GID: int(cred.Gid), PID: int(cred.Pid), Groups: groups}, nil
}

// ServeTLS serves members until ctx ends. The configuration comes from
// identity.ServerConfig and asks for a certificate.
func (s *Server) ServeTLS(ctx context.Context, l net.Listener, cfg *tls.Config) error {
	srv := s.httpServer()
	srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(ctx, connKey{}, c)
	}
	srv.ConnState = func(c net.Conn, st http.ConnState) {
		s.mu.Lock()
		defer s.mu.Unlock()
		switch st {
		case http.StateNew:
			s.conns[c] = struct{}{}
		case http.StateClosed, http.StateHijacked:
			delete(s.conns, c)
		}
	}
	return serve(ctx, srv, tls.NewListener(l, cfg))
}

// CloseRevoked closes the open connections of members whose certificate is
// void: the handshake's check came too early for them.
func (s *Server) CloseRevoked(revoked identity.Revocation) {
	s.mu.Lock()
	s.revoked = revoked
	conns := make([]net.Conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		tc, ok := c.(*tls.Conn)
		if !ok {
			continue
		}
		// ConnectionState waits for a handshake that is under way, and that
		// one checks the new list by itself.
		go func() {
			if peers := tc.ConnectionState().PeerCertificates; len(peers) > 0 && revoked(identity.Serial(peers[0])) {
				s.log.Info("connection of a revoked node closed", "from", c.RemoteAddr())
				upgrade.HangUp(tc) //nolint:errcheck // another process may have it, too; its end is all that matters
			}
		}()
	}
}

func serve(ctx context.Context, srv *http.Server, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() {
		// Long polls and idle clients must not hold up the agent's end.
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		if srv.Shutdown(sctx) != nil {
			srv.Close()
		}
	})
	defer stop()
	err := srv.Serve(l)
	if errors.Is(err, http.ErrServerClosed) || ctx.Err() != nil {
		return nil
	}
	return err
}
