// Package filebench measures home files beside sshfs and beside the local disk:
// the same work in each of the three by turns, on a mount that is fresh in each
// round, and over a link of a given delay.
//
// Home and node are this machine. Ours is the whole way of the product: the
// mount's process, the agents' two ends of TLS, the keeper. sshfs is that of the
// distribution with its defaults and a sshd of its own. All of it lives in
// namespaces of mounts, processes and network that end with the measurement,
// however it ends, so that nothing is reached from outside and nothing is left.
//
// "Cold" is a node that has nothing in its cache while the home has; a disk is
// then read from the page cache, too. The delay is made by a relay of TCP
// streams in this process, the same for both peers, because not every kernel has
// netem; it limits no bandwidth and loses nothing.
package filebench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"mosimg/internal/fault"
)

// Verb is the first argument that makes a program which calls Main the one that
// measures; the second is a Config in JSON. Such a program must also be what
// packages keeper and mounts start.
const Verb = "bench-homefs-inside"

// Config says what to measure.
type Config struct {
	// Dir is a folder on the disk that is compared and that holds the home's files.
	Dir string
	// NoSSHFS leaves sshfs out, whose server not every machine should have.
	NoSSHFS bool
	// Links are the round-trip times of the links; 0 is loopback as it is.
	Links  []time.Duration
	Runs   int // rounds for each link
	MiB    int // size of the file that is read and written
	Files  int // how many files the archive has; a repository has a tenth of it
	Starts int // how often the interpreter is started
}

// Sample is one piece of work, done once in each place next to each other.
type Sample struct {
	Link time.Duration
	Work string // a name of Works
	Run  int    // from 1
	// Seconds it took; SSHFS is 0 when it was left out.
	Ours, SSHFS, Disk float64
}

// MaxLink bounds a link's round-trip time: with more, a round takes hours.
const MaxLink = 100 * time.Millisecond

func (c Config) check() error {
	var bad fault.List
	for _, f := range []struct {
		name string
		n    int
	}{{"--runs", c.Runs}, {"--mib", c.MiB}, {"--files", c.Files}, {"--starts", c.Starts}} {
		if f.n < 1 {
			bad.Addf("%s must be 1 or more", f.name)
		}
	}
	if len(c.Links) == 0 {
		bad.Addf("--link names no link")
	}
	for _, l := range c.Links {
		if l < 0 || l > MaxLink {
			bad.Addf("--link %v: a round trip takes 0 to %v", l, MaxLink)
		}
	}
	return bad.Err(fault.Usage, "read flags of", "mosimg bench homefs", "")
}

type program struct{ name, pkg string }

// needed are the programs that are run, and the Debian packages they come from;
// neededBySSHFS those only for it.
var needed = []program{
	{"git", "git"}, {"tar", "tar"}, {"dd", "coreutils"}, {"python3", "python3"}, {"sh", "dash"},
}

var neededBySSHFS = []program{
	{"sshfs", "sshfs"}, {"sshd", "openssh-server"}, {"ssh", "openssh-client"}, {"ssh-keygen", "openssh-client"},
}

// path is where programs are looked for: sshd is in none of a user's folders.
const path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// find finds a program in the folders of search.
func find(program, search string) (string, bool) {
	for _, dir := range filepath.SplitList(search) {
		p := filepath.Join(dir, program)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return p, true
		}
	}
	return "", false
}

func (c Config) checkMachine(search string) error {
	const op, object = "measure", "home files"
	if os.Geteuid() != 0 {
		return fault.New(fault.Refused, op, object, "only root can mount and make namespaces", "run this as root")
	}
	all := needed
	if !c.NoSSHFS {
		all = slices.Concat(neededBySSHFS, needed)
	}
	var missing, pkgs []string
	for _, p := range all {
		if _, ok := find(p.name, search); !ok {
			missing = append(missing, p.name)
			if !slices.Contains(pkgs, p.pkg) {
				pkgs = append(pkgs, p.pkg)
			}
		}
	}
	if len(missing) > 0 {
		help := "apt-get install " + strings.Join(pkgs, " ")
		if !c.NoSSHFS {
			help += "; --sshfs=false measures without sshfs"
		}
		return fault.New(fault.Environment, op, object, "not found: "+strings.Join(missing, ", "), help)
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return fault.New(fault.Environment, op, object, err, "the kernel needs FUSE: modprobe fuse")
	}
	return nil
}

// Run measures, and hands over each sample when it is there. It needs root.
func Run(ctx context.Context, conf Config, messages io.Writer, each func(Sample)) (err error) {
	if err := conf.check(); err != nil {
		return err
	}
	if err := conf.checkMachine(path); err != nil {
		return err
	}
	if conf.Dir, err = os.MkdirTemp(conf.Dir, "mosimg-bench-"); err != nil {
		return fault.New(fault.Environment, "make", "a folder to measure in", err, "choose another one with --dir")
	}
	// What was mounted below it was so in a namespace that is gone by then.
	defer func() { err = errors.Join(err, os.RemoveAll(conf.Dir)) }()
	if conf.Dir, err = filepath.Abs(conf.Dir); err != nil {
		return err
	}
	data, err := json.Marshal(conf)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	// The signal at the parent's death comes when the thread that is the parent ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", Verb, string(data))
	cmd.Env = []string{"PATH=" + path, "LC_ALL=C", "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1"}
	cmd.Stdout, cmd.Stderr = w, messages
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWIPC,
		Setsid:     true, Pdeathsig: syscall.SIGKILL,
	}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fault.New(fault.Environment, "start", "measuring", fmt.Errorf("in new namespaces: %w", err), "the kernel must allow them")
	}
	for d := json.NewDecoder(r); ; {
		var s Sample
		if d.Decode(&s) != nil {
			break // it ends, and its status says how
		}
		each(s)
	}
	err = cmd.Wait()
	if ctx.Err() != nil {
		return fault.New(fault.Unavailable, "measure", "home files", "interrupted", "")
	}
	return err
}
