// Package unixhttp is the small HTTP client that tools use to talk to the
// agent or the head on the same machine, over a unix socket, and the reply
// writing that both APIs share.
package unixhttp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	neturl "net/url"
	"os"
	"syscall"

	"mosimg/internal/api"
	"mosimg/internal/fault"
)

// MaxBody bounds a JSON body in either direction.
const MaxBody = 8 << 20

// Client talks JSON to one unix socket.
type Client struct {
	socket string
	who    string // "agent" or "head": for error texts
	hc     *http.Client
}

// New makes a client for a socket; who names the program behind it.
func New(socket, who string) *Client {
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	return &Client{socket: socket, who: who, hc: &http.Client{Transport: tr}}
}

// Get decodes the reply of a GET into out.
func (c *Client) Get(ctx context.Context, path string, out any) error {
	return c.do(ctx, http.MethodGet, path, nil, out)
}

// Post sends in and decodes the reply into out (nil: ignored).
func (c *Client) Post(ctx context.Context, path string, in, out any) error {
	return c.do(ctx, http.MethodPost, path, in, out)
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	err := DoJSON(ctx, c.hc, method, "http://"+c.who+path, in, out)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fault.New(fault.Unavailable, "ask the "+c.who, c.socket, "it is not running on this machine", "start it, or run this on the head")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		// What was asked may have been done, or be under way.
		return fault.New(fault.Unavailable, "ask the "+c.who, c.socket, fmt.Errorf("it ended before it had answered: %w", err), "see what became of it when it is back")
	case errors.Is(err, os.ErrPermission):
		return fault.New(fault.Refused, "ask the "+c.who, c.socket, "permission denied", "run this as root")
	}
	return err
}

// DoJSON makes one request with a JSON body (nil: none) and decodes a JSON
// reply into out. A Problem reply becomes a fault of the kind it names; a
// failure to connect one of kind Unavailable that wraps its cause.
func DoJSON(ctx context.Context, hc *http.Client, method, url string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return err
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := hc.Do(req)
	if err != nil {
		if ue := (*neturl.Error)(nil); errors.As(err, &ue) {
			err = ue.Err // it repeats the address
		}
		return fault.New(fault.Unavailable, "ask", url, err, "")
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, MaxBody))
	if err != nil {
		return fault.New(fault.Unavailable, "read the reply of", url, err, "")
	}
	if resp.StatusCode/100 != 2 {
		return problemOf(url, resp.Status, data)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fault.New(fault.Unavailable, "read the reply of", url, err, "are both sides of the same version?")
	}
	return nil
}

// ProblemOf is the fault that a reply to another kind of request reports.
func ProblemOf(resp *http.Response) error {
	data, err := io.ReadAll(io.LimitReader(resp.Body, MaxBody))
	if err != nil {
		return err
	}
	return problemOf(resp.Request.URL.Path, resp.Status, data)
}

func problemOf(url, status string, body []byte) error {
	var p api.Problem
	if json.Unmarshal(body, &p) == nil && p.Error != "" {
		return &Remote{Kind: fault.Kind(p.Kind), Text: p.Error, Errno: syscall.Errno(p.Errno)}
	}
	return fault.New(fault.Unavailable, "ask", url, "HTTP status "+status, "")
}

// Remote is a fault that the other side reported.
type Remote struct {
	Kind  fault.Kind
	Text  string
	Errno syscall.Errno // of the system call that failed there; 0 if none
}

func (r *Remote) Error() string { return r.Text }

// As lets fault.KindOf see through the wire.
func (r *Remote) As(target any) bool {
	if e, ok := target.(**fault.Error); ok {
		*e = &fault.Error{Kind: r.Kind, Op: "remote", Err: errors.New(r.Text)}
		return true
	}
	return false
}

// Reply writes v as JSON with status 200.
func Reply(w http.ResponseWriter, v any) {
	writeJSON(w, http.StatusOK, v)
}

// Fail writes err as a Problem.
func Fail(w http.ResponseWriter, err error) {
	k := fault.KindOf(err)
	var errno syscall.Errno
	errors.As(err, &errno) // stays 0 otherwise
	writeJSON(w, k.HTTPStatus(), api.Problem{Kind: int(k), Error: err.Error(), Errno: int(errno)})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// A client that hung up cannot be told so.
	_ = json.NewEncoder(w).Encode(v)
}

// ReadJSON decodes a request's body into v; errors are of kind Usage.
func ReadJSON(w http.ResponseWriter, r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, MaxBody))
	if err := d.Decode(v); err != nil {
		return fault.New(fault.Usage, "read request", r.URL.Path, fmt.Errorf("not valid JSON: %w", err), "")
	}
	return nil
}
