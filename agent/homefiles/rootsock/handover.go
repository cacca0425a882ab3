package rootsock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Hand gives the process at the other end of c a descriptor of a connection. The
// caller keeps its own.
func Hand(c net.Conn, conn syscall.Conn) error {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("a %T carries no descriptors", c)
	}
	rc, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) { _, _, err = uc.WriteMsgUnix([]byte{0}, unix.UnixRights(int(fd)), nil) })
	return errors.Join(err, cerr)
}

// Take takes the connection that the other end of c hands over.
func Take(c net.Conn) (net.Conn, error) {
	uc, ok := c.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("a %T carries no descriptors", c)
	}
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := uc.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	if len(msgs) != 1 {
		return nil, fmt.Errorf("%d control messages where one with a descriptor is expected", len(msgs))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		return nil, err
	}
	var files []*os.File
	for _, fd := range fds { // ReadMsgUnix has set close-on-exec
		f := os.NewFile(uintptr(fd), "handed over")
		defer f.Close()
		files = append(files, f)
	}
	if len(files) != 1 {
		return nil, fmt.Errorf("%d descriptors where one is expected", len(files))
	}
	return net.FileConn(files[0])
}
