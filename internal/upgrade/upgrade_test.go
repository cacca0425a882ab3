package upgrade_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"mosimg/internal/fault"
	"mosimg/internal/unixhttp"
	"mosimg/internal/upgrade"
)

// server answers with echo, and dial connects to it.
func server(t *testing.T, h http.HandlerFunc) (dial func() net.Conn) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ReadTimeout, s.Config.WriteTimeout = 50*time.Millisecond, 50*time.Millisecond
	s.Start()
	t.Cleanup(s.Close)
	return func() net.Conn {
		c, err := net.Dial("tcp", s.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
}

func echo(w http.ResponseWriter, r *http.Request) {
	conn, err := upgrade.Accept(w, r, "echo/1")
	if err != nil {
		return
	}
	defer conn.Close()
	io.Copy(conn, conn)
}

// A stream outlives the server's time limits for requests, and loses nothing.
func TestStream(t *testing.T) {
	dial := server(t, echo)
	conn, err := upgrade.Dial(t.Context(), dial(), "/echo", "echo/1")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	time.Sleep(80 * time.Millisecond)
	want := bytes.Repeat([]byte("0123456789"), 100_000)
	go func() {
		conn.Write(want)
		conn.(interface{ CloseWrite() error }).CloseWrite()
	}()
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, want) {
		t.Errorf("echo gave %d bytes, %v; want %d", len(got), err, len(want))
	}
}

// What a server says with its first packet belongs to the stream.
func TestServerSpeaksAtOnce(t *testing.T) {
	dial := server(t, func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, _ := http.NewResponseController(w).Hijack()
		defer conn.Close()
		rw.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\n\r\nhello")
		rw.Flush()
	})
	conn, err := upgrade.Dial(t.Context(), dial(), "/", "echo/1")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "hello" {
		t.Errorf("read %q, %v; want hello", got, err)
	}
}

func TestRefusals(t *testing.T) {
	dial := server(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/no":
			unixhttp.Fail(w, fault.New(fault.Refused, "open", "it", "you may not", ""))
		case "/silent":
			<-r.Context().Done()
		default:
			echo(w, r)
		}
	})
	_, err := upgrade.Dial(t.Context(), dial(), "/no", "echo/1")
	if fault.KindOf(err) != fault.Refused || !strings.Contains(err.Error(), "you may not") {
		t.Errorf("refused: %v", err)
	}
	if _, err := upgrade.Dial(t.Context(), dial(), "/", "echo/2"); fault.KindOf(err) != fault.Usage {
		t.Errorf("other protocol: %v; want a fault of kind Usage", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := upgrade.Dial(ctx, dial(), "/silent", "echo/1"); err == nil || ctx.Err() == nil {
		t.Errorf("silent server: %v; want the context's end", err)
	}
}
