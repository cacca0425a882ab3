// Package wire is what mosrun and its agent say to each other about a running
// job, after the HTTP upgrade to api.UpgradeJob. Agent and mosrun may each lose
// the connection at any moment (the agent may be restarted): mosrun attaches
// again, tells how much it has of each output stream, and is told how much
// of stdin the job has taken, so that no byte is lost or comes twice.
//
// A message is a kind (u8), a length (u32, big-endian) and that many bytes:
//
//	mosrun -> agent
//	  hello   JSON Hello: the first message
//	  stdin   u64 offset of the first byte, bytes; without bytes it is the end of stdin
//	  ack     u8 stream, u64: all bytes before this offset were written out; Closed: nobody reads it any more
//	  signal  JSON Signal
//	  stop    JSON Order: freeze the job (mosrun got SIGTSTP); answered by stopped
//	  cont    JSON Order: let it run on
//	  done    the end was taken: the agent forgets the job
//	agent -> mosrun
//	  stdout, stderr  u64 offset of the first byte, bytes; without bytes it is the end of the stream
//	  stdin-taken     u64: all bytes before this offset are with the job; the first message, and whenever it grows.
//	                  What lies after it must be sent again after attaching anew.
//	  stopped
//	  heard           u64: the orders (signal, stop, cont) up to this ID have reached the job, or never will.
//	                  Those after it are to be sent again after attaching anew; none reaches the job twice.
//	  note            text for mosrun's stderr
//	  ended           JSON End: after the end of both streams
//
// Offsets count from the first byte that the job ever wrote or was given.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math"
)

// Kind is what a message says.
type Kind uint8

const (
	KindHello      Kind = 1
	KindStdin      Kind = 2
	KindAck        Kind = 3
	KindSignal     Kind = 4
	KindStop       Kind = 5
	KindCont       Kind = 6
	KindDone       Kind = 7
	KindStdout     Kind = 16
	KindStderr     Kind = 17
	KindStdinTaken Kind = 18
	KindStopped    Kind = 19
	KindNote       Kind = 20
	KindEnded      Kind = 21
	KindHeard      Kind = 22
)

// MaxData is the most bytes of a stream that one message carries; MaxBody
// bounds a message.
const (
	MaxData = 64 << 10
	MaxBody = MaxData + 4096
)

// StdinWindow is how many bytes of stdin mosrun sends beyond what was taken,
// and keeps, to send them again.
const StdinWindow = 256 << 10

// Closed as the offset of an ack says that whoever read mosrun's stdout or
// stderr is gone. The agent lets go of its end of the job's pipe, so that the
// job's next write fails there as it would here: with SIGPIPE or, if the program
// ignores that, EPIPE. The stream's end follows. It is said anew at each attach.
const Closed = math.MaxUint64

// Hello opens a stream.
type Hello struct {
	// Stdout and Stderr are how many bytes of each were written out.
	Stdout uint64 `json:"stdout"`
	Stderr uint64 `json:"stderr"`
	// Stdin is how many bytes of stdin are known to be with the job: what comes
	// before is not asked for, even if the job's node cannot be reached.
	Stdin uint64 `json:"stdin"`
}

// Order is what a mosrun tells its job to do. IDs are counted from 1, and orders
// are sent in their order; 0 is that of a mosrun which does not wait for heard.
type Order struct {
	ID uint64 `json:"id,omitempty"`
}

// Signal is sent to the job's program, or to its process group as a terminal
// does for its keys.
type Signal struct {
	Order
	Number int  `json:"number"`
	Group  bool `json:"group,omitempty"`
}

// End is how the job ended.
type End struct {
	Exit   int    `json:"exit"`
	Signal int    `json:"signal,omitempty"`
	Core   bool   `json:"core,omitempty"`
	Lost   string `json:"lost,omitempty"` // or why it was lost
}

// Order decodes a stop or cont; the body is empty in one without an ID.
func (m Message) Order() (o Order, err error) {
	if len(m.Body) > 0 {
		err = m.JSON(&o)
	}
	return o, err
}

// Message is one message.
type Message struct {
	Kind Kind
	Body []byte
}

// headSize is kind and length.
const headSize = 5

// Write writes a message in one Write of w.
func Write(w io.Writer, kind Kind, body []byte) error {
	if len(body) > MaxBody {
		return fmt.Errorf("message of %d bytes; %d is the most", len(body), MaxBody)
	}
	b := make([]byte, 0, headSize+len(body))
	b = append(b, byte(kind))
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	_, err := w.Write(append(b, body...))
	return err
}

// WriteJSON writes a message whose body is JSON.
func WriteJSON(w io.Writer, kind Kind, v any) error {
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return Write(w, kind, body)
}

// WriteData writes a piece of a stream, at most MaxData; no data is its end.
func WriteData(w io.Writer, kind Kind, offset uint64, data []byte) error {
	return Write(w, kind, append(binary.BigEndian.AppendUint64(nil, offset), data...))
}

// WriteOffset writes a message that is an offset.
func WriteOffset(w io.Writer, kind Kind, offset uint64) error {
	return Write(w, kind, binary.BigEndian.AppendUint64(nil, offset))
}

// WriteAck acknowledges a stream (KindStdout or KindStderr) up to offset.
func WriteAck(w io.Writer, stream Kind, offset uint64) error {
	return Write(w, KindAck, binary.BigEndian.AppendUint64([]byte{byte(stream)}, offset))
}

// Read reads a message. io.EOF is the end of the connection between two.
func Read(r io.Reader) (Message, error) {
	var head [headSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return Message{}, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if n > MaxBody {
		return Message{}, fmt.Errorf("message of %d bytes; %d is the most", n, MaxBody)
	}
	m := Message{Kind: Kind(head[0]), Body: make([]byte, n)}
	if _, err := io.ReadFull(r, m.Body); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return m, err
	}
	return m, nil
}

func (m Message) short() error {
	return fmt.Errorf("message of kind %d with %d bytes", m.Kind, len(m.Body))
}

// Data is a piece of a stream and its offset.
func (m Message) Data() (offset uint64, data []byte, err error) {
	if len(m.Body) < 8 {
		return 0, nil, m.short()
	}
	return binary.BigEndian.Uint64(m.Body), m.Body[8:], nil
}

// Ack is what WriteAck wrote.
func (m Message) Ack() (stream Kind, offset uint64, err error) {
	if len(m.Body) != 9 {
		return 0, 0, m.short()
	}
	return Kind(m.Body[0]), binary.BigEndian.Uint64(m.Body[1:]), nil
}

// Offset is what WriteOffset wrote.
func (m Message) Offset() (uint64, error) {
	if len(m.Body) != 8 {
		return 0, m.short()
	}
	return binary.BigEndian.Uint64(m.Body), nil
}

// JSON decodes a body.
func (m Message) JSON(v any) error { return json.Unmarshal(m.Body, v) }
