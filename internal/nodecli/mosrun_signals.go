package nodecli

import (
	"context"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"mosimg/agent/jobs/client"
)

// forwarded are the signals that go on to the job; those that a terminal sends
// to everybody in the foreground go to the program's process group.
var forwarded = map[syscall.Signal]struct{ group, deadly bool }{
	syscall.SIGHUP:   {group: true, deadly: true},
	syscall.SIGINT:   {group: true, deadly: true},
	syscall.SIGQUIT:  {group: true, deadly: true},
	syscall.SIGWINCH: {group: true},
	syscall.SIGTERM:  {deadly: true},
	syscall.SIGABRT:  {deadly: true},
	syscall.SIGALRM:  {},
	syscall.SIGUSR1:  {},
	syscall.SIGUSR2:  {},
}

// stopPatience is how long a job may take to stand still before its mosrun
// stops all the same: a shell waits for that.
const stopPatience = 5 * time.Second

// catchSignals takes the signals that mean the job, but for those that this
// process was started to ignore.
func catchSignals(ignored []int) <-chan os.Signal {
	// Reading a terminal in the background, and a file that grows beyond the limit,
	// are errors for us and must not stop or end a mosrun whose job is well.
	signal.Ignore(syscall.SIGTTIN, syscall.SIGXFSZ)
	ch := make(chan os.Signal, 64)
	wanted := []os.Signal{syscall.SIGCONT}
	for sig := range forwarded {
		if !slices.Contains(ignored, int(sig)) {
			wanted = append(wanted, sig)
		}
	}
	if !slices.Contains(ignored, int(syscall.SIGTSTP)) {
		wanted = append(wanted, syscall.SIGTSTP)
	}
	signal.Notify(ch, wanted...)
	return ch
}

// forward passes one signal on to the job.
func forward(ctx context.Context, job *client.Session, sig os.Signal) {
	s, ok := sig.(syscall.Signal)
	if !ok {
		return
	}
	switch s {
	case syscall.SIGTSTP:
		// The job's group is orphaned, so a SIGTSTP there would be dropped: it is
		// frozen instead, and this process stops for the shell to see.
		ctx, cancel := context.WithTimeout(ctx, stopPatience)
		_ = job.Stop(ctx) // an agent that is away stops it when it is back
		cancel()
		raise(s)
		// Either fg or bg has continued us, or we are in an orphaned group too and
		// were not stopped at all.
		job.Cont()
	case syscall.SIGCONT:
		job.Cont()
	default:
		job.Signal(int(s), forwarded[s].group)
	}
}

// raise sends a signal to this process with its default action, which the Go
// runtime does not restore: after signal.Reset a SIGTSTP is dropped and a SIGQUIT
// prints goroutines. It returns if the process goes on.
func raise(sig syscall.Signal) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// An all-zero struct sigaction is SIG_DFL, on every architecture.
	var dfl, old [4]uint64
	sigaction(sig, &dfl, &old)
	defer sigaction(sig, &old, nil)
	var set unix.Sigset_t
	bits := int(unsafe.Sizeof(set.Val[0])) * 8
	set.Val[(int(sig)-1)/bits] |= 1 << ((int(sig) - 1) % bits)
	_ = unix.PthreadSigmask(unix.SIG_UNBLOCK, &set, nil) // fails for no such signal only
	// To this thread, so that it has happened when the call returns.
	_ = unix.Tgkill(unix.Getpid(), unix.Gettid(), sig)
}

func sigaction(sig syscall.Signal, set, old *[4]uint64) {
	const setSize = 8 // the kernel's sigset_t
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(set)), uintptr(unsafe.Pointer(old)), setSize, 0, 0)
}

// dieBy ends this process by a signal, as its job did. The core, if any, is the job's:
// not dumpable rather than RLIMIT_CORE 0, which a core_pattern with a pipe does
// not heed. It returns if the signal does not kill.
func dieBy(sig syscall.Signal) {
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0) // at worst a core too many
	raise(sig)
}
