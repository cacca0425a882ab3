package client

import (
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/agent/jobs/wire"
)

// backgroundPoll is how often a mosrun in the background looks whether its
// terminal has become its own. The shell tells nobody about that.
const backgroundPoll = 200 * time.Millisecond

// input is stdin on its way to the job. What was read and not taken by the job
// is kept, at most wire.StdinWindow, to be sent again.
type input struct {
	fd   int // -1: empty from the start
	told func()

	mu      sync.Mutex // guards the following
	cond    sync.Cond  // signalled when there is room, and at the end
	kept    []byte     // bytes [taken, taken+len(kept)) of the stream
	taken   uint64     // the job has all before it
	sent    uint64     // the agent was sent all before it; >= taken
	eof     bool       // nothing follows kept
	eofSent bool
	stopped bool

	wakeRead, wakeWrite *os.File // a pipe: closing the write end ends a wait for stdin
}

func newInput(fd int, told func()) (*input, error) {
	i := &input{fd: fd, told: told, eof: fd < 0}
	i.cond.L = &i.mu
	var err error
	i.wakeRead, i.wakeWrite, err = os.Pipe()
	return i, err
}

// run reads stdin until its end or until stop.
func (i *input) run() {
	defer i.wakeRead.Close()
	if i.fd < 0 {
		return
	}
	wake := int32(i.wakeRead.Fd())
	for {
		room := i.room()
		if room == 0 {
			return // stopped
		}
		// read could stop or block this process for good, so it is called
		// only when there is something for us.
		fds := []unix.PollFd{{Fd: int32(i.fd), Events: unix.POLLIN}, {Fd: wake, Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err == unix.EINTR {
			continue
		}
		if fds[1].Revents != 0 {
			return
		}
		if background(i.fd) {
			if !i.rest(wake) {
				return
			}
			continue
		}
		buf := make([]byte, room)
		n, err := unix.Read(i.fd, buf)
		switch {
		case err == unix.EINTR || err == unix.EAGAIN:
			continue
		case err == unix.EIO && background(i.fd):
			continue // sent there between our look and the read
		case err != nil || n <= 0:
			// A stdin that cannot be read (a directory, a terminal that hung up) is an empty
			// one: nothing else can be told to the job by a pipe.
			i.end()
			return
		}
		i.add(buf[:n])
	}
}

// background tells whether fd is the terminal of a session in which another
// process group has the foreground. Reading would then be answered with SIGTTIN.
func background(fd int) bool {
	front, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err == nil && front != unix.Getpgrp()
}

// rest waits a moment; it returns false when stopped.
func (i *input) rest(wake int32) bool {
	fds := []unix.PollFd{{Fd: wake, Events: unix.POLLIN}}
	n, _ := unix.Poll(fds, int(backgroundPoll.Milliseconds()))
	return n <= 0
}

// room waits for room and returns how much to read at most; 0 when stopped.
func (i *input) room() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	for len(i.kept) >= wire.StdinWindow && !i.stopped {
		i.cond.Wait()
	}
	if i.stopped {
		return 0
	}
	return min(wire.MaxData, wire.StdinWindow-len(i.kept))
}

func (i *input) add(data []byte) {
	i.mu.Lock()
	i.kept = append(i.kept, data...)
	i.mu.Unlock()
	i.told()
}

func (i *input) end() {
	i.mu.Lock()
	i.eof = true
	i.mu.Unlock()
	i.told()
}

// take notes that the job has all bytes before offset.
func (i *input) take(offset uint64) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	end := i.taken + uint64(len(i.kept))
	if offset < i.taken || offset > end {
		return fmt.Errorf("the agent has taken stdin up to byte %d; it was given %d and had %d of them", offset, end, i.taken)
	}
	i.kept = append(i.kept[:0], i.kept[offset-i.taken:]...)
	i.taken = offset
	i.sent = max(i.sent, offset)
	i.cond.Broadcast()
	return nil
}

// known is how much of stdin is known to be with the job.
func (i *input) known() uint64 {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.taken
}

// attach begins anew with an agent that has all bytes before offset.
func (i *input) attach(offset uint64) error {
	if err := i.take(offset); err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.sent, i.eofSent = offset, false
	return nil
}

// next is the next piece to send, if there is one; an empty one is the end.
func (i *input) next() (offset uint64, data []byte, due bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	offset = i.sent
	rest := i.kept[i.sent-i.taken:]
	switch {
	case len(rest) > 0:
		data = append(data, rest[:min(len(rest), wire.MaxData)]...)
		i.sent += uint64(len(data))
		return offset, data, true
	case i.eof && !i.eofSent:
		i.eofSent = true
		return offset, nil, true
	}
	return 0, nil, false
}

// stop ends run, unless that is in a read which another reader of the same
// terminal or pipe has made block.
func (i *input) stop() {
	i.mu.Lock()
	i.stopped = true
	i.cond.Broadcast()
	i.mu.Unlock()
	i.wakeWrite.Close()
}
