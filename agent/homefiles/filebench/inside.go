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
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"mosimg/internal/fault"
)

// run is a tmpfs of the namespace: sockets, keys and mount points are in it.
const run = "/run"

// Main measures, in namespaces that Run has made, and writes samples to out.
func Main(ctx context.Context, config string, out io.Writer) (err error) {
	var conf Config
	if err := json.Unmarshal([]byte(config), &conf); err != nil {
		return fault.New(fault.Usage, "read", "what to measure", err, "use: mosimg bench homefs")
	}
	if os.Getpid() != 1 {
		return fault.New(fault.Usage, "measure", "home files", "not in a namespace of its own", "use: mosimg bench homefs")
	}
	if err := furnish(); err != nil {
		return fault.New(fault.Environment, "furnish", "a namespace", err, "")
	}
	works := worksOf(conf)
	if err := fill(ctx, conf); err != nil {
		return err
	}
	ours, err := newOurs(ctx)
	if err != nil {
		return err
	}
	peers := []peer{ours, disk{}}
	if !conf.NoSSHFS {
		sshfs, err := newSSHFS(ctx)
		if err != nil {
			return err
		}
		peers = append(peers, sshfs)
	}
	enc := json.NewEncoder(out)
	for _, link := range conf.Links {
		for n := range conf.Runs {
			r := round{conf: conf, link: link, run: n + 1, peers: peers}
			if err := r.do(ctx, works, enc.Encode); err != nil {
				return fmt.Errorf("round %d, link %v: %w", n+1, link, err)
			}
		}
	}
	return nil
}

// furnish makes this namespace a machine: what is mounted stays here, there are
// processes and an own loopback.
func furnish() error {
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"tmpfs", run, "tmpfs", unix.MS_NOSUID | unix.MS_NODEV},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// peer is a way to the home's files.
type peer interface {
	// mount gives the root of the home's tree, with nothing cached.
	mount(ctx context.Context, link time.Duration) (root string, unmount func() error, err error)
}

// disk is the home's own way.
type disk struct{}

func (disk) mount(context.Context, time.Duration) (string, func() error, error) {
	return "/", func() error { return nil }, nil
}

// round is one turn of all the work in all places.
type round struct {
	conf  Config
	link  time.Duration
	run   int
	peers []peer // ours, disk, and sshfs if it is not left out
}

func (r round) do(ctx context.Context, works []work, emit func(any) error) (err error) {
	roots, dirs := make([]string, len(r.peers)), make([]string, len(r.peers))
	for i, p := range r.peers {
		var unmount func() error
		if roots[i], unmount, err = p.mount(ctx, r.link); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, unmount()) }()
		if dirs[i], err = os.MkdirTemp(r.conf.Dir, "work-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dirs[i])) }()
	}
	// The home has what is read first in its memory.
	if _, err := (work{script: "cat $SRC/" + bigName + " >/dev/null"}).time(ctx, "/", r.conf.Dir, r.conf.Dir); err != nil {
		return err
	}
	for _, w := range works {
		took := make([]float64, len(r.peers))
		for k := range r.peers {
			i := (k + r.run) % len(r.peers) // nobody is always first
			if err := settle(r.conf.Dir); err != nil {
				return err
			}
			if took[i], err = w.time(ctx, roots[i], r.conf.Dir, dirs[i]); err != nil {
				return err
			}
		}
		s := Sample{Link: r.link, Work: w.name, Run: r.run, Ours: took[0], Disk: took[1]}
		if len(took) > 2 {
			s.SSHFS = took[2]
		}
		if err := emit(s); err != nil {
			return err
		}
	}
	return nil
}

// settle writes to the disk what earlier work has left to be written.
func settle(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fault.New(fault.Environment, "write", "dirty pages of "+dir, err, "")
	}
	return nil
}

// command is one that ends with ctx, and whose failure is told with what it said.
func command(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fault.New(fault.Environment, "run", filepath.Base(name), fmt.Errorf("%w: %s", err, out), "")
	}
	return string(out), nil
}
