// Package tftpd serves the boot loaders of an image set by TFTP, and nothing
// else: a request names a bare file of the set's boot folder.
package tftpd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/pin/tftp/v3"

	"mosimg/pxe/images"
	"mosimg/pxe/trace"
)

const (
	// maxBlock is an Ethernet frame's 1500 bytes without the headers of IP,
	// UDP and TFTP (20+8+4); a larger block would be cut in two packets,
	// which boot ROMs do not put together.
	maxBlock = 1500 - ipUDPTFTP
	// ipUDPTFTP are the headers around a block.
	ipUDPTFTP = 32
	// timeout and retries: one lost packet costs a second and not five,
	// and a machine that is gone is given up after half a minute.
	timeout = time.Second
	retries = 10
	// maxTransfers bounds memory and sockets; more are told to try again.
	maxTransfers = 512
	// grace is how long a stop waits for transfers to end.
	grace = 2 * time.Second
)

// Server serves TFTP on one address.
type Server struct {
	// Loader finds a boot loader by its bare name; nil when there is none.
	Loader func(name string) *images.File
	// MAC names the machine at an address, for the boot trace; "" if unknown.
	MAC func(netip.Addr) string
	// MTU of the interface; 0 means 1500.
	MTU int
	// Log may be nil.
	Log *slog.Logger
}

// Texts that go to clients: no paths of ours.
var (
	errNotFound = errors.New("file not found")
	errBusy     = errors.New("too many transfers, try again")
	errInternal = errors.New("internal fault")
)

// Serve answers requests until ctx ends. It closes conn.
func (s *Server) Serve(ctx context.Context, conn *net.UDPConn) error {
	slots := make(chan struct{}, maxTransfers)
	srv := tftp.NewServer(func(name string, rf io.ReaderFrom) error {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			return errBusy
		}
		return s.read(name, rf)
	}, nil)
	srv.SetTimeout(timeout)
	srv.SetRetries(retries)
	srv.SetBackoff(func(int) time.Duration { return 0 })
	block := maxBlock
	if s.MTU > 0 {
		block = min(block, max(512, s.MTU-ipUDPTFTP))
	}
	srv.SetBlockSize(block)
	srv.SetHook(hook{s})

	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		srv.Shutdown() // waits for the transfers
		close(stopped)
	})
	err := srv.Serve(conn)
	if stop() {
		return errors.Join(err, conn.Close())
	}
	select {
	case <-stopped:
	case <-time.After(grace):
	}
	return nil
}

func (s *Server) read(name string, rf io.ReaderFrom) error {
	f := s.Loader(clean(name))
	if f == nil {
		return errNotFound
	}
	data, err := f.Bytes()
	if err != nil {
		s.log().Error("tftp: read boot loader", "file", name, "error", err.Error())
		return errInternal
	}
	// A bytes.Reader can seek, so the size is told to clients that ask.
	// Faults of the transfer the hook has heard of already: returned, they
	// would be sent to the client a second time.
	_, _ = rf.ReadFrom(bytes.NewReader(data))
	return nil
}

// autoexec is a script that iPXE asks for before it does anything else. A
// prompt "not found" lets it go on to DHCP.
const autoexec = "autoexec.ipxe"

// clean is the bare name that a client means: some put a slash before it,
// Windows-made ROMs a backslash, and a few PXE stacks add ".0".
func clean(name string) string {
	return strings.TrimSuffix(strings.TrimLeft(name, `/\`), ".0")
}

// hook reports how transfers ended.
type hook struct{ s *Server }

func (h hook) OnSuccess(st tftp.TransferStats) {
	trace.Event(h.s.Log, trace.TFTP, h.mac(st.RemoteAddr), "address", st.RemoteAddr.String(), "file", st.Filename,
		"datagrams", st.DatagramsSent, "took", st.Duration.Round(time.Millisecond))
}

func (h hook) OnFailure(st tftp.TransferStats, err error) {
	switch {
	case st.Filename == "":
		h.s.log().Debug("tftp: bad request", "error", err.Error())
		return
	case errors.Is(err, errNotFound) && clean(st.Filename) == autoexec:
		// iPXE looks for it in passing: that is not worth a line.
		return
	}
	// Firmware asks for the size first and breaks the transfer off with an
	// error packet, then asks again: that is how it works, not a failure.
	if strings.Contains(err.Error(), "code=") && st.DatagramsAcked == 0 {
		h.s.log().Debug("tftp: size asked", "file", st.Filename, "address", st.RemoteAddr.String())
		return
	}
	h.s.log().Warn("tftp: transfer failed", "mac", h.mac(st.RemoteAddr), "address", st.RemoteAddr.String(), "file", st.Filename, "error", err.Error())
}

func (h hook) mac(ip net.IP) string {
	a, ok := netip.AddrFromSlice(ip.To4())
	if !ok || h.s.MAC == nil {
		return ""
	}
	return h.s.MAC(a)
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}
