// Package control is what an agent and the shim of a capsule say to each
// other over the shim's unix socket: requests with open descriptors, one
// answer each, any number of connections.
//
// A message is a length (u32, big-endian) and that many bytes of JSON;
// descriptors come with the first byte. Agent and shim are the same program,
// but not always of the same age, since a shim outlives its agent: unknown
// fields are ignored and an unknown verb is answered with an error.
//
// After a request for a stream the connection carries that stream instead:
//
//	stdout, stderr  shim -> agent  frames (u32 length, bytes); a frame of length 0 is the end of the stream
//	                agent -> shim  acknowledgements (u64 big-endian: all bytes before this offset may be forgotten)
//	stdin           agent -> shim  frames as above, the first byte being that at Answer.Offset
//	                shim -> agent  acknowledgements of what the job's pipe has taken
//
// A connection that breaks without the frame of length 0 says nothing about
// the stream: the other side connects again and goes on at the last offset.
package control

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// Config is what a shim is started with.
type Config struct {
	ID     string // names the capsule in messages
	Dir    string // the capsule's own folder: socket, log, status
	Cgroup string // group with the leaves shim, criu and job
	Root   Root
	CRIU   CRIU
}

// Root is the tree that the job sees.
type Root struct {
	// Dir is bound with all that is mounted below it: "/" at home, elsewhere
	// where the home files are mounted.
	Dir string
	// Guest says that the tree is another machine's: set-user-ID programs and
	// device files in it have no effect.
	Guest bool
}

// CRIU is how to run CRIU.
type CRIU struct {
	Bundle   string   // folder that holds program and libraries; visible in the capsule to root only
	Argv     []string // loader, its arguments, criu: with paths below Bundle
	Env      []string // e.g. CRIU_FAULT=130
	LogLevel int      // 0 means warnings and errors
}

// Spec is the program of a job and what it inherits from its caller.
type Spec struct {
	Argv   []string // the program, looked up in the PATH of Env, and its arguments
	Env    []string
	Dir    string // working directory
	UID    uint32
	GID    uint32
	Groups []uint32
	Umask  int
	Nice   int
	// Ignored are the numbers of signals that the program starts with ignored.
	Ignored []int `json:",omitempty"`
	Limits  []Limit
}

// Owner is whose rights a job has, and no others.
type Owner struct {
	UID, GID uint32
	Groups   []uint32 `json:",omitempty"` // beside GID
}

// Owner is whom the program runs as.
func (s Spec) Owner() Owner { return Owner{UID: s.UID, GID: s.GID, Groups: s.Groups} }

// Limit is a resource limit; Resource is a number of setrlimit(2).
type Limit struct {
	Resource int
	Cur, Max uint64
}

// Verb is what a request asks for.
type Verb string

const (
	Start   Verb = "start"   // run Spec
	Query   Verb = "query"   // answer with Status at once
	Wait    Verb = "wait"    // answer with Status when the job has ended or moved away
	Dump    Verb = "dump"    // descriptors: images folder, the page socket if pages go there, and a gate; answers when the job is dumped and frozen
	Quiet   Verb = "quiet"   // shim -> agent, at a gate: may the job, which is frozen, be dumped in this moment? An Error says why not
	Finish  Verb = "finish"  // decide about a dumped job: Commit kills it, otherwise it runs on
	Restore Verb = "restore" // descriptor: images folder; answers when the job is there and frozen
	Resume  Verb = "resume"  // let a restored job run
	Stop    Verb = "stop"    // freeze for the user (SIGTSTP)
	Cont    Verb = "cont"    // thaw for the user (SIGCONT)
	Kill    Verb = "kill"    // kill every process of the job
	Signal  Verb = "signal"  // send Signal to the program, or with Group to its process group
	Quit    Verb = "quit"    // kill what is left and end the shim
	Stdin   Verb = "stdin"
	Stdout  Verb = "stdout"
	Stderr  Verb = "stderr"
)

// Request is one message to the shim.
type Request struct {
	Verb   Verb
	Spec   *Spec  `json:",omitempty"`
	Owner  *Owner `json:",omitempty"` // of a job to restore
	Commit bool   `json:",omitempty"`
	Signal int    `json:",omitempty"`
	Group  bool   `json:",omitempty"`
	// ID counts a job's signals, so that they can be sent again, in their order, when it is not
	// known whether they arrived: none comes twice, or after a later one. 0 is not counted.
	ID     uint64 `json:",omitempty"`
	Offset uint64 `json:",omitempty"` // of an output stream: the first byte wanted
	// Measure fills in Status.Use: it costs a look at every process.
	Measure bool `json:",omitempty"`
}

// Remote tells whether a home may ask this of a shim on another node: all but
// what makes, moves and ends a capsule, which is the node's business.
func (r Request) Remote() bool {
	switch r.Verb {
	case Query, Wait, Stop, Cont, Kill, Signal, Stdin, Stdout, Stderr:
		return true
	}
	return false
}

// Stream tells whether the connection becomes a stream after the answer.
func (r Request) Stream() bool { return r.Verb == Stdin || r.Verb == Stdout || r.Verb == Stderr }

// Answer is one message from the shim.
type Answer struct {
	Error  *Error `json:",omitempty"`
	Status Status
	Offset uint64 `json:",omitempty"` // of stdin: the first byte wanted
	// Over says of stdin that its end was taken too: nothing is wanted any more.
	Over bool `json:",omitempty"`
}

// State is where a capsule is in its life.
type State string

const (
	Empty     State = "empty"     // nothing was started yet
	Running   State = "running"   //
	Dumping   State = "dumping"   // CRIU is at work; the job is stopped or about to be
	Dumped    State = "dumped"    // frozen; Finish decides
	Restoring State = "restoring" //
	Restored  State = "restored"  // frozen, has not run here yet; Resume or Kill decides
	Ended     State = "ended"     // the job is over: Status has how
	Moved     State = "moved"     // the job was committed elsewhere and killed here
	Failed    State = "failed"    // a restore failed, or a restored job was given up
)

// Status is what a shim knows about its job.
type Status struct {
	State   State
	Leader  int  `json:",omitempty"` // pids in the capsule
	Program int  `json:",omitempty"`
	Stopped bool `json:",omitempty"` // frozen for the user
	// Exit and Signal are how the program ended, once State is Ended.
	Exit   int  `json:",omitempty"`
	Signal int  `json:",omitempty"`
	Core   bool `json:",omitempty"`
	// Use is what the job takes; nil unless it was measured.
	Use *Use `json:",omitempty"`
}

// Use is what a job takes on its node.
type Use struct {
	Processes int
	Bytes     int64 // resident, shared pages counted once for each process
	// CPUMicros is the time its processes have run, on all nodes they were on.
	CPUMicros int64
	// Pinned is why the job cannot be moved as it is now; "" if it can.
	Pinned string `json:",omitempty"`
	// Locked is the file lock that it holds now: to be moved it has to let go.
	Locked string `json:",omitempty"`
}

// Error is a failure on its way to the other side.
type Error struct {
	Kind  fault.Kind
	Text  string
	Errno int `json:",omitempty"` // the errno at the bottom of it, if any
}

// maxMessage bounds a message: the kernel allows a program 2 MiB of arguments
// and environment by default, and JSON may double them.
const maxMessage = 8 << 20

// maxFiles bounds the descriptors that come with a message.
const maxFiles = 4

// Send sends v, and with it descriptors, which stay the caller's: only over a
// unix socket.
func Send(c net.Conn, v any, files ...*os.File) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(body) > maxMessage {
		return fmt.Errorf("message of %d bytes; %d is the most", len(body), maxMessage)
	}
	fds := make([]int, len(files))
	for i, f := range files {
		rc, err := f.SyscallConn()
		if err != nil {
			return err
		}
		// Not f.Fd(), which would make the description blocking.
		if err := rc.Control(func(fd uintptr) { fds[i] = int(fd) }); err != nil {
			return err
		}
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	head := binary.BigEndian.AppendUint32(nil, uint32(len(body)))
	if len(fds) == 0 {
		_, err := c.Write(append(head, body...))
		return err
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("%d open files cannot be sent over a %T", len(fds), c)
	}
	if _, _, err := uc.WriteMsgUnix(head, oob, nil); err != nil {
		return err
	}
	_, err = c.Write(body)
	return err
}

// Receive receives into v. The descriptors that came are the caller's.
func Receive(c net.Conn, v any) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			CloseAll(files)
			files = nil
		}
	}()
	head := make([]byte, 4)
	oob := make([]byte, unix.CmsgSpace(4*maxFiles))
	n := 0
	if uc, ok := c.(*net.UnixConn); ok {
		var oobn, flags int
		if n, oobn, flags, _, err = uc.ReadMsgUnix(head, oob); err != nil {
			return nil, err
		}
		if files, err = rights(oob[:oobn]); err != nil {
			return files, err
		}
		if flags&unix.MSG_CTRUNC != 0 {
			return files, fmt.Errorf("more than %d descriptors", maxFiles)
		}
		if n == 0 {
			return files, io.EOF
		}
	}
	if _, err := io.ReadFull(c, head[n:]); err != nil {
		return files, err
	}
	size := binary.BigEndian.Uint32(head)
	if size > maxMessage {
		return files, fmt.Errorf("message of %d bytes; %d is the most", size, maxMessage)
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(c, body); err != nil {
		return files, err
	}
	return files, json.Unmarshal(body, v)
}

func rights(oob []byte) (files []*os.File, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	return files, nil
}

// CloseAll closes files.
func CloseAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
