package swrk

import (
	"context"
	"errors"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// worker plays CRIU: it sends these notifies, and the answer that fits what
// it was told.
func worker(t *testing.T, sock *os.File, stages ...Stage) <-chan []bool {
	t.Helper()
	c, err := net.FileConn(sock)
	sock.Close()
	if err != nil {
		t.Fatal(err)
	}
	answers := make(chan []bool, 1)
	go func() {
		defer c.Close()
		var got []bool
		defer func() { answers <- got }()
		buf := make([]byte, maxMessage)
		read := func() (*rpc.CriuReq, error) {
			n, err := c.Read(buf)
			if err != nil {
				return nil, err
			}
			req := new(rpc.CriuReq)
			return req, proto.Unmarshal(buf[:n], req)
		}
		write := func(resp *rpc.CriuResp) {
			data, _ := proto.Marshal(resp)
			c.Write(data)
		}
		req, err := read()
		if err != nil {
			return
		}
		ok := true
		for _, s := range stages {
			write(&rpc.CriuResp{Type: rpc.CriuReqType_NOTIFY.Enum(), Success: proto.Bool(true), Notify: &rpc.CriuNotify{Script: proto.String(string(s)), Pid: proto.Int32(42)}})
			a, err := read()
			if err != nil {
				return
			}
			got = append(got, a.GetNotifySuccess())
			ok = ok && a.GetNotifySuccess()
		}
		resp := &rpc.CriuResp{Type: req.Type, Success: proto.Bool(ok)}
		if !ok {
			resp.CrErrmsg = proto.String("told to fail")
		}
		write(resp)
	}()
	return answers
}

func pair(t *testing.T) (*Conn, *os.File) {
	t.Helper()
	c, sock, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, sock
}

var dump = &rpc.CriuReq{Type: rpc.CriuReqType_DUMP.Enum(), Opts: &rpc.CriuOpts{ImagesDirFd: proto.Int32(3)}}

func TestNotifiesComeInOrder(t *testing.T) {
	c, sock := pair(t)
	worker(t, sock, SetupNamespaces, PreResume)
	var got []Notify
	_, err := c.Do(t.Context(), dump, func(_ context.Context, n Notify) error { got = append(got, n); return nil })
	want := []Notify{{SetupNamespaces, 42}, {PreResume, 42}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("Do = %v, notifies %v; want %v", err, got, want)
	}
}

// CRIU only logs a failed pre-resume and says success: taken at its word, a
// job that is not frozen would be committed.
func TestRefusalIsReturned(t *testing.T) {
	c, sock := pair(t)
	answers := worker(t, sock, PostDump)
	refusal := errors.New("not in the leaf")
	_, err := c.Do(t.Context(), dump, func(context.Context, Notify) error { return refusal })
	if got := <-answers; !errors.Is(err, refusal) || !slices.Equal(got, []bool{false}) {
		t.Errorf("Do = %v, answers %v; want %v and a false", err, got, refusal)
	}
}

func TestWorkerThatDies(t *testing.T) {
	c, sock := pair(t)
	sock.Close()
	if _, err := c.Do(t.Context(), dump, nil); err == nil {
		t.Error("Do with no worker = no error")
	}
}

func TestEndOfContext(t *testing.T) {
	c, sock := pair(t)
	defer sock.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Do(ctx, dump, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Do with a hung worker = %v; want %v", err, context.DeadlineExceeded)
	}
}

func TestFailureNamesTheErrno(t *testing.T) {
	err := failure(dump, &rpc.CriuResp{CrErrno: proto.Int32(int32(unix.ESRCH))})
	if !errors.Is(err, ErrFailed) || !errors.Is(err, unix.ESRCH) {
		t.Errorf("failure = %v", err)
	}
}

func TestExplain(t *testing.T) {
	for name, tt := range map[string]struct{ log, want string }{
		"none": {"(00.000000) Version: 4.1.1 (gitid 0)\n(00.1) Warn  (criu/kerndat.c:1): x\n", ""},
		"first of two": {
			"(00.003910) Error (criu/files.c:12): file of unknown kind\n(00.003917) Error (criu/cr-dump.c:2): Dumping FAILED.\n",
			"file of unknown kind"},
		"in words": {
			"(00.01) pie: 12: Error (criu/sk-unix.c:1): unix: External socket is used. Consider using --ext-unix-sk option.\n",
			"a process is connected to a unix socket outside of the job (criu: unix: External socket is used. Consider using --ext-unix-sk option.)"},
		"symptom first": {
			"(00.1)  7: Error (criu/cr-restore.c:1): 9 exited, status=1\n(00.2)  7: Error (criu/files-reg.c:1): File x has bad size 3 (expect 4)\n",
			"File x has bad size 3 (expect 4)"},
		"harmless": {
			"(00.1) Error (criu/tun.c:85): tun: Unable to create tun: No such file or directory\n(00.2) Error (criu/x.c:1): y\n", "y"},
		"only symptoms": {"(00.1) Error (criu/cr-restore.c:1): Restoring FAILED.\n", "Restoring FAILED."},
	} {
		if got := Explain(tt.log); got != tt.want {
			t.Errorf("%s: Explain = %q; want %q", name, got, tt.want)
		}
	}
}

// Only what will be otherwise the next time is worth a second dump.
func TestRaced(t *testing.T) {
	for name, tt := range map[string]struct {
		log  string
		want bool
	}{
		"no error":          {"(00.1) Warn  (criu/x.c:1): y\n", false},
		"a task that ended": {"(00.1) Error (compel/src/lib/infect.c:68): Unable to detach from 7: No such process\n(00.2) Error (criu/cr-dump.c:2): Dumping FAILED.\n", true},
		"a task that hangs": {"(10.0) Error (criu/cr-dump.c:1447): Timeout reached. Try to interrupt: 0\n(10.1) Error (compel/src/lib/infect.c:363): Unable to detach from 7: No such process\n", false},
		"a file":            {"(00.1) Error (criu/files.c:12): file of unknown kind\n(00.2) Error (criu/seize.c:275): zombie found while seizing\n", false},
	} {
		if got := Raced(tt.log); got != tt.want {
			t.Errorf("%s: Raced = %v; want %v", name, got, tt.want)
		}
	}
}

func FuzzExplain(f *testing.F) {
	f.Add("(00.1) Error (criu/x.c:1): y\n")
	f.Fuzz(func(_ *testing.T, log string) { Explain(log); Raced(log) })
}
