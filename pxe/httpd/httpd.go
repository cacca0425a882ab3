// Package httpd is the head's plain HTTP server for booting machines:
//
//	GET /i/SHA256/NAME   a file of an image set by its hash: immutable
//	GET /boot/NAME       a boot loader of the current set, for UEFI HTTP boot
//	GET /ipxe/MAC        the iPXE script of one machine
//
// Nothing here is secret but the boot nonce in a script, which is given only
// to the address that leases to that MAC.
package httpd

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path"
	"strings"
	"time"

	"mosimg/internal/fault"
	"mosimg/internal/imageset"
	"mosimg/pxe/images"
	"mosimg/pxe/limit"
	"mosimg/pxe/trace"
)

// ScriptFunc makes the script of a machine that asks from an address. A fault
// becomes the reply, with the status of its kind.
type ScriptFunc func(ctx context.Context, mac string, from netip.Addr) (string, error)

// Server serves boot files and scripts.
type Server struct {
	Images *images.Store
	Script ScriptFunc
	// MAC names the machine at an address, for the boot trace; "" if unknown.
	MAC func(netip.Addr) string
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log may be nil.
	Log *slog.Logger
}

// Handler is the server's routes.
func (s *Server) Handler() http.Handler {
	// A machine fetches one script in a boot and one more for each failed
	// download; every script costs a nonce and an fsync.
	scripts := limit.New(1, 10, 4096)
	now := s.Now
	if now == nil {
		now = time.Now
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /i/{sha}/{name}", s.file)
	mux.HandleFunc("GET /boot/{name}", s.loader)
	mux.HandleFunc("GET /ipxe/{mac}", func(w http.ResponseWriter, r *http.Request) {
		if !scripts.Allow(clientAddr(r).String(), now()) {
			refuse(w, http.StatusTooManyRequests, "too many requests from this address, try again in a second")
			return
		}
		s.script(w, r)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			refuse(w, http.StatusMethodNotAllowed, "only GET and HEAD are served here")
			return
		}
		refuse(w, http.StatusNotFound, "nothing is served at this path; see /i/SHA256/NAME, /boot/NAME, /ipxe/MAC")
	})
	return mux
}

func (s *Server) file(w http.ResponseWriter, r *http.Request) {
	sha, name := r.PathValue("sha"), r.PathValue("name")
	f := s.Images.ByHash(sha, name)
	if f == nil {
		refuse(w, http.StatusNotFound, "no image set here has a file "+clip(name)+" with this hash; was a new image published? Boot again")
		return
	}
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	s.serve(w, r, f)
}

func (s *Server) loader(w http.ResponseWriter, r *http.Request) {
	f := s.Images.Loader(r.PathValue("name"))
	if f == nil {
		refuse(w, http.StatusNotFound, "the image set has no boot loader "+clip(r.PathValue("name")))
		return
	}
	w.Header().Set("Cache-Control", "no-cache")
	s.serve(w, r, f)
}

// stages maps file names to the stage of the boot that fetches them.
var stages = map[string]trace.Stage{imageset.Kernel: trace.Kernel, imageset.Initramfs: trace.Initramfs}

func (s *Server) serve(w http.ResponseWriter, r *http.Request, f *images.File) {
	h := w.Header()
	// Go's table does not know .efi, and UEFI HTTP boot goes by the type.
	typ := "application/octet-stream"
	if path.Ext(f.Name) == ".efi" {
		typ = "application/efi"
	}
	h.Set("Content-Type", typ)
	h.Set("ETag", `"`+f.SHA256+`"`)
	// A file and not a reader of one: the kernel sends it from its page
	// cache, without a copy in this process (sendfile).
	body, err := f.Open()
	if err != nil {
		s.log().Error("http: open file of the image set", "file", f.Name, "error", err.Error())
		refuse(w, http.StatusInternalServerError, "internal fault; see the head's log")
		return
	}
	defer body.Close()
	cw := &countingWriter{ResponseWriter: w}
	start := time.Now()
	// No modification time: the hash in the ETag is the better validator,
	// and reproducible builds share their times.
	http.ServeContent(cw, r, path.Base(f.Name), time.Time{}, body)
	if r.Method != http.MethodGet || cw.n == 0 {
		return
	}
	from := clientAddr(r)
	took := time.Since(start).Round(time.Millisecond)
	if r.Context().Err() != nil || cw.err != nil {
		s.log().Warn("http: transfer broken off", "mac", s.mac(from), "address", from, "file", f.Name, "bytes", cw.n, "of", f.Size, "took", took)
		return
	}
	if !f.Intact() {
		s.log().Error("http: somebody wrote into a file while it was being sent: this machine has a broken image", "mac", s.mac(from), "address", from, "file", f.Name)
	}
	stage, ok := stages[f.Name]
	if !ok {
		stage = trace.Loader
	}
	trace.Event(s.Log, stage, s.mac(from), "address", from, "file", f.Name, "bytes", cw.n, "took", took)
}

func (s *Server) script(w http.ResponseWriter, r *http.Request) {
	from := clientAddr(r)
	mac, err := net.ParseMAC(r.PathValue("mac"))
	if err != nil || len(mac) != 6 {
		refuse(w, http.StatusNotFound, "/ipxe/ wants an Ethernet address such as 52:54:00:00:00:01, not "+clip(r.PathValue("mac")))
		return
	}
	if r.Method == http.MethodHead {
		// Asking whether there is a script must not cost a nonce.
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		return
	}
	text, err := s.Script(r.Context(), mac.String(), from)
	if err != nil {
		s.log().Warn("http: no script", "mac", mac.String(), "address", from, "error", err.Error())
		msg := err.Error()
		if k := fault.KindOf(err); k != fault.Refused && k != fault.NotFound && k != fault.Unavailable {
			msg = "internal fault; see the head's log"
		}
		refuse(w, fault.KindOf(err).HTTPStatus(), msg)
		return
	}
	trace.Event(s.Log, trace.Script, mac.String(), "address", from)
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	http.ServeContent(w, r, "", time.Time{}, strings.NewReader(text))
}

func (s *Server) mac(a netip.Addr) string {
	if s.MAC == nil {
		return ""
	}
	return s.MAC(a)
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}

// refuse replies with a reason that a person at a booting machine can read.
func refuse(w http.ResponseWriter, status int, reason string) {
	w.Header().Set("Cache-Control", "no-store")
	http.Error(w, "mosimg: "+reason, status)
}

// clip quotes text of the client's for a reply.
func clip(s string) string {
	const most = 64
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}

func clientAddr(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}

// NewHTTPServer is the net/http server around Handler. Reads are bounded in
// time; writes are not, since a download over 10 Mbit/s takes what it takes.
func (s *Server) NewHTTPServer(ctx context.Context) *http.Server {
	return &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(s.log().Handler(), slog.LevelDebug),
	}
}

// countingWriter remembers how much of the body was written.
type countingWriter struct {
	http.ResponseWriter
	n   int64
	err error
}

func (c *countingWriter) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.n += int64(n)
	c.err = errors.Join(c.err, err)
	return n, err
}

// ReadFrom is what sendfile needs: net/http's own writer does the work.
func (c *countingWriter) ReadFrom(r io.Reader) (int64, error) {
	n, err := io.Copy(c.ResponseWriter, r)
	c.n += n
	c.err = errors.Join(c.err, err)
	return n, err
}

func (c *countingWriter) Unwrap() http.ResponseWriter { return c.ResponseWriter }
