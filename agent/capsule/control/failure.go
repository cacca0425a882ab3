package control

import (
	"errors"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// FromError makes err fit to be sent; nil stays nil.
func FromError(err error) *Error {
	if err == nil {
		return nil
	}
	e := &Error{Kind: fault.KindOf(err), Text: err.Error()}
	var errno unix.Errno
	if errors.As(err, &errno) {
		e.Errno = int(errno)
	}
	return e
}

// Err is the error that was sent: its kind, its text, and errors.Is works for
// its errno. A nil Error is no error.
func (e *Error) Err() error {
	if e == nil {
		return nil
	}
	return received{e}
}

type received struct{ e *Error }

func (r received) Error() string { return r.e.Text }

func (r received) As(target any) bool {
	switch target := target.(type) {
	case **fault.Error:
		*target = fault.New(r.e.Kind, "capsule", "", r.e.Text, "")
		return true
	case *unix.Errno:
		*target = unix.Errno(r.e.Errno)
		return r.e.Errno != 0
	}
	return false
}

func (r received) Is(target error) bool {
	errno, ok := target.(unix.Errno)
	return ok && r.e.Errno != 0 && int(errno) == r.e.Errno
}
