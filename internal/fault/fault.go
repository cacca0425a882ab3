// Package fault gives every error that reaches a user one shape: the
// operation, the object, the cause, and what to do about it. A fault also
// has a kind, which decides the exit status of a command and the HTTP status
// of an API reply, so that a refusal means the same on both sides of a
// connection.
package fault

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
)

// Kind says what sort of failure happened. The numbers are the exit statuses
// of our commands: append only, never renumber.
type Kind int

const (
	// Internal is any failure that has no better kind.
	Internal Kind = 1
	// Usage is a wrong flag, a wrong argument or a broken configuration.
	Usage Kind = 2
	// Environment is something that this machine lacks or that is in the
	// way: no mirror, no QEMU, a port that is taken, a full disk.
	Environment Kind = 3
	// Refused is a rule that says no: not approved, not yours, wrong nonce.
	Refused Kind = 4
	// NotFound is a node, job, image or file that does not exist.
	NotFound Kind = 5
	// Unavailable is a peer that does not answer; trying later may help.
	Unavailable Kind = 6
	// Untrusted is a signature, hash or certificate that does not verify.
	Untrusted Kind = 7
)

// HTTPStatus is the status code with which an API reports a fault of this kind.
func (k Kind) HTTPStatus() int {
	switch k {
	case Usage:
		return http.StatusBadRequest
	case Refused:
		return http.StatusForbidden
	case NotFound:
		return http.StatusNotFound
	case Unavailable:
		return http.StatusServiceUnavailable
	case Untrusted:
		return http.StatusUnauthorized
	default:
		return http.StatusInternalServerError
	}
}

// Error is a failure with all that a user needs to act on it.
type Error struct {
	Kind   Kind
	Op     string // what was being done: "fetch", "bind", "enrol"
	Object string // what it was done to: a package, a path, a node
	Err    error  // the cause; never nil
	Hint   string // what to do, or ""
}

// New makes an Error. The cause may be an error or any text; hint may be "".
func New(kind Kind, op, object string, cause any, hint string) *Error {
	err, ok := cause.(error)
	if !ok {
		err = errors.New(fmt.Sprint(cause))
	}
	return &Error{Kind: kind, Op: op, Object: object, Err: err, Hint: hint}
}

// Error gives the whole story on one line: "op object: cause (hint)".
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Object != "" {
		b.WriteString(" " + e.Object)
	}
	b.WriteString(": " + e.Err.Error())
	if e.Hint != "" {
		b.WriteString(" (" + e.Hint + ")")
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// KindOf is the kind of the first Error in err's tree, or Internal.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return Internal
}

// ExitStatus is the exit status of a command that ended with err: 0 for nil.
func ExitStatus(err error) int {
	if err == nil {
		return 0
	}
	return int(KindOf(err))
}

// HungUp says in words that the other side of a connection has gone, where
// the error as such is a bare "EOF"; other errors it returns as they are.
func HungUp(who string, err error) error {
	for _, end := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, end) {
			return fmt.Errorf("%s hung up before it had answered (%w)", who, err)
		}
	}
	return err
}

// List collects faults so that all of them can be told at once.
// The zero List is empty and ready to use.
type List struct{ errs []error }

// Add appends err unless it is nil.
func (l *List) Add(err error) {
	if err != nil {
		l.errs = append(l.errs, err)
	}
}

// Addf appends a formatted error.
func (l *List) Addf(format string, args ...any) { l.Add(fmt.Errorf(format, args...)) }

// Len is the number of faults collected.
func (l *List) Len() int { return len(l.errs) }

// Err is nil when nothing was added; otherwise one Error of the kind given
// whose cause has a line for each fault.
func (l *List) Err(kind Kind, op, object, hint string) error {
	switch len(l.errs) {
	case 0:
		return nil
	case 1:
		return New(kind, op, object, l.errs[0], hint)
	}
	return New(kind, op, object, faults(l.errs), hint)
}

// All is Err for a list of faults that tell their whole story themselves: the
// only one as it is, or all under one heading with the first one's kind.
func (l *List) All(op, object string) error {
	switch len(l.errs) {
	case 0:
		return nil
	case 1:
		return l.errs[0]
	}
	return New(KindOf(l.errs[0]), op, object, faults(l.errs), "")
}

type faults []error

func (f faults) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d faults:", len(f))
	for _, e := range f {
		b.WriteString("\n  " + strings.ReplaceAll(e.Error(), "\n", "\n  "))
	}
	b.WriteString("\n")
	return b.String()
}

func (f faults) Unwrap() []error { return f }
