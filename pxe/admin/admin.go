// Package admin is the head's API for operators: JSON over a unix socket that
// only root can open.
package admin

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
	"mosimg/pxe/enrol"
)

// Handler is the admin API.
func Handler(s *enrol.Service) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathNodes, func(w http.ResponseWriter, r *http.Request) {
		list, err := s.List()
		reply(w, list, err)
	})
	mux.HandleFunc("POST "+api.PathNodeAct, func(w http.ResponseWriter, r *http.Request) {
		var act api.NodeAct
		if err := unixhttp.ReadJSON(w, r, &act); err != nil {
			unixhttp.Fail(w, err)
			return
		}
		rec, err := s.Act(act)
		reply(w, rec, err)
	})
	mux.HandleFunc("POST "+api.PathAdopt, func(w http.ResponseWriter, r *http.Request) {
		var a api.Adopt
		if err := unixhttp.ReadJSON(w, r, &a); err != nil {
			unixhttp.Fail(w, err)
			return
		}
		reply(w, a, s.Adopt(a))
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		unixhttp.Fail(w, fault.New(fault.NotFound, "serve", r.Method+" "+r.URL.Path, "no such call in the admin API", "are mosimg and the head of the same version?"))
	})
	return mux
}

func reply(w http.ResponseWriter, v any, err error) {
	if err != nil {
		unixhttp.Fail(w, err)
		return
	}
	unixhttp.Reply(w, v)
}

// Listen binds the socket, mode 0600. A socket that a dead head left behind
// is replaced; that of a live one is not.
func Listen(ctx context.Context, path string) (net.Listener, error) {
	bad := func(cause any, hint string) error {
		return fault.New(fault.Environment, "bind admin socket", path, cause, hint)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, bad(err, "name a folder that can be written with --run")
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		c.Close()
		return nil, bad("another head answers on it", "end that one first, or name another folder with --run")
	case errors.Is(err, syscall.ECONNREFUSED):
		if err := os.Remove(path); err != nil {
			return nil, bad(err, "")
		}
	case !errors.Is(err, os.ErrNotExist):
		return nil, bad(err, "")
	}
	// The socket must never be there with a wider mode, not for a moment.
	old := syscall.Umask(0o177)
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, bad(err, "")
	}
	return l, nil
}

// NewHTTPServer is the net/http server around Handler.
func NewHTTPServer(ctx context.Context, s *enrol.Service, log *slog.Logger) *http.Server {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &http.Server{
		Handler:           Handler(s),
		ReadHeaderTimeout: 10 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}
