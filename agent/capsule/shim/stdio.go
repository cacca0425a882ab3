package shim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
)

// streamState is what travels of a job's stdio.
type streamState struct {
	Stdin          inState
	Stdout, Stderr outState
	Stopped        bool // the user has stopped the job
}

// inState is the state of a job's stdin.
type inState struct {
	Accepted uint64 // bytes that were taken from the home so far
	EOF      bool
	Unread   []byte // of those, the ones still in the job's pipe
	Size     int    // of the pipe; 0 means the kernel's choice
}

// outState is the state of stdout or stderr.
type outState struct {
	Base uint64 // offset of Data's first byte in the stream
	Data []byte // bytes that the home has not acknowledged
	EOF  bool   // nothing follows Data
}

// pipes are the pipes of a job's stdio. The job's ends are raw descriptors,
// because an os.File would make the description that the job shares non-blocking.
type pipes struct {
	job                   [3]int
	stdin, stdout, stderr *os.File  // our ends
	inode                 int       // stdin's pipe, by O_PATH
	numbers               [3]uint64 // inode numbers, by which CRIU knows the pipes
}

// newPipes makes the pipes, with what the job has not yet read in its stdin.
func newPipes(st streamState) (p *pipes, err error) {
	p = &pipes{job: [3]int{-1, -1, -1}, inode: -1}
	defer func() {
		if err != nil {
			p.closeJobEnds()
			p.closeOurEnds()
		}
	}()
	for i, ours := range []**os.File{&p.stdin, &p.stdout, &p.stderr} {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			return p, os.NewSyscallError("pipe2", err)
		}
		if i > 0 {
			fds[0], fds[1] = fds[1], fds[0]
		}
		p.job[i] = fds[0]
		if err := unix.SetNonblock(fds[1], true); err != nil {
			return p, err
		}
		*ours = os.NewFile(uintptr(fds[1]), [...]string{"stdin", "stdout", "stderr"}[i])
		var info unix.Stat_t
		if err := unix.Fstat(fds[0], &info); err != nil {
			return p, err
		}
		p.numbers[i] = uint64(info.Ino)
	}
	if p.inode, err = unix.Open("/proc/self/fd/"+strconv.Itoa(p.job[0]), unix.O_PATH|unix.O_CLOEXEC, 0); err != nil {
		return p, err
	}
	if st.Stdin.Size > 0 {
		if _, err := unix.FcntlInt(uintptr(p.job[0]), unix.F_SETPIPE_SZ, st.Stdin.Size); err != nil {
			return p, fmt.Errorf("make the job's stdin %d bytes large: %w", st.Stdin.Size, err)
		}
	}
	if n := len(st.Stdin.Unread); n > 0 {
		// They were in a pipe of this size, so they fit.
		if err := p.stdin.SetWriteDeadline(deadlineNow()); err != nil {
			return p, err
		}
		if _, err := p.stdin.Write(st.Stdin.Unread); err != nil {
			return p, fmt.Errorf("put %d unread bytes back into the job's stdin: %w", n, err)
		}
		if err := p.stdin.SetWriteDeadline(deadlineNone); err != nil {
			return p, err
		}
	}
	return p, nil
}

func (p *pipes) jobEnds() []uintptr {
	return []uintptr{uintptr(p.job[0]), uintptr(p.job[1]), uintptr(p.job[2])}
}

func (p *pipes) closeJobEnds() {
	for i, fd := range p.job {
		closeFD(fd)
		p.job[i] = -1
	}
}

func (p *pipes) closeOurEnds() {
	for _, f := range []*os.File{p.stdin, p.stdout, p.stderr} {
		if f != nil {
			f.Close()
		}
	}
	closeFD(p.inode)
}

// outBuffer is how much of an output stream is kept until the home has it.
// A job that writes more waits, as it would for a slow terminal.
const outBuffer = 1 << 20

// readSize is one read from a job's pipe: the kernel's usual pipe size.
const readSize = 64 << 10

// outStream is the job's stdout or stderr: what was read from the pipe and
// not acknowledged. All of it can be sent again, so neither an agent that dies
// nor a move loses or doubles a byte.
type outStream struct {
	pipe    *os.File
	changed *broadcast

	mu    sync.Mutex // guards the following, and reading from the pipe
	state outState
	user  net.Conn // who reads the stream; a new one takes it over
}

func newOutStream(pipe *os.File, st outState) *outStream {
	o := &outStream{pipe: pipe, changed: newBroadcast(), state: st}
	if st.EOF {
		pipe.Close()
	} else {
		go o.run()
	}
	return o
}

// run reads the pipe to its end.
func (o *outStream) run() {
	defer o.pipe.Close()
	rc, err := o.pipe.SyscallConn()
	if err != nil {
		o.end()
		return
	}
	for {
		o.mu.Lock()
		wait := o.changed.wait()
		full := len(o.state.Data) >= outBuffer
		o.mu.Unlock()
		if full {
			<-wait
			continue
		}
		done := false
		err := rc.Read(func(fd uintptr) bool {
			o.mu.Lock()
			defer o.mu.Unlock()
			var again bool
			again, done = o.read(int(fd))
			return !again
		})
		o.changed.wake()
		if err != nil || done {
			o.end()
			return
		}
	}
}

// read takes what the pipe has, at most readSize; mu is held.
func (o *outStream) read(fd int) (again, done bool) {
	buf := make([]byte, readSize)
	n, err := unix.Read(fd, buf)
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		return true, false
	case err != nil || n == 0:
		return false, true
	}
	o.state.Data = append(o.state.Data, buf[:n]...)
	return false, false
}

func (o *outStream) end() {
	o.mu.Lock()
	o.state.EOF = true
	o.mu.Unlock()
	o.changed.wake()
}

// drain takes what a frozen job has written, and returns the stream's state.
func (o *outStream) drain() (outState, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.state.EOF {
		rc, err := o.pipe.SyscallConn()
		if err != nil {
			return o.state, err
		}
		err = rc.Control(func(fd uintptr) {
			for {
				if again, done := o.read(int(fd)); again || done {
					return // run sees the end for itself
				}
			}
		})
		if err != nil {
			return o.state, err
		}
	}
	st := o.state
	st.Data = append([]byte(nil), st.Data...)
	// Whether a writer is left is told by CRIU's image, not by us: a job that
	// closed its output has no such descriptor, and the pipe ends there too.
	return st, nil
}

// serve sends the stream from an offset on, until its end, or until the
// connection breaks or is taken over.
func (o *outStream) serve(c net.Conn, from uint64) error {
	defer c.Close()
	o.mu.Lock()
	if from < o.state.Base || from > o.state.Base+uint64(len(o.state.Data)) {
		defer o.mu.Unlock()
		return fmt.Errorf("output stream has bytes %d to %d, asked for %d", o.state.Base, o.state.Base+uint64(len(o.state.Data)), from)
	}
	if o.user != nil {
		o.user.Close()
	}
	o.user = c
	o.mu.Unlock()
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		o.acknowledge(c)
	}()
	for {
		o.mu.Lock()
		wait := o.changed.wait()
		var data []byte
		end := false
		if skip := from - o.state.Base; from >= o.state.Base {
			data = o.state.Data[skip:]
			if len(data) > readSize {
				data = data[:readSize]
			}
			data = append([]byte(nil), data...)
			end = o.state.EOF && int(skip)+len(data) == len(o.state.Data)
		}
		o.mu.Unlock()
		if len(data) > 0 {
			if err := writeFrame(c, data); err != nil {
				return err
			}
			from += uint64(len(data))
			continue
		}
		if end {
			if err := writeFrame(c, nil); err != nil {
				return err
			}
			<-gone // the last acknowledgements
			return nil
		}
		select {
		case <-wait:
		case <-gone:
			return net.ErrClosed
		}
	}
}

// acknowledge forgets what the other side says it has, and closes our end if
// it says that nobody reads any more.
func (o *outStream) acknowledge(c net.Conn) {
	var b [8]byte
	for {
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return
		}
		offset := binary.BigEndian.Uint64(b[:])
		o.mu.Lock()
		if offset == control.Closed && o.user == c {
			o.state.EOF = true // also wherever the job moves to
			o.mu.Unlock()
			o.pipe.Close() // waits for run, which takes mu
			o.changed.wake()
			continue
		}
		if have := o.state.Base + uint64(len(o.state.Data)); offset > o.state.Base && offset <= have && o.user == c {
			o.state.Data = append([]byte(nil), o.state.Data[offset-o.state.Base:]...)
			o.state.Base = offset
		}
		o.mu.Unlock()
		o.changed.wake()
	}
}

// inStream is the job's stdin.
type inStream struct {
	mu    sync.Mutex // guards the following, and writing to the pipe
	pipe  *os.File   // nil after the end
	inode int        // O_PATH descriptor: it sees the pipe after we closed our end, and is neither reader nor writer
	state inState
	held  bool // the job is being moved: nothing may change
	user  net.Conn
}

func newInStream(p *pipes, st inState) *inStream {
	i := &inStream{pipe: p.stdin, inode: p.inode, state: st}
	i.state.Unread = nil
	if st.EOF {
		i.pipe.Close()
		i.pipe = nil
	}
	return i
}

// accepted is the offset of the first byte that is wanted, and whether the
// stream's end was taken.
func (i *inStream) accepted() (offset uint64, over bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.state.Accepted, i.state.EOF
}

// take makes c the stream's source, in place of the one before.
func (i *inStream) take(c net.Conn) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.user != nil {
		i.user.Close()
	}
	i.user = c
}

var errHeld = errors.New("the job is being moved")

// serve takes the stream from a connection.
func (i *inStream) serve(c net.Conn) error {
	defer c.Close()
	for {
		data, err := readFrame(c)
		if err != nil {
			return err
		}
		if len(data) == 0 {
			return i.end(c)
		}
		for len(data) > 0 {
			n, err := i.write(c, data)
			if err != nil {
				return err
			}
			data = data[n:]
			accepted, _ := i.accepted()
			if _, err := c.Write(binary.BigEndian.AppendUint64(nil, accepted)); err != nil {
				return err
			}
		}
	}
}

// mine tells whether c may still change the stream; mu is held.
func (i *inStream) mine(c net.Conn) error {
	if i.held {
		return errHeld
	}
	if i.user != c {
		return net.ErrClosed
	}
	return nil
}

func (i *inStream) end(c net.Conn) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.mine(c); err != nil {
		return err
	}
	i.state.EOF = true
	if i.pipe != nil {
		i.pipe.Close()
		i.pipe = nil
	}
	return nil
}

// write writes what the pipe takes, and waits until it takes something.
func (i *inStream) write(c net.Conn, data []byte) (int, error) {
	i.mu.Lock()
	pipe := i.pipe
	i.mu.Unlock()
	if pipe == nil {
		return 0, io.ErrClosedPipe
	}
	rc, err := pipe.SyscallConn()
	if err != nil {
		return 0, err
	}
	n, werr := 0, error(nil)
	err = rc.Write(func(fd uintptr) bool {
		i.mu.Lock()
		defer i.mu.Unlock()
		if werr = i.mine(c); werr != nil {
			return true
		}
		n, werr = unix.Write(int(fd), data)
		if errors.Is(werr, unix.EAGAIN) || errors.Is(werr, unix.EINTR) {
			n, werr = 0, nil
			return false
		}
		switch {
		case errors.Is(werr, unix.EPIPE): // the job reads no more: as with a shell's pipe, the rest is nobody's
			n, werr = len(data), nil
		case werr != nil:
			n = 0
		}
		i.state.Accepted += uint64(n)
		return true
	})
	return n, errors.Join(err, werr)
}

// hold stops the stream and returns its state; release lets it go on. The
// unread bytes are copied out of the pipe without being taken from it (tee), so
// an abort has nothing to put back.
func (i *inStream) hold() (inState, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.held = true
	if i.user != nil {
		i.user.Close()
		i.user = nil
	}
	st := i.state
	var err error
	st.Unread, st.Size, err = peekPipe(i.inode)
	return st, err
}

func (i *inStream) release() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.held = false
}

// peekPipe copies what is in a pipe, of which it has an O_PATH descriptor.
func peekPipe(inode int) (data []byte, size int, err error) {
	src, err := unix.Open("/proc/self/fd/"+strconv.Itoa(inode), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("look into the job's stdin: %w", err)
	}
	defer closeFD(src)
	if size, err = unix.FcntlInt(uintptr(src), unix.F_GETPIPE_SZ, 0); err != nil {
		return nil, 0, err
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, 0, err
	}
	defer closeFD(fds[0])
	defer closeFD(fds[1])
	if _, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, size); err != nil {
		return nil, 0, err
	}
	n, err := unix.Tee(src, fds[1], size, unix.SPLICE_F_NONBLOCK)
	if err == unix.EAGAIN {
		return nil, size, nil
	}
	if err != nil {
		return nil, 0, os.NewSyscallError("tee", err)
	}
	data = make([]byte, 0, n)
	for int64(len(data)) < n {
		m, err := unix.Read(fds[0], data[len(data):n])
		if err != nil {
			return nil, 0, err
		}
		data = data[:len(data)+m]
	}
	return data, size, nil
}
