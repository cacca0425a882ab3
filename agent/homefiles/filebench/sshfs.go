package filebench

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
	"mosimg/internal/slowlink"
)

// sshfs is the peer: Debian's, with its default caches, ssh's default cipher, and
// a sshd of this namespace.
type sshfs struct {
	home string // where sshd listens
	dir  string // its mount point
}

const sshdAddr = "127.0.0.1:22" // of our own loopback

func newSSHFS(ctx context.Context) (*sshfs, error) {
	s := &sshfs{home: sshdAddr, dir: filepath.Join(run, "sshfs")}
	for _, dir := range []string{"/run/sshd", s.dir} { // the first is where sshd locks itself in
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
	}
	for _, key := range []string{"host", "user"} {
		if _, err := command(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(run, key)); err != nil {
			return nil, err
		}
	}
	conf := fmt.Sprintf("ListenAddress %s\nHostKey %s/host\nAuthorizedKeysFile %[2]s/user.pub\nStrictModes no\nUsePAM no\n"+
		"PermitRootLogin prohibit-password\nPidFile none\nSubsystem sftp internal-sftp\n", sshdAddr, run)
	file := filepath.Join(run, "sshd_config")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		return nil, err
	}
	log := filepath.Join(run, "sshd.log")
	sshd, ok := find("sshd", path)
	if !ok {
		return nil, fault.New(fault.Environment, "find", "sshd", "it was there a moment ago", "")
	}
	cmd := exec.CommandContext(ctx, sshd, "-D", "-f", file, "-E", log)
	if err := cmd.Start(); err != nil {
		return nil, fault.New(fault.Environment, "start", "sshd", err, "")
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for until := time.After(10 * time.Second); ; {
		if c, err := net.Dial("tcp", s.home); err == nil {
			c.Close()
			return s, nil
		}
		select {
		case err := <-ended:
			text, _ := os.ReadFile(log) // the better half of the story, if it is there
			return nil, fault.New(fault.Environment, "start", "sshd", fmt.Errorf("it ends at once: %w: %s", err, text), "")
		case <-until:
			return nil, fault.New(fault.Environment, "start", "sshd", "it does not listen", "")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *sshfs) mount(ctx context.Context, link time.Duration) (string, func() error, error) {
	lctx, cut := context.WithCancel(ctx)
	addr, err := s.home, error(nil)
	if link > 0 {
		addr, err = slowlink.TCP(lctx, s.home, link)
	}
	var port string
	if err == nil {
		_, port, err = net.SplitHostPort(addr)
	}
	if err == nil {
		// It returns when the mount answers. Nobody else can be on this loopback.
		_, err = command(ctx, "sshfs", "root@127.0.0.1:/", s.dir, "-p", port, "-F", "/dev/null",
			"-o", "BatchMode=yes,StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null,LogLevel=ERROR,IdentityFile="+filepath.Join(run, "user"))
	}
	if err != nil {
		cut()
		return "", nil, err
	}
	return s.dir, func() error {
		defer cut()
		// With force: a command that was killed may still be waiting there.
		if err := unix.Unmount(s.dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
			return fault.New(fault.Environment, "unmount", "sshfs", err, "")
		}
		return nil
	}, nil
}
