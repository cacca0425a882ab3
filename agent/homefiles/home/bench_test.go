package home_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The benchmarks do one piece of work on the local disk, on home files and, if
// it is installed, on sshfs, by turns in one run, and report the medians and
// their ratios: on a busy machine only those mean something.
//
//	go test -run '^$' -bench . -benchtime 1x ./agent/homefiles/home

const benchRounds = 3

// places are where the work is done, the local disk first.
type place struct {
	name string
	dir  string
	// cold forgets what the place has cached.
	cold func()
}

func benchPlaces(b *testing.B) []place {
	p := newPair(b, options{})
	os.Chmod(p.dir, 0o777)
	drop := func() {
		syscall.Sync()
		os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0o200) // names only: home stays warm
	}
	places := []place{{"disk", p.dir, drop}, {"home", p.mnt, func() { p.remount(b) }}}
	if mnt, remount, ok := mountSSHFS(b, p.dir); ok {
		places = append(places, place{"sshfs", mnt, remount})
	}
	return places
}

// remount mounts again, so that the node has nothing cached.
func (p *pair) remount(b *testing.B) {
	p.fwd.stop()
	select {
	case <-p.fwd.done:
	case <-time.After(10 * time.Second):
		b.Fatal("forwarder does not end")
	}
	p.fwd = p.mount(p.mnt, 1, options{})
}

// mountSSHFS mounts a directory by sshfs over sftp on loopback, encrypted as
// ssh does, with its default caches.
func mountSSHFS(b *testing.B, dir string) (string, func(), bool) {
	for _, n := range []string{"sshfs", "ssh", "/usr/sbin/sshd", "ssh-keygen"} {
		if _, err := exec.LookPath(n); err != nil {
			b.Logf("no %s: sshfs is not compared", n)
			return "", nil, false
		}
	}
	conf, mnt := b.TempDir(), b.TempDir()
	sh := func(script string) bool {
		out, err := exec.CommandContext(deadline(b, 30*time.Second), "sh", "-euc", script, "sh", conf, dir, mnt).CombinedOutput()
		if err != nil {
			b.Logf("sshfs is not compared: %v: %s", err, out)
		}
		return err == nil
	}
	if !sh(`ssh-keygen -q -t ed25519 -N "" -f $1/host; ssh-keygen -q -t ed25519 -N "" -f $1/key; cp $1/key.pub $1/auth; chmod 600 $1/auth
		mkdir -p /run/sshd
		printf 'HostKey %s\nAuthorizedKeysFile %s\nStrictModes no\nUsePAM no\nPermitRootLogin yes\nSubsystem sftp internal-sftp\nMaxStartups 100\n' $1/host $1/auth >$1/sshd_config
		printf '#!/bin/sh\nexec ssh -F none -i %s -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o ProxyCommand="/usr/sbin/sshd -i -f %s" "$@"\n' $1/key $1/sshd_config >$1/ssh; chmod 755 $1/ssh`) {
		return "", nil, false
	}
	mount := func() bool {
		// In a session of its own: an sshd that ends kills its process group.
		return sh(`setsid -w sshfs -o ssh_command=$1/ssh,allow_other,default_permissions root@localhost:$2 $3`)
	}
	if !mount() {
		return "", nil, false
	}
	b.Cleanup(func() { syscall.Unmount(mnt, syscall.MNT_DETACH) })
	return mnt, func() {
		syscall.Unmount(mnt, syscall.MNT_DETACH)
		mount()
	}, true
}

// compare does the work in each place by turns. prepare is run before each,
// untimed, with the name of a directory of its own.
func compare(b *testing.B, cold bool, prepare, work string) {
	needs(b, "sh")
	places := benchPlaces(b)
	times := make([][]time.Duration, len(places))
	for round := range benchRounds * b.N {
		for i, pl := range places {
			dir := fmt.Sprintf("%s-%d", pl.name, round)
			run := func(script string) time.Duration {
				cmd := exec.CommandContext(deadline(b, 2*time.Minute), "sh", "-euc", in(filepath.Join(pl.dir, dir), script))
				asUser(cmd, root)
				cmd.Env = append(os.Environ(), "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1")
				began := time.Now()
				if out, err := cmd.CombinedOutput(); err != nil {
					b.Fatalf("%s in %s: %v: %s", script, pl.name, err, out)
				}
				return time.Since(began)
			}
			if err := os.Mkdir(filepath.Join(places[0].dir, dir), 0o777); err != nil {
				b.Fatal(err)
			}
			if prepare != "" {
				at := pl
				pl = places[0] // made at home, as what a job finds there
				run(prepare)
				pl = at
			}
			if cold {
				pl.cold()
			} else {
				run("find . -type f -exec cat {} + >/dev/null; sleep 0.01")
			}
			times[i] = append(times[i], run(work))
		}
	}
	disk := median(times[0])
	var line []string
	for i, pl := range places {
		m := median(times[i])
		b.ReportMetric(float64(m.Microseconds())/1000, pl.name+"-ms")
		line = append(line, fmt.Sprintf("%s %v (%.1fx)", pl.name, m.Round(time.Millisecond/10), float64(m)/float64(disk)))
	}
	b.ReportMetric(0, "ns/op")
	b.Log(strings.Join(line, ", "))
}

func median(d []time.Duration) time.Duration {
	s := append([]time.Duration(nil), d...)
	for i := range s {
		for j := i; j > 0 && s[j] < s[j-1]; j-- {
			s[j], s[j-1] = s[j-1], s[j]
		}
	}
	return s[len(s)/2]
}

func BenchmarkReadCold(b *testing.B) {
	compare(b, true, "head -c 64M /dev/urandom >f", "cat f >/dev/null")
}

func BenchmarkReadWarm(b *testing.B) {
	compare(b, false, "head -c 64M /dev/urandom >f", "cat f >/dev/null")
}

func BenchmarkWriteFsync(b *testing.B) {
	compare(b, false, "", "dd if=/dev/zero of=f bs=1M count=64 conv=fsync status=none")
}

func BenchmarkUntar(b *testing.B) {
	n := 5000
	if testing.Short() {
		n = 500
	}
	compare(b, false, fmt.Sprintf("mkdir s; for i in $(seq %d); do echo $i-some-text >s/f$i; done; tar cf ../t.tar s; rm -r s; mv ../t.tar .", n), "tar xf t.tar")
}

func BenchmarkGitStatus(b *testing.B) {
	needs(b, "git")
	compare(b, false, "git init -q; git config user.name n; git config user.email e; for i in $(seq 500); do echo $i >f$i; done; git add .; git commit -qm c", "git -c safe.directory='*' status --short")
}

func BenchmarkInterpreterStarts(b *testing.B) {
	const python = "/usr/bin/python3" // not a wrapper that somebody has put before it
	if _, err := os.Stat(python); err != nil {
		b.Skip(err)
	}
	prepare := "mkdir lib; for m in json email http; do cp -r $(" + python + " -c \"import $m,os;print(os.path.dirname($m.__file__))\") lib/x$m; done; cp -L " + python + " py"
	compare(b, false, prepare, "for i in 1 2 3 4 5 6 7 8 9 10; do ./py -c 'import sys; sys.path.insert(0, \"lib\"); import xjson, xemail, xhttp'; done")
}
