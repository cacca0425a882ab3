package home_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func init() { helpers["posix"] = posixHelper }

// posixCase does something in an empty directory, its working directory, and
// says what it saw. What it says must be the same on the mount as on the
// local file system under it.
type posixCase struct {
	name string
	do   func(say func(format string, args ...any))
}

func open(path string, flags int, mode uint32) int {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, mode)
	if err != nil {
		panic(fmt.Sprintf("open %s: %v", path, err))
	}
	return fd
}

func write(path, content string, mode uint32) {
	fd := open(path, unix.O_CREAT|unix.O_WRONLY|unix.O_TRUNC, mode)
	unix.Write(fd, []byte(content))
	unix.Close(fd)
}

func read(path string) string {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err.Error()
	}
	defer unix.Close(fd)
	return content(fd)
}

func content(fd int) string {
	b := make([]byte, 1<<16)
	n, err := unix.Pread(fd, b, 0)
	if err != nil {
		return err.Error()
	}
	return string(b[:n])
}

func stat(path string) string {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err.Error()
	}
	return fmt.Sprintf("mode %o nlink %d uid %d gid %d size %d", st.Mode, st.Nlink, st.Uid, st.Gid, sizeOf(&st))
}

// sizeOf leaves the size of directories out: it is the file system's own.
func sizeOf(st *unix.Stat_t) int64 {
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return 0
	}
	return st.Size
}

func list(path string) []string {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return []string{err.Error()}
	}
	defer unix.Close(fd)
	var names []string
	b := make([]byte, 8192)
	for {
		n, err := unix.Getdents(fd, b)
		if err != nil {
			return append(names, err.Error())
		}
		if n == 0 {
			slices.Sort(names)
			return names
		}
		_, _, names = unix.ParseDirent(b[:n], -1, names)
	}
}

type say = func(string, ...any)

var posixCases = []posixCase{
	{"create and modes", func(say say) {
		unix.Umask(0o027)
		write("f", "x", 0o666)
		unix.Mkdir("d", 0o777)
		unix.Mkfifo("p", 0o666)
		unix.Mknod("r", unix.S_IFREG|0o640, 0)
		for _, n := range []string{"f", "d", "p", "r"} {
			say("%s %s", n, stat(n))
		}
		say("again: %v", unix.Mkdir("d", 0o777))
		_, err := unix.Open("f", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o600)
		say("excl: %v", err)
		_, err = unix.Open("none", unix.O_RDONLY, 0)
		say("none: %v", err)
		_, err = unix.Open("f/x", unix.O_RDONLY, 0)
		say("under a file: %v", err)
		unix.Umask(0)
		write("open", "", 0o7777)
		say("set-id at creation: %s", stat("open"))
		say("device: %v", unix.Mknod("dev", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		fd := open("zero", unix.O_CREAT|unix.O_RDWR, 0)
		n, err := unix.Write(fd, []byte("ok"))
		say("mode 0: %d %v %s", n, err, stat("zero"))
		unix.Close(fd)
		_, err = unix.Open("zero", unix.O_RDONLY, 0)
		say("mode 0 again: %v", err)
	}},
	{"names", func(say say) {
		long := strings.Repeat("n", 255)
		write(long, "x", 0o600)
		say("255: %s", stat(long))
		_, err := unix.Open(long+"n", unix.O_CREAT|unix.O_WRONLY, 0o600)
		say("256: %v", err)
		write("a\nb c\xff", "x", 0o600)
		say("odd: %q", list("."))
		say("rmdir of a file: %v, unlink of none: %v", unix.Rmdir(long), unix.Unlink("none"))
		unix.Mkdir("d", 0o700)
		write("d/x", "", 0o600)
		say("unlink of a directory: %v, rmdir of a full one: %v", unix.Unlink("d") != nil, unix.Rmdir("d"))
		say("rmdir .: %v, ..: %v", unix.Rmdir("d/."), unix.Rmdir("d/.."))
	}},
	{"links", func(say say) {
		write("a", "one", 0o644)
		say("link: %v %s", unix.Link("a", "b"), stat("b"))
		say("link onto: %v, of none: %v", unix.Link("a", "b"), unix.Link("none", "c"))
		unix.Mkdir("d", 0o755)
		say("link of a directory: %v", unix.Link("d", "e"))
		say("symlink: %v %s", unix.Symlink("a", "s"), stat("s"))
		b := make([]byte, 100)
		n, err := unix.Readlink("s", b)
		say("readlink: %q %v, of a file: %v", b[:max(n, 0)], err, func() error { _, err := unix.Readlink("a", b); return err }())
		say("through: %q", read("s"))
		say("link of a symlink: %v %s", unix.Link("s", "t"), stat("t"))
		unix.Symlink("loop", "loop")
		say("loop: %s", read("loop"))
		say("dangling: %v %s", unix.Symlink("nowhere", "x"), read("x"))
		_, err = unix.Open("s", unix.O_RDONLY|unix.O_NOFOLLOW, 0)
		say("nofollow: %v", err)
		unix.Unlink("a")
		say("b after unlink of a: %s %q", stat("b"), read("b"))
		long := strings.Repeat("l", 4000)
		unix.Symlink(long, "long")
		big := make([]byte, 5000)
		n, _ = unix.Readlink("long", big)
		say("long target: %d", n)
	}},
	{"rename", func(say say) {
		write("a", "a", 0o644)
		write("b", "b", 0o644)
		say("over: %v %q %v", unix.Rename("a", "b"), read("b"), list("."))
		unix.Mkdir("d", 0o755)
		unix.Mkdir("e", 0o755)
		write("e/x", "x", 0o644)
		say("file over directory: %v, directory over file: %v", unix.Rename("b", "d"), unix.Rename("d", "b"))
		say("over a full directory: %v", unix.Rename("d", "e"))
		say("over an empty one: %v %v", unix.Rename("e", "d"), list("d"))
		say("into itself: %v", unix.Rename("d", "d/x/y"))
		say("into its child: %v", unix.Rename("d", "d/z"))
		say("noreplace: %v", unix.Renameat2(unix.AT_FDCWD, "b", unix.AT_FDCWD, "d", unix.RENAME_NOREPLACE))
		say("exchange: %v %v", unix.Renameat2(unix.AT_FDCWD, "b", unix.AT_FDCWD, "d", unix.RENAME_EXCHANGE), list("b"))
		unix.Link("d", "d2")
		say("hard links: %v %v", unix.Rename("d", "d2"), list("."))
		fd := open("b/x", unix.O_RDWR, 0)
		unix.Rename("b/x", "moved")
		unix.Write(fd, []byte("via fd"))
		say("open while renamed: %q", read("moved"))
		unix.Close(fd)
	}},
	{"unlink while open", func(say say) {
		fd := open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
		unix.Write(fd, []byte("gone"))
		unix.Unlink("f")
		var st unix.Stat_t
		say("fstat: %v nlink %d size %d", unix.Fstat(fd, &st), st.Nlink, st.Size)
		unix.Pwrite(fd, []byte(" but here"), 4)
		say("content: %q", content(fd))
		say("chmod: %v, truncate: %v, fsync: %v", unix.Fchmod(fd, 0o600), unix.Ftruncate(fd, 2), unix.Fsync(fd))
		unix.Fstat(fd, &st)
		say("then: %o %d %q", st.Mode, st.Size, content(fd))
		write("f", "another", 0o644)
		say("both: %q %q", content(fd), read("f"))
		again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDWR, 0)
		say("reopen: %v %q", err, content(again))
		unix.Close(again)
		unix.Close(fd)
		unix.Mkdir("d", 0o755)
		dfd := open("d", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		unix.Rmdir("d")
		_, err = unix.Openat(dfd, "x", unix.O_CREAT|unix.O_WRONLY, 0o600)
		say("create in a removed directory: %v", err)
		unix.Close(dfd)
	}},
	{"write, append, truncate, holes", func(say say) {
		fd := open("f", unix.O_CREAT|unix.O_RDWR, 0o644)
		unix.Pwrite(fd, []byte("end"), 70000)
		var st unix.Stat_t
		unix.Fstat(fd, &st)
		say("size %d, few blocks: %v", st.Size, st.Blocks < 100)
		d, err := unix.Seek(fd, 0, unix.SEEK_DATA)
		say("data at %d %v", d, err)
		h, err := unix.Seek(fd, d, unix.SEEK_HOLE)
		say("hole at %d %v", h, err)
		_, err = unix.Seek(fd, 80000, unix.SEEK_DATA)
		say("beyond: %v", err)
		say("truncate: %v %v", unix.Ftruncate(fd, 10), unix.Truncate("f", 5000))
		b := make([]byte, 6000)
		n, _ := unix.Pread(fd, b, 0)
		say("zeros: %v of %d", bytes.Count(b[:n], []byte{0}), n)
		say("negative: %v, of a directory: %v", unix.Ftruncate(fd, -1), unix.Truncate(".", 0))
		say("fallocate: %v", unix.Fallocate(fd, 0, 0, 9000))
		say("keep size: %v", unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, 1<<20))
		unix.Fstat(fd, &st)
		say("size %d", st.Size)
		unix.Pwrite(fd, []byte("0123456789"), 0)
		say("punch: %v", unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 2, 3))
		unix.Pread(fd, b[:10], 0)
		say("punched: %q", b[:10])
		unix.Close(fd)
		write("log", "a", 0o644)
		x := open("log", unix.O_WRONLY|unix.O_APPEND, 0)
		y := open("log", unix.O_WRONLY|unix.O_APPEND, 0)
		unix.Write(x, []byte("b"))
		unix.Write(y, []byte("c"))
		unix.Pwrite(x, []byte("d"), 0)
		say("append: %q", read("log"))
		pos, _ := unix.Seek(y, 0, unix.SEEK_CUR)
		say("position: %d", pos)
		unix.Close(x)
		unix.Close(y)
		write("log", "new", 0o644)
		say("O_TRUNC: %q", read("log"))
		ro := open("log", unix.O_RDONLY, 0)
		_, err = unix.Write(ro, []byte("x"))
		say("write to a reader: %v, truncate: %v", err, unix.Ftruncate(ro, 0))
		unix.Close(ro)
		src, dst := open("log", unix.O_RDONLY, 0), open("copy", unix.O_CREAT|unix.O_WRONLY, 0o644)
		n, err = unix.CopyFileRange(src, nil, dst, nil, 100, 0)
		say("copy: %d %v %q", n, err, read("copy"))
		unix.Close(src)
		unix.Close(dst)
		dir := open(".", unix.O_RDONLY, 0)
		_, err = unix.Read(dir, b)
		say("read a directory: %v, fsync it: %v", err, unix.Fsync(dir))
		unix.Close(dir)
		_, err = unix.Open(".", unix.O_WRONLY, 0)
		say("write a directory: %v", err)
	}},
	{"times", func(say say) {
		write("f", "x", 0o644)
		ts := []unix.Timespec{{Sec: 1000, Nsec: 5}, {Sec: -2000, Nsec: 999999999}}
		say("set: %v", unix.UtimesNanoAt(unix.AT_FDCWD, "f", ts, 0))
		var st unix.Stat_t
		unix.Stat("f", &st)
		say("%v %v", st.Atim, st.Mtim)
		unix.Symlink("f", "s")
		say("of a link: %v", unix.UtimesNanoAt(unix.AT_FDCWD, "s", []unix.Timespec{{Sec: 7}, {Sec: 8}}, unix.AT_SYMLINK_NOFOLLOW))
		unix.Lstat("s", &st)
		say("%v", st.Mtim)
		unix.Stat("f", &st)
		say("target keeps %v", st.Mtim)
		unix.UtimesNanoAt(unix.AT_FDCWD, "f", []unix.Timespec{{Nsec: 1<<30 - 2}, {Sec: 5}}, 0)
		unix.Stat("f", &st)
		say("omit: %v %v", st.Atim, st.Mtim)
		before := time.Now().Add(-3 * time.Second)
		unix.UtimesNanoAt(unix.AT_FDCWD, "f", []unix.Timespec{{Nsec: 1<<30 - 1}, {Nsec: 1<<30 - 1}}, 0)
		unix.Stat("f", &st)
		say("now: %v", time.Unix(st.Mtim.Unix()).After(before))
		fd := open("f", unix.O_RDWR, 0)
		old := st
		time.Sleep(20 * time.Millisecond)
		unix.Write(fd, []byte("y"))
		unix.Fstat(fd, &st)
		say("write moves mtime: %v ctime: %v", st.Mtim != old.Mtim, st.Ctim != old.Ctim)
		old = st
		time.Sleep(20 * time.Millisecond)
		unix.Chmod("f", 0o600)
		unix.Fstat(fd, &st)
		say("chmod moves mtime: %v ctime: %v", st.Mtim != old.Mtim, st.Ctim != old.Ctim)
		unix.Close(fd)
	}},
	{"owners and set-id bits", func(say say) {
		write("f", "x", 0o755)
		say("chown to self: %v, to a group of mine: %v %s", unix.Chown("f", 1000, 1000), unix.Chown("f", -1, 2000), stat("f"))
		say("to others: %v, to a foreign group: %v", unix.Chown("f", 1001, -1), unix.Chown("f", -1, 4000))
		say("set-id: %v %s", unix.Chmod("f", 0o6755), stat("f"))
		fd := open("f", unix.O_WRONLY, 0)
		unix.Write(fd, []byte("y"))
		say("after write: %s", stat("f"))
		unix.Fchmod(fd, 0o6755)
		unix.Ftruncate(fd, 0)
		say("after truncate: %s", stat("f"))
		unix.Fchmod(fd, 0o2745)
		unix.Write(fd, []byte("y"))
		say("setgid without group execute: %s", stat("f"))
		unix.Fchmod(fd, 0o4755)
		say("chown drops: %v %s", unix.Fchown(fd, -1, 3000), stat("f"))
		unix.Close(fd)
		unix.Mkdir("d", 0o755)
		unix.Chown("d", -1, 2000)
		unix.Chmod("d", 0o2775)
		write("d/f", "", 0o644)
		unix.Mkdir("d/d", 0o755)
		say("setgid directory: %s; %s", stat("d/f"), stat("d/d"))
		say("root's file: %v", unix.Chmod("/etc", 0o755))
	}},
	{"permission", func(say say) {
		write("f", "secret", 0o200)
		say("read: %s", read("f"))
		say("access: %v %v %v", unix.Access("f", unix.R_OK), unix.Access("f", unix.W_OK), unix.Access("f", unix.X_OK))
		unix.Mkdir("d", 0o700)
		write("d/x", "x", 0o644)
		unix.Chmod("d", 0o400)
		say("list: %v, inside: %s", list("d"), stat("d/x"))
		unix.Chmod("d", 0o100)
		say("list: %v, inside: %s", list("d"), stat("d/x"))
		unix.Chmod("d", 0o500)
		say("create in a read-only directory: %v, unlink: %v", unix.Mkdir("d/y", 0o700), unix.Unlink("d/x"))
		unix.Chmod("d", 0o700)
	}},
	{"extended attributes", func(say say) {
		write("f", "", 0o644)
		b := make([]byte, 100)
		say("set: %v", unix.Setxattr("f", "user.a", []byte("value"), 0))
		n, err := unix.Getxattr("f", "user.a", b)
		say("get: %q %v", b[:max(n, 0)], err)
		n, err = unix.Getxattr("f", "user.a", nil)
		say("size: %d %v", n, err)
		_, err = unix.Getxattr("f", "user.a", b[:2])
		say("too small: %v", err)
		_, err = unix.Getxattr("f", "user.b", b)
		say("none: %v", err)
		say("create: %v, replace: %v", unix.Setxattr("f", "user.a", nil, unix.XATTR_CREATE), unix.Setxattr("f", "user.b", nil, unix.XATTR_REPLACE))
		n, err = unix.Listxattr("f", b)
		say("list: %q %v", b[:max(n, 0)], err)
		say("remove: %v %v", unix.Removexattr("f", "user.a"), unix.Removexattr("f", "user.a"))
		say("trusted: %v, security: %v", unix.Setxattr("f", "trusted.x", []byte("y"), 0), unix.Setxattr("f", "security.capability", make([]byte, 20), 0) != nil)
		unix.Symlink("f", "s")
		say("of a link: %v", unix.Lsetxattr("s", "user.a", []byte("v"), 0))
	}},
	{"tmpfile", func(say say) {
		fd, err := unix.Open(".", unix.O_TMPFILE|unix.O_RDWR, 0o640)
		say("open: %v", err)
		if err != nil {
			return
		}
		unix.Write(fd, []byte("late"))
		say("link: %v", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, "named", unix.AT_SYMLINK_FOLLOW))
		unix.Close(fd)
		say("then: %s %q", stat("named"), read("named"))
	}},
	{"directories", func(say say) {
		for i := range 300 {
			write(fmt.Sprintf("file-%03d", i), "", 0o600)
		}
		say("%d", len(list(".")))
		fd := open(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
		b := make([]byte, 1024)
		seen := map[string]int{}
		for {
			n, err := unix.Getdents(fd, b)
			if n <= 0 {
				say("end: %v", err)
				break
			}
			_, _, names := unix.ParseDirent(b[:n], -1, nil)
			for _, n := range names {
				seen[n]++
				unix.Unlink(n) // removing while reading must miss and repeat nothing
			}
		}
		say("seen %d", len(seen))
		for n, c := range seen {
			if c != 1 {
				say("%s seen %d times", n, c)
			}
		}
		unix.Seek(fd, 0, 0)
		n, _ := unix.Getdents(fd, b)
		_, _, names := unix.ParseDirent(b[:n], -1, nil)
		say("after rewind: %d", len(names))
		unix.Close(fd)
		say("nlink: %s", stat("."))
	}},
	{"locks in one process", func(say say) {
		a, b := open("f", unix.O_CREAT|unix.O_RDWR, 0o600), open("f", unix.O_RDWR, 0)
		set := func(fd int, cmd int, typ int16, start, n int64) error {
			return unix.FcntlFlock(uintptr(fd), cmd, &unix.Flock_t{Type: typ, Start: start, Len: n})
		}
		say("posix, both: %v %v", set(a, unix.F_SETLK, unix.F_WRLCK, 0, 0), set(b, unix.F_SETLK, unix.F_WRLCK, 0, 0))
		unix.Close(b)
		b = open("f", unix.O_RDWR, 0)
		say("ofd after close dropped all: %v", set(b, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 10))
		say("ofd conflicts: %v", set(a, unix.F_OFD_SETLK, unix.F_RDLCK, 5, 1))
		say("ofd beside: %v", set(a, unix.F_OFD_SETLK, unix.F_WRLCK, 10, 5))
		say("posix against ofd: %v", set(a, unix.F_SETLK, unix.F_WRLCK, 3, 1))
		lk := unix.Flock_t{Type: unix.F_WRLCK}
		unix.FcntlFlock(uintptr(a), unix.F_OFD_GETLK, &lk)
		say("getlk: type %d start %d len %d", lk.Type, lk.Start, lk.Len)
		unix.Close(b)
		say("ofd after close: %v", set(a, unix.F_OFD_SETLK, unix.F_WRLCK, 0, 10))
		b = open("f", unix.O_RDWR, 0)
		say("flock: %v %v", unix.Flock(a, unix.LOCK_EX|unix.LOCK_NB), unix.Flock(b, unix.LOCK_SH|unix.LOCK_NB))
		say("downgrade: %v %v", unix.Flock(a, unix.LOCK_SH|unix.LOCK_NB), unix.Flock(b, unix.LOCK_SH|unix.LOCK_NB))
		c, _ := unix.Dup(a)
		unix.Close(a)
		say("held by the dup: %v", unix.Flock(b, unix.LOCK_EX|unix.LOCK_NB))
		unix.Close(c)
		say("let go: %v", unix.Flock(b, unix.LOCK_EX|unix.LOCK_NB))
		r := open("f", unix.O_RDONLY, 0)
		say("write lock on a reader: %v", set(r, unix.F_SETLK, unix.F_WRLCK, 0, 1))
		say("read lock, then write through another: %v %v", set(r, unix.F_SETLK, unix.F_RDLCK, 0, 4), set(b, unix.F_SETLK, unix.F_WRLCK, 2, 4))
	}},
	{"mmap", func(say say) {
		fd := open("f", unix.O_CREAT|unix.O_RDWR, 0o600)
		unix.Ftruncate(fd, 3*4096)
		m, err := unix.Mmap(fd, 0, 3*4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			say("mmap: %v", err)
			return
		}
		copy(m[4090:], "across pages")
		say("msync: %v", unix.Msync(m, unix.MS_SYNC))
		b := make([]byte, 12)
		unix.Pread(fd, b, 4090)
		say("read: %q", b)
		unix.Pwrite(fd, []byte("WRITTEN"), 0)
		say("mapping sees: %q", m[:7])
		p, _ := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
		copy(p, "private")
		unix.Pread(fd, b, 0)
		say("private stays: %q %q", p[:7], b[:7])
		unix.Munmap(p)
		unix.Munmap(m)
		unix.Close(fd)
		say("after: %q", read("f")[4090:4102])
		fd = open("f", unix.O_RDWR|unix.O_APPEND, 0)
		m, _ = unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		copy(m, "in place")
		unix.Munmap(m)
		unix.Close(fd)
		say("mapping of an appender: %s %q", stat("f"), read("f")[:8])
	}},
	{"sockets and fifos", func(say say) {
		s, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		say("bind: %v", unix.Bind(s, &unix.SockaddrUnix{Name: "sock"}))
		unix.Listen(s, 1)
		c, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		say("connect: %v", unix.Connect(c, &unix.SockaddrUnix{Name: "sock"}))
		unix.Mkfifo("p", 0o600)
		p := open("p", unix.O_RDWR, 0)
		unix.Write(p, []byte("through"))
		b := make([]byte, 7)
		unix.Read(p, b)
		say("fifo: %q", b)
	}},
	{"capabilities of a new file", func(say say) {
		fd := open("f", unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o755)
		unix.Write(fd, []byte("one"))
		caps := make([]byte, 20) // VFS_CAP_REVISION_2: no more than CAP_NET_BIND_SERVICE
		caps[3], caps[5] = 2, 4
		say("set: %v", unix.Setxattr("f", "security.capability", caps, 0))
		n, err := unix.Getxattr("f", "security.capability", nil)
		say("size: %d %v", n, err)
		unix.Write(fd, []byte("two"))
		n, err = unix.Getxattr("f", "security.capability", nil)
		say("after a write: %d %v", n, err)
	}},
	{"no terminal", func(say say) {
		write("f", "x", 0o666)
		fd := open("f", unix.O_RDONLY, 0)
		_, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		say("isatty: %v", err)
		_, err = unix.IoctlGetTermios(open(".", unix.O_RDONLY, 0), unix.TCGETS)
		say("isatty of a directory: %v", err)
	}},
	{"statfs and pathconf", func(say say) {
		var st unix.Statfs_t
		say("statfs: %v %d %d", unix.Statfs(".", &st), st.Bsize, st.Namelen)
	}},
}

// posixHelper runs all cases below a directory and prints what they say.
func posixHelper(args []string) error {
	top := args[0]
	for _, c := range posixCases {
		dir := filepath.Join(top, strings.ReplaceAll(c.name, " ", "-"))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		if err := os.Chdir(dir); err != nil {
			return err
		}
		unix.Umask(0o022)
		func() {
			defer func() {
				if r := recover(); r != nil {
					fmt.Printf("%s: panic: %v\n", c.name, r)
				}
			}()
			c.do(func(format string, args ...any) { fmt.Printf(c.name+": "+format+"\n", args...) })
		}()
	}
	return nil
}

// A program on a node must not be able to tell home files from the disk.
func TestMountBehavesAsTheLocalDisk(t *testing.T) {
	p := newPair(t, options{})
	run := func(dir string) string {
		cmd := helper(deadline(t, time.Minute), alice, "posix", dir)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Errorf("in %s: %v %s", dir, err, stderr.String())
		}
		return string(out)
	}
	for _, d := range []string{"local", "remote"} {
		os.Mkdir(filepath.Join(p.dir, d), 0o777)
		os.Chown(filepath.Join(p.dir, d), 1000, 1000)
	}
	want, got := run(filepath.Join(p.dir, "local")), run(filepath.Join(p.mnt, "remote"))
	if len(want) < 1000 {
		t.Errorf("the local run says little: %s", want)
	}
	if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); diff != "" {
		t.Errorf("mount differs from local disk (-local +mount):\n%s", diff)
	}
}
