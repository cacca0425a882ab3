package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
	"mosimg/qemu-tests/vswitch"
)

// folder is a lab's state folder, locked for as long as the lab runs.
type folder struct {
	dir     string
	sockets string
	made    bool     // by this lab: may be removed as a whole
	lock    *os.File // flock'ed
}

// longestSocket is the longest socket name in a lab: a machine's.
const longestSocket = len("/") + 31 + len(".net")

// openFolder makes or takes the folder for a new lab. What an earlier lab
// left in it is removed; a folder with anything else in it is refused.
func openFolder(dir string) (*folder, error) {
	const op = "open lab folder"
	f := &folder{}
	if dir == "" {
		tmp, err := os.MkdirTemp("", "mosimg-lab-")
		if err != nil {
			return nil, fault.New(fault.Environment, op, os.TempDir(), err, "set TMPDIR to a folder with room")
		}
		f.dir, f.made = tmp, true
	} else {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, fault.New(fault.Environment, op, dir, err, "")
		}
		if err := os.MkdirAll(filepath.Dir(abs), 0o755); err != nil {
			return nil, fault.New(fault.Environment, op, dir, err, "")
		}
		switch err := os.Mkdir(abs, 0o700); {
		case err == nil:
			f.made = true
		case !errors.Is(err, fs.ErrExist):
			return nil, fault.New(fault.Environment, op, dir, err, "")
		}
		f.dir = abs
	}
	if err := f.take(); err != nil {
		if f.made {
			os.Remove(f.dir)
		}
		return nil, err
	}
	return f, nil
}

func (f *folder) take() error {
	const op = "open lab folder"
	entries, err := os.ReadDir(f.dir)
	if err != nil {
		return fault.New(fault.Environment, op, f.dir, err, "")
	}
	if _, err := os.Stat(f.path(lockFile)); len(entries) > 0 && err != nil {
		return fault.New(fault.Refused, op, f.dir, "it holds other things than a lab", "name an empty folder with --dir")
	}
	if err := f.relock(); err != nil {
		return err
	}
	if old, err := ReadState(f.dir); err == nil && strings.HasPrefix(old.Sockets, shortSockets) {
		os.RemoveAll(old.Sockets)
	}
	f.clear()
	if err := f.makeSockets(); err != nil {
		f.lock.Close()
		return fault.New(fault.Environment, op, f.dir, err, "")
	}
	return nil
}

// relock takes the folder's lock, which falls with the process that holds it.
func (f *folder) relock() error {
	const op = "open lab folder"
	lock, err := os.OpenFile(f.path(lockFile), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fault.New(fault.Environment, op, f.dir, err, "")
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return fault.New(fault.Refused, op, f.dir, "a lab runs in it", "stop it with: mosimg lab down --dir "+f.dir+", or name another folder with --dir")
	}
	f.lock = lock
	return nil
}

// shortSockets is where sockets go when the folder's own path is too long.
const shortSockets = "/tmp/mosimg-s-"

func (f *folder) makeSockets() error {
	f.sockets = f.path(socketFolder)
	if len(f.sockets)+longestSocket <= vswitch.MaxSocketPath {
		return os.Mkdir(f.sockets, 0o700)
	}
	tmp, err := os.MkdirTemp(filepath.Dir(shortSockets), filepath.Base(shortSockets)+"*")
	f.sockets = tmp
	return err
}

func (f *folder) path(name string) string { return filepath.Join(f.dir, name) }

// ours are the names that labs give to files, beside the lock.
var ours = []string{headInitrd, stateDisk, captureFile, captureFile + ".old", commandsFile, logFile, stateFile,
	"*.console", "*.qemu", "*.vars"}

// clear removes what a lab wrote, and nothing else.
func (f *folder) clear() {
	for _, pattern := range ours {
		names, _ := filepath.Glob(f.path(pattern))
		for _, n := range names {
			os.Remove(n)
		}
	}
	os.RemoveAll(f.path(socketFolder))
}

// close lets the folder go. With keep the evidence stays in it: consoles,
// capture, command lines; what a build makes again does not.
func (f *folder) close(keep bool) {
	os.RemoveAll(f.sockets)
	if keep {
		os.Remove(f.path(headInitrd))
	} else {
		f.clear()
		os.Remove(f.path(lockFile))
		if f.made {
			os.Remove(f.dir) // unless someone put something in it
		}
	}
	f.lock.Close()
}

func (f *folder) String() string { return fmt.Sprintf("lab folder %s", f.dir) }
