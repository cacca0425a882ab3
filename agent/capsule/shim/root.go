package shim

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/agent/capsule/leader"
	"mosimg/internal/fault"
)

// Places in a capsule. All are on file systems of the capsule's own, so that
// the home's tree needs nothing but the folders that every Linux has.
const (
	ownDir     = "/dev/.mosimg"       // a user may pass it to the leader, and see nothing else
	privateDir = ownDir + "/private"  // root's
	bundleDir  = privateDir + "/criu" // the CRIU bundle, read-only
	kdatFile   = "/run/criu.kdat"     // CRIU's cache of what the kernel can do
)

// devices are the device files of a capsule: those that CRIU can carry and
// programs expect.
var devices = []struct {
	name         string
	major, minor uint32
}{
	{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0},
}

var devLinks = [][2]string{
	{"fd", "/proc/self/fd"}, {"stdin", "/proc/self/fd/0"}, {"stdout", "/proc/self/fd/1"}, {"stderr", "/proc/self/fd/2"}, {"ptmx", "pts/ptmx"},
}

// runSeeds are files below /run that /etc/resolv.conf is often a link to.
// The job's /run is its own, and without them it could resolve no name.
var runSeeds = []string{"systemd/resolve/stub-resolv.conf", "systemd/resolve/resolv.conf", "resolvconf/resolv.conf", "NetworkManager/resolv.conf"}

// enterRoot gives this process, which has a mount namespace of its own, the
// capsule's root. Host paths are used up to pivot_root, the capsule's after.
func enterRoot(conf control.Config) error {
	// Slave, so that what is unmounted at home is let go here too, and nothing goes back.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	seeds := readSeeds(conf.Root.Dir)
	bundle := -1 // a node without CRIU runs jobs too
	if conf.CRIU.Bundle != "" {
		var err error
		if bundle, err = cloneTree(conf.CRIU.Bundle); err != nil {
			return err
		}
		defer closeFD(bundle)
	}
	kdat, err := cloneTree(kdatFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	defer closeFD(kdat)

	staging := filepath.Join(conf.Dir, "root")
	if err := os.MkdirAll(staging, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(conf.Root.Dir, staging, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind %s: %w", conf.Root.Dir, err)
	}
	if conf.Root.Guest {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
		if err := unix.MountSetattr(unix.AT_FDCWD, staging, unix.AT_RECURSIVE, &attr); err != nil {
			return fmt.Errorf("mount %s nosuid,nodev: %w", conf.Root.Dir, err)
		}
	}
	if err := unix.Chdir(staging); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fault.New(fault.Environment, "change the root to", conf.Root.Dir, err, "on an initramfs the agent has to move / to a mount of its own first")
	}
	// The old root lies on top of the new one now.
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	unix.Umask(0)
	for _, m := range []struct {
		dir, fs string
		flags   uintptr
		data    string
	}{
		{"/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"/dev", "tmpfs", unix.MS_NOSUID, "mode=755"},
		{"/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"},
		{"/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	} {
		if filepath.Dir(m.dir) == "/dev" {
			if err := os.Mkdir(m.dir, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount(m.fs, m.dir, m.fs, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fs, m.dir, err)
		}
	}
	if err := fillDev(); err != nil {
		return err
	}
	if err := fillRun(seeds); err != nil {
		return err
	}
	if bundle >= 0 {
		if err := putTree(bundle, bundleDir); err != nil {
			return err
		}
	}
	if kdat >= 0 {
		if err := os.WriteFile(kdatFile, nil, 0o644); err != nil {
			return err
		}
		if err := putTree(kdat, kdatFile); err != nil {
			return err
		}
	}
	unix.Umask(0o022)
	return putLeader(leader.Image())
}

func fillDev() error {
	for _, d := range devices {
		if err := unix.Mknod("/dev/"+d.name, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("make /dev/%s: %w", d.name, err)
		}
	}
	for _, l := range devLinks {
		if err := os.Symlink(l[1], "/dev/"+l[0]); err != nil {
			return err
		}
	}
	if err := os.Mkdir(ownDir, 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(privateDir, 0o700); err != nil {
		return err
	}
	return os.Mkdir(bundleDir, 0o700)
}

func readSeeds(root string) map[string][]byte {
	seeds := make(map[string][]byte)
	for _, name := range runSeeds {
		if data, err := os.ReadFile(filepath.Join(root, "run", name)); err == nil {
			seeds[name] = data
		}
	}
	return seeds
}

func fillRun(seeds map[string][]byte) error {
	if err := os.Mkdir("/run/lock", 0o777|fs.ModeSticky); err != nil {
		return err
	}
	if err := os.Mkdir("/run/user", 0o755); err != nil {
		return err
	}
	for name, data := range seeds {
		path := filepath.Join("/run", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// leaderPath names the leader by its content, so that a job keeps its own
// when it moves to a node with another version.
func leaderPath(image []byte) string { return fmt.Sprintf("%s/leader-%x", ownDir, contentHash(image)) }

func putLeader(image []byte) error {
	path := leaderPath(image)
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	return os.WriteFile(path, image, 0o755)
}

// cloneTree takes hold of a mount by a host path, or gives -1 and why not.
// It is read-only from then on.
func cloneTree(path string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, &os.PathError{Op: "bind", Path: path, Err: err}
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd) //nolint:errcheck // the error is reported
		return -1, &os.PathError{Op: "make read-only", Path: path, Err: err}
	}
	return fd, nil
}

// putTree puts what cloneTree took at a path of the capsule.
func putTree(fd int, path string) error {
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return &os.PathError{Op: "mount", Path: path, Err: err}
	}
	return nil
}

func closeFD(fd int) {
	if fd >= 0 {
		unix.Close(fd) //nolint:errcheck // nothing was written to it
	}
}
