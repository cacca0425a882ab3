// Package swrk speaks to CRIU through its RPC: a `criu swrk FD` process on the
// other end of a socket pair, one dump or restore per process, with the
// message types of go-criu.
//
// go-criu's own client is not used: it answers the pre-resume notify, which
// the commit protocol hangs on, by itself, loses descriptors that come with a
// message, and cannot hand descriptors over. This client does not start the
// process either: in a capsule that is the business of its process 1, which
// reaps all children.
package swrk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"mosimg/internal/fault"
)

// Args are the arguments with which CRIU is run as a worker on descriptor fd.
// Configuration files are off: they would be read from the root that CRIU
// sees, which in a capsule is the job owner's.
func Args(fd int) []string {
	return []string{"swrk", fmt.Sprint(fd), "--no-default-config"}
}

// Conn is a connection to one worker. It is for one goroutine.
type Conn struct{ c *net.UnixConn }

// Pair makes a connection and the socket for the worker's end, which the
// caller passes on and closes.
func Pair() (*Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "swrk"), os.NewFile(uintptr(fds[1]), "swrk")
	c, err := net.FileConn(ours) // takes a duplicate
	ours.Close()
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return &Conn{c: c.(*net.UnixConn)}, theirs, nil
}

// Close hangs up. A worker in the middle of a dump then fails and lets the
// processes run on.
func (c *Conn) Close() error { return c.c.Close() }

// Stage is a point of a dump or restore at which CRIU waits for us
// (criu/action-scripts.c).
type Stage string

const (
	PreDump         Stage = "pre-dump"         // nothing is stopped yet
	PostDump        Stage = "post-dump"        // all is written, the tree is stopped and about to be killed
	SetupNamespaces Stage = "setup-namespaces" // the root task is there, and has no child yet
	PostRestore     Stage = "post-restore"
	PreResume       Stage = "pre-resume" // all tasks are there and stopped
	PostResume      Stage = "post-resume"
)

// Notify is CRIU's word that a stage is reached.
type Notify struct {
	Stage Stage
	Pid   int // the root task, where CRIU knows it, in CRIU's pid namespace
}

// ErrFailed is CRIU's answer that a request failed. Its log says why.
var ErrFailed = errors.New("criu failed")

// maxMessage bounds what a worker may send; its largest messages are some
// hundred bytes.
const maxMessage = 64 << 10

// grace is how long a worker may take to answer what was refused, before it
// is taken for hung.
const grace = 5 * time.Second

// Do sends a request and returns the answer. At each stage it calls on, and
// an error of on makes CRIU give up; Do then returns that error. A post-dump
// or pre-resume error that CRIU ignores is returned all the same. The end of
// ctx breaks the connection, and CRIU gives up.
func (c *Conn) Do(ctx context.Context, req *rpc.CriuReq, on func(context.Context, Notify) error) (*rpc.CriuResp, error) {
	stop := context.AfterFunc(ctx, func() { c.c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := c.send(req); err != nil {
		return nil, cause(ctx, err)
	}
	var refused error
	for {
		resp, err := c.receive()
		if err != nil {
			return nil, errors.Join(refused, cause(ctx, fmt.Errorf("%s: %w", req.GetType(), fault.HungUp("criu", err))))
		}
		if resp.GetType() == rpc.CriuReqType_NOTIFY {
			err := on(ctx, Notify{Stage: Stage(resp.GetNotify().GetScript()), Pid: int(resp.GetNotify().GetPid())})
			if err != nil && refused == nil {
				refused = err
				if stop() { // what follows is clean-up, to be given time even when ctx ends
					c.c.SetDeadline(time.Now().Add(grace))
				}
			}
			answer := &rpc.CriuReq{Type: rpc.CriuReqType_NOTIFY.Enum(), NotifySuccess: proto.Bool(err == nil)}
			if err := c.send(answer); err != nil {
				return nil, errors.Join(refused, cause(ctx, err))
			}
			continue
		}
		switch {
		case refused != nil:
			return nil, refused
		case !resp.GetSuccess():
			return nil, failure(req, resp)
		}
		return resp, nil
	}
}

func failure(req *rpc.CriuReq, resp *rpc.CriuResp) error {
	err := fmt.Errorf("%s: %w", req.GetType(), ErrFailed)
	if why := Explain(resp.GetCrErrmsg()); why != "" {
		err = fmt.Errorf("%w: %s", err, why)
	}
	if no := resp.GetCrErrno(); no != 0 {
		return fmt.Errorf("%w: %w", err, unix.Errno(no))
	}
	return err
}

func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (c *Conn) send(req *rpc.CriuReq) error {
	data, err := proto.Marshal(req)
	if err != nil {
		return err
	}
	_, err = c.c.Write(data)
	return err
}

func (c *Conn) receive() (*rpc.CriuResp, error) {
	buf := make([]byte, maxMessage)
	oob := make([]byte, unix.CmsgSpace(4*16))
	n, oobn, flags, _, err := c.c.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, err
	}
	closeAll(oob[:oobn])
	if flags&unix.MSG_TRUNC != 0 {
		return nil, errors.New("message too long")
	}
	if n == 0 {
		return nil, io.EOF
	}
	resp := new(rpc.CriuResp)
	if err := proto.Unmarshal(buf[:n], resp); err != nil {
		return nil, err
	}
	return resp, nil
}

// closeAll closes descriptors that came with a message: we ask for none.
func closeAll(oob []byte) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.Close(fd) //nolint:errcheck // nobody to tell
		}
	}
}
