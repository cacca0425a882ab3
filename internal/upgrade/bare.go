package upgrade

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"syscall"
)

// Bare is a connection of the kernel's, of TCP or of a unix socket, which
// another process can be given.
type Bare interface {
	net.Conn
	syscall.Conn
	CloseRead() error
	CloseWrite() error
}

// BareOf takes the TLS, if any, off a stream, which is of no more use. Both sides
// have to when one has said all and the other has read it: what TLS has read
// ahead is lost.
func BareOf(stream net.Conn) (Bare, error) {
	c := stream
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	b, ok := c.(Bare)
	if !ok {
		return nil, fmt.Errorf("a connection that is a %T cannot be handed to another process", c)
	}
	return b, nil
}

// HangUp ends a connection for every process that has it, which closing one's own
// descriptor does not, and closes it without a farewell of TLS's.
func HangUp(c net.Conn) error {
	b, err := BareOf(c)
	if err != nil {
		return c.Close()
	}
	for _, end := range []func() error{b.CloseRead, b.CloseWrite} {
		// It may have ended by itself.
		if e := end(); e != nil && !errors.Is(e, syscall.ENOTCONN) && !errors.Is(e, net.ErrClosed) {
			err = errors.Join(err, e)
		}
	}
	if e := b.Close(); !errors.Is(e, net.ErrClosed) {
		err = errors.Join(err, e)
	}
	return err
}
