package labport

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"sync"
	"time"

	"mosimg/internal/fault"
)

var (
	// ErrRestarted is why an operation ends when the guest reboots under it.
	ErrRestarted = errors.New("the machine restarted")
	// ErrClosed is why an operation ends when the client is closed.
	ErrClosed = errors.New("the lab port was closed")
)

const (
	// helloEvery is how often an unanswered hello is sent again. A hello
	// may be lost in a guest that reboots; its ready line may be too.
	helloEvery = 5 * time.Second
	// redialEvery is the pause before a lost socket is dialled again.
	redialEvery = 300 * time.Millisecond
	// killGrace is how long a cancelled operation waits for the guest's word
	// that the command is gone.
	killGrace = 3 * time.Second
)

// Client is the host's end of a port. Its methods may be used concurrently.
type Client struct {
	socket string
	log    *slog.Logger
	stop   context.CancelFunc
	done   chan struct{}

	helloMu sync.Mutex // orders hellos; taken before mu

	mu      sync.Mutex    // guards the following
	link    *link         // nil while there is none
	changed chan struct{} // closed and renewed when link changes or becomes ready
	nextID  int64
}

// link is one session with one boot of the guest.
type link struct {
	wire    *wire
	session string
	ready   bool
	ops     map[int64]*clientOp // guarded by Client.mu
}

// clientOp is one operation that waits for its end.
type clientOp struct {
	ctx    context.Context // ends when the operation does, with the cause
	cancel context.CancelCauseFunc
	in     *stream
	out    chan message // out, err and exit messages; has room for two windows
}

// Dial makes a client for the port behind a unix socket. It returns at once;
// the machine need not run yet, and may restart: the client finds it again.
func Dial(socket string, log *slog.Logger) *Client {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &Client{socket: socket, log: log, stop: stop, done: make(chan struct{}), changed: make(chan struct{})}
	go c.run(ctx)
	return c
}

// Close ends the client and every operation that is under way.
func (c *Client) Close() error {
	c.stop()
	<-c.done
	return nil
}

// run keeps a connection to the socket.
func (c *Client) run(ctx context.Context) {
	defer close(c.done)
	for ctx.Err() == nil {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", c.socket)
		if err == nil {
			c.converse(ctx, conn)
		}
		select {
		case <-ctx.Done():
		case <-time.After(redialEvery):
		}
	}
}

// converse speaks on one connection until it ends.
func (c *Client) converse(ctx context.Context, conn net.Conn) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	w := &wire{w: conn}
	c.hello(w)
	ended := make(chan struct{})
	var again sync.WaitGroup
	again.Go(func() {
		t := time.NewTicker(helloEvery)
		defer t.Stop()
		for {
			select {
			case <-ended:
				return
			case <-t.C:
				c.repeatHello(w)
			}
		}
	})
	err := readLines(conn, func(m message) { c.take(w, m) })
	c.log.Debug("lab port: connection ended", "error", err)
	close(ended)
	again.Wait()
	cause := ErrRestarted
	if ctx.Err() != nil {
		cause = ErrClosed
	}
	c.replace(nil, cause)
}

// hello begins a session on w; operations of the last one end.
func (c *Client) hello(w *wire) {
	l := &link{wire: w, session: rand.Text(), ops: make(map[int64]*clientOp)}
	c.replace(l, ErrRestarted)
	go c.sendHello(l)
}

// sendHello sends a link's hello unless the link is no longer the current one.
// Hellos are sent one at a time: were an old one to overtake the current
// link's, the guest would end that link's first operations.
func (c *Client) sendHello(l *link) {
	c.helloMu.Lock()
	defer c.helloMu.Unlock()
	c.mu.Lock()
	needed := c.link == l && !l.ready
	c.mu.Unlock()
	if needed && l.wire.resync() == nil {
		l.wire.send(message{Op: opHello, Session: l.session, Version: protocolVersion})
	}
}

func (c *Client) repeatHello(w *wire) {
	c.mu.Lock()
	l := c.link
	c.mu.Unlock()
	if l != nil && l.wire == w {
		c.sendHello(l)
	}
}

// replace makes l the current link and ends the operations of the old one.
func (c *Client) replace(l *link, cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != nil {
		for _, op := range c.link.ops {
			op.cancel(cause)
		}
	}
	c.link = l
	c.notify()
}

// notify wakes whoever waits for the link; c.mu is held.
func (c *Client) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *Client) take(w *wire, m message) {
	if m.Op == opReady {
		c.hello(w)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	l := c.link
	if l == nil {
		return
	}
	if m.Op == opHello {
		if m.Session == l.session && !l.ready {
			if m.Version != protocolVersion {
				c.log.Warn("lab port: other protocol version", "ours", protocolVersion, "theirs", m.Version)
			}
			l.ready = true
			c.notify()
		}
		return
	}
	op := l.ops[m.ID]
	if !l.ready || op == nil {
		return // of an older session
	}
	switch m.Op {
	case opAck:
		op.in.acked()
	case opOut, opErr, opExit:
		select {
		case op.out <- m:
		default:
			op.cancel(errors.New("the machine sent data beyond the window"))
		}
	}
}

// Ready waits until the machine answers.
func (c *Client) Ready(ctx context.Context) error {
	_, err := c.ready(ctx)
	return err
}

func (c *Client) ready(ctx context.Context) (*link, error) {
	for {
		c.mu.Lock()
		l, changed := c.link, c.changed
		ok := l != nil && l.ready
		c.mu.Unlock()
		if ok {
			return l, nil
		}
		select {
		case <-changed:
		case <-c.done:
			return nil, ErrClosed
		case <-ctx.Done():
			return nil, fault.New(fault.Unavailable, "reach the machine over", c.socket, fmt.Errorf("it does not answer: %w", context.Cause(ctx)), "")
		}
	}
}

// Run implements Machine. It waits for the machine, within ctx.
func (c *Client) Run(ctx context.Context, cmd Cmd) (Exit, error) {
	if len(cmd.Argv) == 0 {
		return Exit{}, fault.New(fault.Usage, "run", "", "no command given", "")
	}
	end, err := c.operate(ctx, message{Op: opRun, Argv: cmd.Argv, User: cmd.User, Dir: cmd.Dir, Env: cmd.Env},
		cmd.Stdin, cmd.Stdout, cmd.Stderr)
	if err != nil {
		return Exit{}, fmt.Errorf("run %s: %w", cmd.Argv[0], err)
	}
	return Exit{Status: end.Status, Signal: end.Signal}, nil
}

// Put implements Machine.
func (c *Client) Put(ctx context.Context, path string, mode fs.FileMode, content io.Reader) error {
	_, err := c.operate(ctx, message{Op: opPut, Path: path, Mode: uint32(mode.Perm())}, content, nil, nil)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// operate runs one operation to its end.
func (c *Client) operate(ctx context.Context, first message, stdin io.Reader, stdout, stderr io.Writer) (message, error) {
	l, err := c.ready(ctx)
	if err != nil {
		return message{}, err
	}
	opCtx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	op := &clientOp{ctx: opCtx, cancel: cancel, out: make(chan message, 2*window+1)}
	c.mu.Lock()
	if c.link != l {
		c.mu.Unlock()
		return message{}, ErrRestarted
	}
	c.nextID++
	first.ID = c.nextID
	op.in = newStream(opCtx, l.wire, first.ID, opData)
	l.ops[first.ID] = op
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		delete(l.ops, first.ID)
		c.mu.Unlock()
	}()
	if err := l.wire.send(first); err != nil {
		return message{}, err
	}
	go op.feed(stdin, first.ID)

	var graceOver <-chan time.Time
	cancelled := ctx.Done()
	for {
		select {
		case m := <-op.out:
			if m.Op == opExit {
				if ctx.Err() != nil {
					return message{}, context.Cause(ctx)
				}
				if m.Error != "" {
					return message{}, errors.New(m.Error)
				}
				return m, nil
			}
			w := stdout
			if m.Op == opErr {
				w = stderr
			}
			if w != nil {
				if _, err := w.Write(m.Data); err != nil {
					l.wire.send(message{Op: opKill, ID: first.ID})
					return message{}, err
				}
			}
			l.wire.send(message{Op: opAck, ID: first.ID, Stream: m.Op})
		case <-op.ctx.Done():
			go l.wire.send(message{Op: opKill, ID: first.ID})
			return message{}, context.Cause(op.ctx)
		case <-cancelled:
			// Stay until the guest has killed it, so that nothing of a
			// cancelled command runs on while its caller thinks it ended.
			cancelled = nil
			graceOver = time.After(killGrace)
			go l.wire.send(message{Op: opKill, ID: first.ID})
		case <-graceOver:
			return message{}, context.Cause(ctx)
		}
	}
}

// feed sends stdin until it or the operation ends.
func (op *clientOp) feed(stdin io.Reader, id int64) {
	if stdin != nil {
		if _, err := io.Copy(op.in, stdin); err != nil && op.ctx.Err() == nil {
			op.cancel(fmt.Errorf("read input: %w", err))
			return
		}
	}
	if err := op.in.sendChunk(message{Op: opData, ID: id, EOF: true}); err != nil {
		op.cancel(err)
	}
}
