// Package upgrade turns an HTTP connection into a stream of another protocol
// (RFC 9110, section 7.8), on both sides. So one port with its one check of
// certificates serves questions and streams.
package upgrade

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
)

// handshakeTime bounds request and answer.
const handshakeTime = 30 * time.Second

// Dial asks for path on a connection that was just made, and returns the
// stream. On any failure the connection is closed; a refusal in the answer is
// returned as the fault that the server gave.
func Dial(ctx context.Context, conn net.Conn, path, protocol string) (_ net.Conn, err error) {
	defer func() {
		if err != nil {
			conn.Close()
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
		}
	}()
	if err := conn.SetDeadline(time.Now().Add(handshakeTime)); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	u, err := url.Parse(path)
	if err != nil {
		return nil, err
	}
	req := &http.Request{
		Method: http.MethodGet, URL: u, Host: "mosimg",
		Header: http.Header{"Connection": {"Upgrade"}, "Upgrade": {protocol}},
	}
	if err := req.Write(conn); err != nil {
		return nil, err
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		defer resp.Body.Close()
		return nil, unixhttp.ProblemOf(resp)
	}
	if got := resp.Header.Get("Upgrade"); got != protocol {
		return nil, fmt.Errorf("%s became %q; want %q", path, got, protocol)
	}
	if !stop() {
		return nil, context.Cause(ctx)
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	return withReader(conn, r), nil
}

// Wants tells whether a request asks for this protocol.
func Wants(r *http.Request, protocol string) bool { return r.Header.Get("Upgrade") == protocol }

// Accept answers a request for an upgrade and returns the stream, which is the
// caller's. If it fails it has answered.
func Accept(w http.ResponseWriter, r *http.Request, protocol string) (net.Conn, error) {
	fail := func(cause any) error {
		err := fault.New(fault.Usage, "open a stream at", r.URL.Path, cause, "is the caller of another version?")
		unixhttp.Fail(w, err)
		return err
	}
	if !Wants(r, protocol) {
		return nil, fail("the request does not ask for Upgrade: " + protocol)
	}
	h, ok := w.(http.Hijacker)
	if !ok {
		return nil, fail("this connection cannot become a stream")
	}
	conn, rw, err := h.Hijack()
	if err != nil {
		return nil, fail(err)
	}
	// The server's deadlines were for the request.
	err = conn.SetDeadline(time.Time{})
	if err == nil {
		_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", protocol)
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return withReader(conn, rw.Reader), nil
}

// withReader gives back what a reader has read too much.
func withReader(conn net.Conn, r *bufio.Reader) net.Conn {
	n := r.Buffered()
	if n == 0 {
		return conn
	}
	ahead, _ := r.Peek(n)
	return &readAhead{Conn: conn, ahead: append([]byte(nil), ahead...)}
}

// readAhead is a connection of which some bytes were read already.
type readAhead struct {
	net.Conn
	ahead []byte
}

func (c *readAhead) Read(p []byte) (int, error) {
	if len(c.ahead) == 0 {
		return c.Conn.Read(p)
	}
	n := copy(p, c.ahead)
	c.ahead = c.ahead[n:]
	return n, nil
}
