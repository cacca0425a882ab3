package forward

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/agent/homefiles/wire"
	"mosimg/internal/fault"
)

// readSize is what one read of /dev/fuse may bring: a WRITE of the largest
// size and its headers. The kernel refuses reads with less room.
const readSize = wire.MaxWrite + 64<<10

// Mount opens /dev/fuse and mounts it. The kernel's first request waits there
// for Run; what touches the mount before waits too. nosuid and nodev, because
// the files come from another machine; default_permissions, so that the
// kernel checks with all of the caller's groups before it asks (the home
// checks again); allow_other, because jobs are not of this process's user.
func Mount(mountpoint string) (*os.File, error) {
	const op = "mount home files on"
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fault.New(fault.Environment, op, mountpoint, fmt.Errorf("open /dev/fuse: %w", err), "the kernel needs FUSE: modprobe fuse")
	}
	data := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=%d", fd, wire.MaxWrite)
	if err := unix.Mount("home", mountpoint, "fuse.mosimg", unix.MS_NOSUID|unix.MS_NODEV, data); err != nil {
		unix.Close(fd)
		return nil, fault.New(fault.Environment, op, mountpoint, err, "it must be an empty directory, and root must do this")
	}
	// Non-blocking, so that Go's poller waits and Close ends a Read.
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// Unmount takes the mount away at once, whoever uses it, and ends all that
// waits in it. The agent calls it also when a forwarder was killed: a thread
// of it that waits in the kernel could keep the mount alive otherwise.
func Unmount(mountpoint string) {
	_ = unix.Unmount(mountpoint, unix.MNT_FORCE|unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) // not mounted any more: fine
}

// raiseReadAhead lets the kernel read ahead as much as one request carries.
// INIT can only lower the default of 128 KiB, with which a link of 1 ms gives
// three quarters of the throughput. It is no fault if /sys is not there.
func raiseReadAhead(mountpoint string) error {
	// Not stat: that is a request, and we are who answers it.
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	dev, ok := deviceOf(string(mounts), mountpoint)
	if !ok {
		return fmt.Errorf("%s is not in mountinfo", mountpoint)
	}
	return os.WriteFile("/sys/class/bdi/"+dev+"/read_ahead_kb", fmt.Appendf(nil, "%d", wire.MaxWrite>>10), 0)
}

// deviceOf finds the major:minor of the last mount on a mountpoint.
func deviceOf(mountinfo, mountpoint string) (string, bool) {
	escape := strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`)
	want, found := escape.Replace(mountpoint), ""
	for line := range strings.Lines(mountinfo) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == want {
			found = f[2]
		}
	}
	return found, found != ""
}

// readError sorts the errors of reading /dev/fuse: again when a request was
// taken back meanwhile, gone when the mount is.
func readError(err error) (again, gone bool) {
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
		return true, false
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED), errors.Is(err, os.ErrClosed):
		return false, true
	}
	return false, false
}

// replyTooLate tells whether the kernel has no use for an answer any more: the
// request was taken back, the inode of a notification is not cached, or the
// mount is gone.
func replyTooLate(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, os.ErrClosed) ||
		errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ECONNABORTED)
}
