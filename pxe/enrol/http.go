package enrol

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"mosimg/internal/api"
	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

const (
	// maxBody is far above an inventory of 64 NICs and far below what would
	// hurt when a thousand strangers send it.
	maxBody = 64 << 10
	// bodyTime is how long a client may take to send its request. It is not
	// http.Server.ReadTimeout, which would also end long polls.
	bodyTime = 10 * time.Second
	// maxInFlight bounds the requests held at once, long polls included.
	maxInFlight = 4096
)

// Handler is the head API.
func (s *Service) Handler() http.Handler {
	s.init()
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+api.PathEnrol, s.serveEnrol)
	mux.HandleFunc("POST "+api.PathRenew, s.serveRenew)
	mux.HandleFunc("GET "+api.PathCluster, s.serveCluster)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		unixhttp.Fail(w, fault.New(fault.NotFound, "serve", r.Method+" "+printable(r.URL.Path), "no such call in the head API", ""))
	})
	slots := make(chan struct{}, maxInFlight)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			unixhttp.Fail(w, fault.New(fault.Unavailable, "serve", r.URL.Path, "too many requests at once", "try again"))
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		mux.ServeHTTP(w, r)
	})
}

// readBody decodes a request in bounded time.
func readBody(w http.ResponseWriter, r *http.Request, v any) error {
	rc := http.NewResponseController(w)
	rc.SetReadDeadline(time.Now().Add(bodyTime))
	defer rc.SetReadDeadline(time.Time{})
	return unixhttp.ReadJSON(w, r, v)
}

func (s *Service) serveEnrol(w http.ResponseWriter, r *http.Request) {
	from := source(r)
	if !s.limits.Allow(from.String(), s.now()) {
		unixhttp.Fail(w, fault.New(fault.Unavailable, "enrol", from.String(), "too many requests from this address", "wait some seconds"))
		return
	}
	var req api.EnrolRequest
	if err := readBody(w, r, &req); err != nil {
		unixhttp.Fail(w, err)
		return
	}
	reply, err := s.Enrol(r.Context(), &req, from)
	s.finish(w, r, reply, err)
}

func (s *Service) serveRenew(w http.ResponseWriter, r *http.Request) {
	var req api.RenewRequest
	if err := readBody(w, r, &req); err != nil {
		unixhttp.Fail(w, err)
		return
	}
	reply, err := s.Renew(peer(r), &req)
	s.finish(w, r, reply, err)
}

func (s *Service) serveCluster(w http.ResponseWriter, r *http.Request) {
	have, err := uint64(0), error(nil)
	wait := time.Duration(0)
	if q := r.URL.Query().Get("have"); q != "" {
		wait = maxWait
		if have, err = strconv.ParseUint(q, 10, 64); err != nil {
			unixhttp.Fail(w, fault.New(fault.Usage, "read cluster view", "", "?have= wants a generation number", ""))
			return
		}
	}
	view, err := s.Cluster(r.Context(), peer(r), have, wait)
	s.finish(w, r, view, err)
}

func (s *Service) finish(w http.ResponseWriter, r *http.Request, reply any, err error) {
	if err != nil {
		if k := fault.KindOf(err); k == fault.Internal || k == fault.Environment {
			s.log().Error("head api", "path", r.URL.Path, "address", source(r), "error", err.Error())
		}
		unixhttp.Fail(w, err)
		return
	}
	unixhttp.Reply(w, reply)
}

// peer is the client's certificate, which the handshake verified, or nil.
func peer(r *http.Request) *x509.Certificate {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil
	}
	return r.TLS.PeerCertificates[0]
}

func source(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}

// NewHTTPServer is the net/http server around Handler. Long polls end when
// ctx does.
func (s *Service) NewHTTPServer(ctx context.Context) *http.Server {
	return &http.Server{
		Handler:           s.Handler(),
		TLSConfig:         s.TLS(),
		ReadHeaderTimeout: 10 * time.Second, // also bounds the TLS handshake
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.log().Handler(), slog.LevelDebug),
	}
}
