package shim

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"mosimg/agent/capsule/control"
	"mosimg/agent/capsule/leader"
	"mosimg/agent/capsule/seccomp"
	"mosimg/internal/fault"
	"mosimg/internal/urgent"
)

// Descriptors of the launching process, beside stdio.
const (
	launchLeaderFD = 3 // the leader's report
	launchSpecFD   = 4 // launchOrder as JSON
	launchErrorFD  = 5 // control.Error as JSON, if the leader is not reached
)

// kept is the capability bounding set of a job. What is not in it and why:
// SYS_ADMIN, SYS_MODULE, SYS_RAWIO, SYS_BOOT, MKNOD, NET_ADMIN, SYS_TIME, SYSLOG, BPF and
// the like act on the machine, which on a guest is not the user's; SYS_PTRACE and
// CHECKPOINT_RESTORE would let a root's job into its shim; DAC_READ_SEARCH opens files by handle, around the root.
var kept = []uintptr{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_KILL,
	unix.CAP_SETGID, unix.CAP_SETUID, unix.CAP_SETPCAP, unix.CAP_SETFCAP, unix.CAP_LINUX_IMMUTABLE,
	unix.CAP_NET_BIND_SERVICE, unix.CAP_NET_RAW, unix.CAP_IPC_LOCK, unix.CAP_IPC_OWNER,
	unix.CAP_SYS_CHROOT, unix.CAP_SYS_NICE, unix.CAP_SYS_RESOURCE, unix.CAP_LEASE, unix.CAP_AUDIT_WRITE,
}

// launchMain turns this process, a child of the shim in the job's cgroup, ipc
// and uts namespaces, into the leader. It returns only on failure.
func launchMain() int {
	report := os.NewFile(launchErrorFD, "error")
	unix.CloseOnExec(launchErrorFD)
	if err := launch(); err != nil {
		json.NewEncoder(report).Encode(control.FromError(err)) //nolint:errcheck // the exit status is left
	}
	return 1
}

// launch runs on one thread to its end: capabilities, credentials and the
// filter belong to a thread, and exec takes those of the thread that calls it.
func launch() error {
	runtime.LockOSThread()
	var spec control.Spec
	in := os.NewFile(launchSpecFD, "spec")
	if err := json.NewDecoder(in).Decode(&spec); err != nil {
		return fmt.Errorf("read the job's description: %w", err)
	}
	in.Close()
	if len(spec.Argv) == 0 {
		return fault.New(fault.Usage, "run", "job", "no program is named", "")
	}

	// As root.
	unix.Umask(spec.Umask)
	if err := unix.Setpriority(unix.PRIO_PROCESS, 0, spec.Nice); err != nil {
		return fmt.Errorf("set niceness %d: %w", spec.Nice, err)
	}
	// Refused where the shim's was not changed either.
	if err := urgent.SetOOM(urgent.Ordinary); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	if err := makeRoom(spec.Limits); err != nil {
		return err
	}
	if err := seccomp.Install(); err != nil {
		return err
	}
	if err := dropBounding(); err != nil {
		return err
	}

	// As the user. Raw calls: those of package syscall would change every thread.
	groups := spec.Groups
	if len(groups) == 0 {
		groups = []uint32{spec.GID}
	}
	if _, _, errno := unix.RawSyscall(sysSetgroups, uintptr(len(groups)), uintptr(unsafe.Pointer(&groups[0])), 0); errno != 0 {
		return fmt.Errorf("set the job's groups: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(sysSetresgid, uintptr(spec.GID), uintptr(spec.GID), uintptr(spec.GID)); errno != 0 {
		return fmt.Errorf("set the job's group: %w", errno)
	}
	if _, _, errno := unix.RawSyscall(sysSetresuid, uintptr(spec.UID), uintptr(spec.UID), uintptr(spec.UID)); errno != 0 {
		return fmt.Errorf("set the job's user: %w", errno)
	}
	if err := unix.Chdir(spec.Dir); err != nil {
		return fault.New(fault.Refused, "change to", spec.Dir, err, "start the job in a directory that its user can enter")
	}
	path, err := lookPath(spec.Argv[0], spec.Env)
	if err != nil {
		return err
	}
	setSignals(spec.Ignored)
	return become(leaderPath(leader.Image()), append([]string{"mosimg-leader", path}, spec.Argv...), spec.Env, spec.Limits)
}

// makeRoom raises this process's hard limits to where those of the job are, which
// the job's user may not do.
func makeRoom(limits []control.Limit) error {
	for _, l := range limits {
		var own unix.Rlimit
		err := unix.Prlimit(0, l.Resource, nil, &own)
		if err == nil && own.Max < l.Max {
			own.Max = l.Max
			err = unix.Prlimit(0, l.Resource, &own, nil)
		}
		if err != nil {
			return fmt.Errorf("raise resource limit %d: %w", l.Resource, err)
		}
	}
	return nil
}

// become sets the job's limits and executes the leader. The limits are the program's and
// not ours: with an address space, a data segment or files as small as some are
// meant to be the Go runtime dies. So from the first limit on nothing is allocated.
func become(file string, argv, env []string, limits []control.Limit) error {
	name, err := unix.BytePtrFromString(file)
	if err != nil {
		return err
	}
	args, err := syscall.SlicePtrFromStrings(argv)
	if err != nil {
		return fault.New(fault.Usage, "run", argv[len(argv)-1], err, "an argument has a zero byte")
	}
	vars, err := syscall.SlicePtrFromStrings(env)
	if err != nil {
		return fault.New(fault.Usage, "run", file, err, "a variable of the environment has a zero byte")
	}
	set := make([]unix.Rlimit, len(limits))
	for i, l := range limits {
		set[i] = unix.Rlimit{Cur: l.Cur, Max: l.Max}
	}
	for i := range limits {
		if _, _, errno := unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, uintptr(limits[i].Resource), uintptr(unsafe.Pointer(&set[i])), 0, 0, 0); errno != 0 {
			return fmt.Errorf("set resource limit %d: %w", limits[i].Resource, errno)
		}
	}
	_, _, errno := unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(&args[0])), uintptr(unsafe.Pointer(&vars[0])))
	return &os.PathError{Op: "exec", Path: "leader", Err: errno}
}

func dropBounding() error {
	keep := make(map[uintptr]bool)
	for _, c := range kept {
		keep[c] = true
	}
	// EINVAL ends the list: the kernel's own, which may be longer than ours.
	for c := uintptr(0); ; c++ {
		if keep[c] {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if err == unix.EINVAL && c > 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
}

// setSignals undoes what an agent started with nohup would hand down, and makes
// the program ignore what its caller does.
func setSignals(ignored []int) {
	action := func(sig, handler uintptr) {
		// A struct sigaction begins with the handler: SIG_DFL is 0, SIG_IGN is 1.
		sa := [64 / unsafe.Sizeof(handler)]uintptr{handler}
		unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&sa)), 0, 8, 0, 0) //nolint:errcheck // what cannot be ignored is not
	}
	const sigDFL, sigIGN = 0, 1
	for _, sig := range []syscall.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGPIPE, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU} {
		action(uintptr(sig), sigDFL)
	}
	for _, sig := range ignored {
		if sig > 0 {
			action(uintptr(sig), sigIGN)
		}
	}
}

// lookPath finds the program as a shell would, with the rights of the user
// whom this thread has become.
func lookPath(name string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		if err := executable(name); err != nil {
			return "", cannotRun(name, err)
		}
		return name, nil
	}
	path := "/usr/local/bin:/usr/bin:/bin"
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
	}
	var found error = unix.ENOENT
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, name)
		if dir == "" {
			file = "./" + name
		}
		err := executable(file)
		if err == nil {
			return file, nil
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
			found = err
		}
	}
	return "", cannotRun(name, found)
}

func cannotRun(name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NotFound, "run", name, err, "")
	}
	return fault.New(fault.Refused, "run", name, err, "")
}

func executable(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.EISDIR
	}
	return unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS)
}
