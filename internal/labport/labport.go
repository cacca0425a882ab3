// Package labport is the lab's way into the head's virtual machine: a
// virtio-serial port on which the host runs commands and writes files. It is
// served only when the kernel command line says mosimg.debug, because whoever
// holds the host's end is root in the guest.
//
// The port is a bare byte stream: it has no connections, it outlives a reboot
// of the guest, and either end may start in the middle of the other's line.
// So the protocol is JSON lines, and a line that does not parse is dropped:
//
//	host -> guest  hello  session            ends every operation of an older session
//	guest -> host  hello  session, version   the answer; before it the host believes nothing
//	guest -> host  ready                     the guest (re)started; the host says hello again
//	host -> guest  run    id, argv, user, dir, env
//	host -> guest  put    id, path, mode     then data, then eof
//	host -> guest  data   id, data, eof      standard input, or the content of put
//	host -> guest  kill   id, signal
//	guest -> host  out, err  id, data        standard output and error
//	guest -> host  exit   id, status, signal, error
//	both           ack    id, stream         one data, out or err message was consumed
//
// At most window messages of a stream are on their way without an ack, so one
// slow consumer never blocks the other operations on the port.
package labport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
)

// PortName is the virtio-serial port's name, as QEMU gives it and as the
// guest finds it in /sys/class/virtio-ports.
const PortName = "org.mosimg.lab.0"

const (
	protocolVersion = 1
	maxLine         = 256 << 10 // a longer line is dropped
	chunk           = 32 << 10  // bytes of a stream in one message
	window          = 8         // unacknowledged messages of one stream
	maxOps          = 256       // operations at once, against a runaway host
)

// Cmd is one command to run.
type Cmd struct {
	Argv []string
	User string   // name in /etc/passwd, "" is root
	Dir  string   // "" is the user's home, or /
	Env  []string // added to a small default environment
	// Stdin may be nil. Run stops reading it when the command ends, but a
	// Read that is under way then is not interrupted.
	Stdin          io.Reader
	Stdout, Stderr io.Writer // nil discards
}

// Exit is how a command ended.
type Exit struct {
	Status int    // exit status, or 128+N after signal N
	Signal string // name of the signal that ended it, "" otherwise
}

func (e Exit) String() string {
	if e.Signal != "" {
		return e.Signal
	}
	return fmt.Sprintf("exit status %d", e.Status)
}

// Machine is what a port gives access to: the guest itself (Local), or one
// seen through a port (Client).
type Machine interface {
	// Run runs a command to its end. When ctx ends the command and its
	// children are killed. The error tells that the command could not be
	// run or its end not be learnt; a failing command is no error.
	Run(ctx context.Context, c Cmd) (Exit, error)
	// Put writes a file: wholly, or not at all.
	Put(ctx context.Context, path string, mode fs.FileMode, content io.Reader) error
}

// Operations and streams on the wire.
const (
	opHello = "hello"
	opReady = "ready"
	opRun   = "run"
	opPut   = "put"
	opData  = "data"
	opKill  = "kill"
	opOut   = "out"
	opErr   = "err"
	opExit  = "exit"
	opAck   = "ack"
)

// message is one line, in either direction.
type message struct {
	Op      string   `json:"op"`
	Session string   `json:"session,omitempty"`
	Version int      `json:"version,omitempty"`
	ID      int64    `json:"id,omitempty"`
	Argv    []string `json:"argv,omitempty"`
	User    string   `json:"user,omitempty"`
	Dir     string   `json:"dir,omitempty"`
	Env     []string `json:"env,omitempty"`
	Path    string   `json:"path,omitempty"`
	Mode    uint32   `json:"mode,omitempty"`
	Stream  string   `json:"stream,omitempty"` // ack: opData, opOut or opErr
	Data    []byte   `json:"data,omitempty"`
	EOF     bool     `json:"eof,omitempty"`
	Status  int      `json:"status,omitempty"`
	Signal  string   `json:"signal,omitempty"`
	Error   string   `json:"error,omitempty"`
}

// parseLine reads one line; false means it is to be dropped.
func parseLine(line []byte) (message, bool) {
	var m message
	if json.Unmarshal(line, &m) != nil || m.Op == "" {
		return message{}, false
	}
	return m, true
}

// wire writes whole lines to the port.
type wire struct {
	mu sync.Mutex
	w  io.Writer
}

func (w *wire) send(m message) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err = w.w.Write(append(b, '\n'))
	return err
}

// resync ends whatever half line an earlier writer left on the port.
func (w *wire) resync() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.w.Write([]byte{'\n'})
	return err
}

// stream sends one direction of an operation's data in chunks, at most window
// of them unacknowledged.
type stream struct {
	ctx    context.Context
	wire   *wire
	id     int64
	op     string
	credit chan struct{} // one token for each message that may be sent
}

func newStream(ctx context.Context, w *wire, id int64, op string) *stream {
	s := &stream{ctx: ctx, wire: w, id: id, op: op, credit: make(chan struct{}, window)}
	for range window {
		s.credit <- struct{}{}
	}
	return s
}

// Write implements io.Writer.
func (s *stream) Write(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		m := min(len(p)-n, chunk)
		if err := s.sendChunk(message{Op: s.op, ID: s.id, Data: p[n : n+m]}); err != nil {
			return n, err
		}
		n += m
	}
	return n, nil
}

func (s *stream) sendChunk(m message) error {
	select {
	case <-s.credit:
		return s.wire.send(m)
	case <-s.ctx.Done():
		return context.Cause(s.ctx)
	}
}

// acked returns one token; more acks than messages are ignored.
func (s *stream) acked() {
	select {
	case s.credit <- struct{}{}:
	default:
	}
}

// readLines calls take for each parsed line until the reader ends. Lines that
// are too long or no message are dropped.
func readLines(r io.Reader, take func(message)) error {
	buf := make([]byte, 0, 64<<10)
	tmp := make([]byte, 32<<10)
	skip := false // inside a line that was too long
	for {
		n, err := r.Read(tmp)
		for part := tmp[:n]; len(part) > 0; {
			line, rest, ended := cutLine(part)
			part = rest
			if len(buf)+len(line) > maxLine {
				skip = true
			}
			if !skip {
				buf = append(buf, line...)
			}
			if !ended {
				break
			}
			if m, ok := parseLine(buf); ok && !skip {
				take(m)
			}
			buf, skip = buf[:0], false
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func cutLine(p []byte) (line, rest []byte, ended bool) {
	for i, c := range p {
		if c == '\n' {
			return p[:i], p[i+1:], true
		}
	}
	return p, nil, false
}

// modeOf keeps only the permission bits of a mode that came over the wire.
func modeOf(m uint32) fs.FileMode { return os.FileMode(m) & fs.ModePerm }
