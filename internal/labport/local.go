package labport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/atomicfile"
)

// Local is the machine that this process runs on.
type Local struct{}

// drainTime is how long a command's output is still read after it ended: a
// daemon that it left behind may hold the pipe open for ever.
const drainTime = 2 * time.Second

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/bbin"

// Run implements Machine. The command gets a session of its own, so that all
// of it can be killed.
func (Local) Run(ctx context.Context, c Cmd) (Exit, error) {
	if len(c.Argv) == 0 {
		return Exit{}, errors.New("run: no command given")
	}
	who, err := lookup(c.User)
	if err != nil {
		return Exit{}, fmt.Errorf("run %s: %w", c.Argv[0], err)
	}
	cmd := exec.CommandContext(ctx, findProgram(c.Argv[0]), c.Argv[1:]...)
	cmd.Args[0] = c.Argv[0]
	cmd.Env = append([]string{"PATH=" + defaultPath, "HOME=" + who.home, "USER=" + who.name, "LOGNAME=" + who.name, "TERM=dumb", "LANG=C.UTF-8"}, c.Env...)
	cmd.Dir = c.Dir
	if cmd.Dir == "" {
		cmd.Dir = who.home
	}
	if _, err := os.Stat(cmd.Dir); err != nil && c.Dir == "" {
		cmd.Dir = "/"
	}
	cmd.Stdout, cmd.Stderr = c.Stdout, c.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if who.credential != nil {
		cmd.SysProcAttr.Credential = who.credential
	}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = drainTime

	// exec.Cmd would wait for a Stdin that is no file until it ends, and a
	// host's standard input may never end: so the pipe is ours.
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return Exit{}, err
	}
	if err := cmd.Start(); err != nil {
		return Exit{}, err // an *exec.Error or *fs.PathError, which names the program
	}
	go func() {
		defer stdin.Close()
		if c.Stdin != nil {
			_, _ = io.Copy(stdin, c.Stdin) // the command may end before its input does
		}
	}()
	err = cmd.Wait()
	if cmd.ProcessState == nil {
		return Exit{}, err
	}
	if ctx.Err() != nil {
		return exitOf(cmd.ProcessState), fmt.Errorf("run %s: %w", c.Argv[0], context.Cause(ctx))
	}
	return exitOf(cmd.ProcessState), nil
}

// findProgram looks a bare name up in the path that the command will have:
// an init has none of its own.
func findProgram(name string) string {
	if strings.Contains(name, "/") {
		return name
	}
	for dir := range strings.SplitSeq(defaultPath, ":") {
		p := filepath.Join(dir, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return p
		}
	}
	return name
}

func exitOf(p *os.ProcessState) Exit {
	if ws, ok := p.Sys().(syscall.WaitStatus); ok && ws.Signal() >= 0 {
		return Exit{Status: 128 + int(ws.Signal()), Signal: unix.SignalName(ws.Signal())}
	}
	return Exit{Status: p.ExitCode()}
}

// Put implements Machine.
func (Local) Put(ctx context.Context, path string, mode fs.FileMode, content io.Reader) error {
	return atomicfile.WriteFunc(path, mode, func(w io.Writer) error {
		_, err := io.Copy(w, content)
		return errors.Join(err, ctx.Err())
	})
}

// account is a user as a command needs it.
type account struct {
	name, home string
	credential *syscall.Credential // nil: as this process
}

// lookup finds a user; "" is the user of this process, root on a head.
func lookup(name string) (account, error) {
	if name == "" {
		return account{name: "root", home: "/root"}, nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return account{}, err
	}
	uid, err := id(u.Uid)
	if err != nil {
		return account{}, err
	}
	gid, err := id(u.Gid)
	if err != nil {
		return account{}, err
	}
	a := account{name: u.Username, home: u.HomeDir}
	if os.Geteuid() != 0 {
		if int(uid) != os.Geteuid() {
			return account{}, fmt.Errorf("become %s: this process is not root", name)
		}
		return a, nil
	}
	a.credential = &syscall.Credential{Uid: uid, Gid: gid, Groups: []uint32{gid}}
	groups, err := u.GroupIds()
	if err != nil {
		return account{}, err
	}
	for _, g := range groups {
		if n, err := id(g); err == nil && n != gid {
			a.credential.Groups = append(a.credential.Groups, n)
		}
	}
	return a, nil
}

func id(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}
