package clienttest

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"mosimg/agent/jobs/wire"
	"mosimg/internal/api"
)

// outputKept is what a capsule keeps of an output stream, too.
const outputKept = 1 << 20

// Job is a job of an Agent.
type Job struct {
	ID    string
	Start api.JobStart

	t       testing.TB
	cmd     *exec.Cmd
	stdin   *os.File
	stdinMu sync.Mutex // held by whoever writes to stdin

	mu       sync.Mutex // guards the following
	cond     sync.Cond
	out      [2]stream
	taken    uint64
	end      *wire.End
	conn     net.Conn // the one that is served
	attached int
	done     bool
	signals  []wire.Signal // without their IDs
	ordered  uint64        // the highest ID
	stops    int
	conts    int
}

// stream is an output stream: what was not acknowledged of it.
type stream struct {
	pipe *os.File
	base uint64
	data []byte
	eof  bool
}

// run starts the process.
func (j *Job) run() error {
	j.cond.L = &j.mu
	path, err := lookPath(j.Start)
	if err != nil {
		return err
	}
	j.cmd = &exec.Cmd{Path: path, Args: j.Start.Argv, Env: j.Start.Env, Dir: j.Start.Dir, SysProcAttr: &syscall.SysProcAttr{Setpgid: true}}
	var theirs []*os.File
	defer func() {
		for _, f := range theirs {
			f.Close()
		}
	}()
	pipe := func() (r, w *os.File) {
		if r, w, err = os.Pipe(); err != nil {
			j.t.Fatal(err)
		}
		return r, w
	}
	in, stdin := pipe()
	out, stdout := pipe()
	errs, stderr := pipe()
	theirs = []*os.File{in, stdout, stderr}
	j.cmd.Stdin, j.cmd.Stdout, j.cmd.Stderr = in, stdout, stderr
	j.stdin, j.out[0].pipe, j.out[1].pipe = stdin, out, errs
	if err := j.cmd.Start(); err != nil {
		return err
	}
	if j.Start.NoStdin {
		j.stdin.Close()
	}
	for i := range j.out {
		go j.collect(&j.out[i])
	}
	go func() {
		_ = j.cmd.Wait() // the state says it
		ws := j.cmd.ProcessState.Sys().(syscall.WaitStatus)
		end := &wire.End{Exit: ws.ExitStatus()}
		if ws.Signaled() {
			end = &wire.End{Exit: 128 + int(ws.Signal()), Signal: int(ws.Signal())}
		}
		j.mu.Lock()
		j.end = end
		j.cond.Broadcast()
		j.mu.Unlock()
	}()
	return nil
}

// lookPath finds the program in the job's own PATH, as the agent does.
func lookPath(s api.JobStart) (string, error) {
	if strings.Contains(s.Argv[0], "/") {
		return s.Argv[0], nil
	}
	for _, kv := range s.Env {
		list, ok := strings.CutPrefix(kv, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(list) {
			if path, err := exec.LookPath(filepath.Join(dir, s.Argv[0])); err == nil {
				return path, nil
			}
		}
	}
	return "", syscall.ENOENT
}

func (j *Job) kill() {
	_ = syscall.Kill(-j.cmd.Process.Pid, syscall.SIGKILL) // it may have ended
}

// collect reads an output pipe to its end.
func (j *Job) collect(s *stream) {
	buf := make([]byte, 64<<10)
	for {
		j.mu.Lock()
		for len(s.data) >= outputKept {
			j.cond.Wait()
		}
		j.mu.Unlock()
		n, err := s.pipe.Read(buf)
		j.mu.Lock()
		s.data = append(s.data, buf[:n]...)
		s.eof = err != nil
		j.cond.Broadcast()
		j.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// fresh tells whether an order came for the first time.
func (j *Job) fresh(id uint64) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	is := id > j.ordered
	j.ordered = max(j.ordered, id)
	return is
}

// Signals are those that came, in order.
func (j *Job) Signals() []wire.Signal {
	j.mu.Lock()
	defer j.mu.Unlock()
	return append([]wire.Signal(nil), j.signals...)
}

// Stops tells how often the job was frozen and let run on.
func (j *Job) Stops() (stops, conts int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.stops, j.conts
}

// Attached tells how often a mosrun has attached.
func (j *Job) Attached() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.attached
}

// Done tells whether the end was taken.
func (j *Job) Done() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.done
}

// detach breaks the connection.
func (j *Job) detach() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.conn != nil {
		j.conn.Close()
		j.conn = nil
	}
	j.interruptStdin(time.Now())
	j.cond.Broadcast()
}

// interruptStdin ends a write to stdin at a time; the zero one is never.
func (j *Job) interruptStdin(at time.Time) {
	_ = j.stdin.SetWriteDeadline(at) // it may be closed: then nobody writes
}

// serve speaks with a mosrun.
func (j *Job) serve(conn net.Conn) {
	defer conn.Close()
	m, err := wire.Read(conn)
	if err != nil {
		return
	}
	var hello wire.Hello
	if m.Kind != wire.KindHello || m.JSON(&hello) != nil {
		j.t.Errorf("the first message is %d %q; want a hello", m.Kind, m.Body)
		return
	}
	j.detach()
	j.stdinMu.Lock() // the writer of the connection before is gone
	j.interruptStdin(time.Time{})
	j.stdinMu.Unlock()
	j.mu.Lock()
	j.conn = conn
	j.attached++
	taken := j.taken
	if hello.Stdin > taken {
		j.t.Errorf("hello knows of %d bytes of stdin; %d were taken", hello.Stdin, taken)
	}
	j.acknowledge(wire.KindStdout, hello.Stdout)
	j.acknowledge(wire.KindStderr, hello.Stderr)
	j.mu.Unlock()
	say := &speaker{conn: conn}
	// The real agent repeats what it was told, since the job's node may be away, and
	// says what it finds there later: mosrun may have sent some of it again by then.
	if say.offset(wire.KindStdinTaken, hello.Stdin) != nil || taken > hello.Stdin && say.offset(wire.KindStdinTaken, taken) != nil {
		return
	}
	var streams, all sync.WaitGroup
	streams.Go(func() { j.sendStream(conn, say, wire.KindStdout, hello.Stdout) })
	streams.Go(func() { j.sendStream(conn, say, wire.KindStderr, hello.Stderr) })
	all.Go(func() {
		streams.Wait()
		j.mu.Lock()
		for j.end == nil && j.conn == conn {
			j.cond.Wait()
		}
		end, mine := j.end, j.conn == conn
		j.mu.Unlock()
		if mine {
			_ = say.json(wire.KindEnded, end) // a broken connection is seen by hear
		}
	})
	input := make(chan wire.Message, 1024)
	all.Go(func() { j.feed(say, input) })
	j.hear(conn, say, input, hello.Stdin)
	close(input)
	j.mu.Lock()
	if j.conn == conn {
		j.conn = nil
		j.interruptStdin(time.Now())
	}
	j.cond.Broadcast()
	j.mu.Unlock()
	conn.Close()
	all.Wait()
}

// speaker writes one message at a time.
type speaker struct {
	mu   sync.Mutex
	conn net.Conn
}

func (s *speaker) plain(k wire.Kind) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return wire.Write(s.conn, k, nil)
}

func (s *speaker) offset(k wire.Kind, at uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return wire.WriteOffset(s.conn, k, at)
}

func (s *speaker) json(k wire.Kind, v any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return wire.WriteJSON(s.conn, k, v)
}

func (s *speaker) data(k wire.Kind, at uint64, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return wire.WriteData(s.conn, k, at, data)
}

// acknowledge notes what mosrun has written; mu is held.
func (j *Job) acknowledge(kind wire.Kind, at uint64) {
	s := &j.out[kind-wire.KindStdout]
	if at == wire.Closed {
		go s.pipe.Close()
		return
	}
	if at < s.base || at > s.base+uint64(len(s.data)) {
		j.t.Errorf("stream %d acknowledged to %d; it is between %d and %d", kind, at, s.base, s.base+uint64(len(s.data)))
		return
	}
	s.data = append([]byte(nil), s.data[at-s.base:]...)
	s.base = at
	j.cond.Broadcast()
}

// sendStream sends an output stream to its end or until conn is no longer served.
func (j *Job) sendStream(conn net.Conn, say *speaker, kind wire.Kind, from uint64) {
	s := &j.out[kind-wire.KindStdout]
	for {
		j.mu.Lock()
		for j.conn == conn && from == s.base+uint64(len(s.data)) && !s.eof {
			j.cond.Wait()
		}
		if j.conn != conn {
			j.mu.Unlock()
			return
		}
		data := append([]byte(nil), s.data[from-s.base:]...)
		j.mu.Unlock()
		data = data[:min(len(data), wire.MaxData)]
		if err := say.data(kind, from, data); err != nil || len(data) == 0 {
			return
		}
		from += uint64(len(data))
	}
}

// feed gives stdin to the process.
func (j *Job) feed(say *speaker, input <-chan wire.Message) {
	j.stdinMu.Lock()
	defer j.stdinMu.Unlock()
	for m := range input {
		at, data, _ := m.Data() // hear has checked it
		if len(data) == 0 {
			j.stdin.Close()
			continue
		}
		j.mu.Lock()
		skip := min(j.taken-at, uint64(len(data)))
		j.mu.Unlock()
		if data = data[skip:]; len(data) == 0 {
			continue
		}
		n, err := j.stdin.Write(data)
		if err != nil && !os.IsTimeout(err) {
			n = len(data) // the job reads no more
		}
		j.mu.Lock()
		j.taken += uint64(n)
		taken := j.taken
		j.mu.Unlock()
		if n < len(data) {
			break // detached
		}
		if say.offset(wire.KindStdinTaken, taken) != nil {
			break
		}
	}
	for range input {
	}
}

// hear takes messages until the connection breaks; next is the first byte of
// stdin that is wanted.
func (j *Job) hear(conn net.Conn, say *speaker, input chan<- wire.Message, next uint64) {
	for {
		m, err := wire.Read(conn)
		if err != nil {
			return
		}
		switch m.Kind {
		case wire.KindStdin:
			at, data, err := m.Data()
			j.mu.Lock()
			taken := j.taken
			j.mu.Unlock()
			// What the agent has said to be taken is left out once mosrun has heard it.
			if err != nil || at != next && (at < next || at > taken) || at+uint64(len(data)) > taken+wire.StdinWindow {
				j.t.Errorf("stdin at %d with %d bytes, %v; want it at %d (or up to %d) and at most %d ahead", at, len(data), err, next, taken, wire.StdinWindow)
				return
			}
			next = at + uint64(len(data))
			input <- m
		case wire.KindAck:
			stream, at, err := m.Ack()
			if err != nil || stream != wire.KindStdout && stream != wire.KindStderr {
				j.t.Errorf("ack of stream %d: %v", stream, err)
				return
			}
			j.mu.Lock()
			j.acknowledge(stream, at)
			j.mu.Unlock()
		case wire.KindSignal:
			var s wire.Signal
			if err := m.JSON(&s); err != nil {
				j.t.Error(err)
				return
			}
			if !j.fresh(s.ID) {
				continue
			}
			id := s.ID
			s.ID = 0
			j.mu.Lock()
			j.signals = append(j.signals, s)
			j.mu.Unlock()
			pid := j.cmd.Process.Pid
			if s.Group {
				pid = -pid
			}
			_ = syscall.Kill(pid, syscall.Signal(s.Number)) // it may have ended
			if say.offset(wire.KindHeard, id) != nil {
				return
			}
		case wire.KindStop:
			o, err := m.Order()
			if err != nil {
				j.t.Error(err)
				return
			}
			if !j.fresh(o.ID) {
				continue
			}
			j.mu.Lock()
			j.stops++
			j.mu.Unlock()
			_ = syscall.Kill(-j.cmd.Process.Pid, syscall.SIGSTOP)
			if say.plain(wire.KindStopped) != nil || say.offset(wire.KindHeard, o.ID) != nil {
				return
			}
		case wire.KindCont:
			o, err := m.Order()
			if err != nil {
				j.t.Error(err)
				return
			}
			if !j.fresh(o.ID) {
				continue
			}
			j.mu.Lock()
			j.conts++
			j.mu.Unlock()
			_ = syscall.Kill(-j.cmd.Process.Pid, syscall.SIGCONT)
			if say.offset(wire.KindHeard, o.ID) != nil {
				return
			}
		case wire.KindDone:
			j.mu.Lock()
			j.done = true
			ended := j.end != nil
			j.mu.Unlock()
			if !ended {
				j.t.Error("done before the job has ended")
			}
			return
		default:
			j.t.Errorf("message of kind %d from mosrun", m.Kind)
			return
		}
	}
}
