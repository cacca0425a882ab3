package unixhttp

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"mosimg/internal/fault"
)

func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return New(sock, "head")
}

func TestFaultsKeepTheirKindAcrossTheWire(t *testing.T) {
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		Fail(w, fault.New(fault.NotFound, "approve", "node 9", "no such node", "see: mosimg node ls"))
	})
	err := c.Get(context.Background(), "/", nil)
	if got := fault.ExitStatus(err); got != int(fault.NotFound) {
		t.Errorf("exit status = %d; want %d", got, fault.NotFound)
	}
	if want := "approve node 9: no such node (see: mosimg node ls)"; err == nil || err.Error() != want {
		t.Errorf("error = %v; want %q", err, want)
	}
}

func TestNobodyHomeIsSaidPlainly(t *testing.T) {
	err := New(filepath.Join(t.TempDir(), "none"), "agent").Get(context.Background(), "/", nil)
	if err == nil || !strings.Contains(err.Error(), "it is not running on this machine") || fault.KindOf(err) != fault.Unavailable {
		t.Errorf("error = %v; want one that says that the agent is not running", err)
	}
}

func TestRoundTrip(t *testing.T) {
	type msg struct{ Text string }
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		var in msg
		if err := ReadJSON(w, r, &in); err != nil {
			Fail(w, err)
			return
		}
		Reply(w, msg{in.Text + "!"})
	})
	var out msg
	if err := c.Post(context.Background(), "/", msg{"hello"}, &out); err != nil || out.Text != "hello!" {
		t.Errorf("Post = %v, %v", out, err)
	}
	if err := c.Post(context.Background(), "/", "not an object", &out); fault.KindOf(err) != fault.Usage {
		t.Errorf("wrong body: %v; want a Usage fault", err)
	}
}
