package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// watchDevices loads the drivers of devices that appear while the machine
// runs, such as a USB network card that needs seconds to come up. The kernel
// tells of each by a datagram (lib/kobject_uevent.c).
func (m *machine) watchDevices(ctx context.Context) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("uevent socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "uevent")
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		f.Close()
		return fmt.Errorf("bind uevent socket: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	// What came between the first look and the bind is found by another look.
	m.mods.hardware("/sys/devices")
	buf := make([]byte, 64<<10)
	for {
		n, err := f.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			// ENOBUFS: so many came at once that some were lost.
			if !errors.Is(err, unix.ENOBUFS) {
				return fmt.Errorf("read uevents: %w", err)
			}
			m.mods.hardware("/sys/devices")
		default:
			if alias := addedAlias(buf[:n]); alias != "" {
				m.mods.run(m.mods.list.ForHardware([]string{alias}))
			}
		}
	}
}

// addedAlias is the name by which a device that was added asks for a driver,
// or "". A message is "add@/devices/..." and then KEY=VALUE, each ended by NUL.
func addedAlias(msg []byte) string {
	fields := bytes.Split(msg, []byte{0})
	if !bytes.HasPrefix(fields[0], []byte("add@")) {
		return ""
	}
	for _, f := range fields[1:] {
		if v, ok := bytes.CutPrefix(f, []byte("MODALIAS=")); ok {
			return string(v)
		}
	}
	return ""
}
