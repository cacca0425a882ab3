package home_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func needs(t testing.TB, programs ...string) {
	t.Helper()
	for _, n := range programs {
		if _, err := exec.LookPath(n); err != nil {
			t.Skipf("needs %s", n)
		}
	}
}

// Real programs do on the mount what they do on the disk: each script runs in
// both places and must print the same; the trees it leaves must be the same.
func TestProgramsOnTheMount(t *testing.T) {
	needs(t, "git", "gcc", "sqlite3", "tar")
	for _, tc := range []struct{ name, script string }{
		{"tar", `mkdir src; for i in $(seq 150); do echo $i >src/f$i; done; ln src/f1 src/hard; ln -s f2 src/soft; chmod 640 src/f3; touch -d @12345 src/f4
			tar cf a.tar src; mkdir out; tar xf a.tar -C out; diff -r src out/src; tar df a.tar; stat -c '%n %a %h' out/src/f3 out/src/hard; stat -c %Y out/src/f4; rm a.tar`},
		{"git", `git init -q r; cd r; git config user.name n; git config user.email e; for i in $(seq 60); do echo $i >f$i; done; git add .; git commit -qm one
			echo x >>f1; git status --short; git commit -qam two; cd ..; git clone -q r c; cd c; git log --format=%s; git status --short; git fsck; cd ..; rm -rf r/.git c/.git`},
		{"gcc", `printf 'int f(int x){return x*2;}\n' >f.c; printf '#include <stdio.h>\nint f(int);int main(){printf("%%d\\n",f(21));return 0;}\n' >m.c
			gcc -c f.c; gcc -c m.c; gcc -o prog f.o m.o; ./prog; cp prog copy; ./copy; chmod 111 copy; ./copy; rm prog copy *.o`},
		{"sqlite", `sqlite3 db 'pragma journal_mode=delete; create table t(a integer primary key, b text);' ; for i in 1 2 3 4 5; do sqlite3 db "begin; insert into t(b) values('$i'); insert into t(b) values('x$i'); commit;"; done
			sqlite3 db 'select count(*), group_concat(b) from t; pragma integrity_check;'; rm db`},
		{"dd", `dd if=/dev/zero bs=4k count=100 of=z status=none; dd if=z bs=1000 skip=3 count=5 of=y status=none; dd if=y of=z bs=7 seek=9 conv=notrunc status=none
			dd if=z of=direct bs=64k oflag=append conv=notrunc status=none; wc -c z y direct; cksum z y direct`},
		{"shell", `umask 027; echo a >f; mkdir d; echo b >>f; cat f; test -w f && echo writable; ls -l f d | cut -c1-10; mv f d/g; find . | sort; cp -a d e; rm -r d; sort -o e/g e/g; cat e/g; test -e none || echo none`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t, options{})
			for _, d := range []string{"local", "remote"} {
				os.Mkdir(filepath.Join(p.dir, d), 0o777)
				os.Chown(filepath.Join(p.dir, d), 1000, 1000)
			}
			want := mustSh(t, alice, filepath.Join(p.dir, "local"), tc.script)
			got := mustSh(t, alice, filepath.Join(p.mnt, "remote"), tc.script)
			if got != want {
				t.Errorf("on the mount:\n%s\nlocally:\n%s", got, want)
			}
			if out, err := sh(t, root, p.dir, "diff -r local remote"); err != nil {
				t.Errorf("the trees differ: %s", out)
			}
		})
	}
}

// One database, written at the same time from the node and at home: sqlite's
// locks, and what is read under them, must be those of one machine.
func TestSqliteFromBothSides(t *testing.T) {
	needs(t, "sqlite3")
	p := newPair(t, options{})
	os.Chmod(p.dir, 0o777)
	mustSh(t, alice, p.dir, `sqlite3 db 'create table t(who text, n integer); create table c(n integer); insert into c values(0);'`)
	const each = 15
	script := fmt.Sprintf(`for i in $(seq %d); do sqlite3 -cmd '.timeout 30000' db "begin immediate; insert into t values('$1', $i); update c set n=n+1; commit;"; done`, each)
	errs := make(chan error, 2)
	for _, side := range []struct{ name, dir string }{{"node", p.mnt}, {"home", p.dir}} {
		go func() {
			out, err := sh(t, alice, side.dir, script, side.name)
			if err != nil {
				err = fmt.Errorf("%s: %w: %s", side.name, err, out)
			}
			errs <- err
		}()
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{p.mnt, p.dir} {
		got := mustSh(t, alice, dir, `sqlite3 db 'pragma integrity_check; select n from c; select count(*) from t;'`)
		if want := fmt.Sprintf("ok\n%d\n%d\n", 2*each, 2*each); got != want {
			t.Errorf("in %s: %q; want %q", dir, got, want)
		}
	}
}

func TestBigDirectory(t *testing.T) {
	n := 50_000
	if testing.Short() {
		n = 2000
	}
	p := newPair(t, options{})
	d := filepath.Join(p.dir, "big")
	os.Mkdir(d, 0o755)
	for i := range n {
		f, err := os.Create(fmt.Sprintf("%s/file-with-a-name-%d", d, i))
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	for _, script := range []string{"ls -f big | grep -c name", "find big -type f | sort -u | wc -l"} {
		began := time.Now()
		if got := strings.TrimSpace(mustSh(t, alice, p.mnt, script)); got != fmt.Sprint(n) {
			t.Errorf("%s: %s; want %d", script, got, n)
		}
		t.Logf("%s: %v", script, time.Since(began))
	}
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil && len(fds) > 200 {
		t.Errorf("home holds %d descriptors for files that are only known", len(fds))
	}
}

// The node's kernel keeps what it has read; it must not keep what is no longer
// true. By ttl alone a change may be a second late; an open sees it at once.
func TestChangesAtHomeAreSeen(t *testing.T) {
	for _, noWatch := range []bool{false, true} {
		t.Run(fmt.Sprintf("NoWatch=%v", noWatch), func(t *testing.T) {
			o := options{}
			o.cfg.NoWatch = noWatch
			p := newPair(t, o)
			home := filepath.Join(p.dir, "f")
			cat := func() string { out, _ := sh(t, alice, p.mnt, "cat f 2>&1"); return out }
			cat() // now known not to be there
			for i, want := range []string{"one", "two", "a longer one", "", "x"} {
				os.WriteFile(home, []byte(want), 0o644)
				eventually(t, fmt.Sprintf("change %d", i), func() bool { return cat() == want })
			}
			// The same size, at once after it was read: close-to-open.
			for i := range 10 {
				want := fmt.Sprintf("same-%d", i)
				time.Sleep(5 * time.Millisecond) // the clock of file times
				os.WriteFile(home, []byte(want), 0o644)
				if i == 0 {
					eventually(t, "size", func() bool { return cat() == want })
				} else if got := cat(); got != want {
					t.Errorf("opened after it was closed at home: %q; want %q", got, want)
				}
			}
			os.Rename(home, home+"2")
			eventually(t, "rename", func() bool { return strings.Contains(cat(), "No such file") })
			os.Chmod(home+"2", 0o000)
			eventually(t, "chmod", func() bool { out, _ := sh(t, alice, p.mnt, "cat f2 2>&1"); return strings.Contains(out, "denied") })
		})
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	began := time.Now()
	for time.Since(began) < 10*time.Second {
		if ok() {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("%s: not seen after %v", what, time.Since(began))
}

// What is mounted below the root at home is part of the tree, also where the
// file system below is another one, or one without file handles.
func TestSubmountsAreFollowed(t *testing.T) {
	p := newPair(t, options{})
	for _, script := range []string{
		"mkdir sub; mount -t tmpfs none sub; echo in >sub/f",
		"mkdir src bound; echo b >src/f; mount --bind src bound; touch file; mount --bind src/f file",
		"mkdir proc; mount -t proc none proc",
	} {
		if out, err := sh(t, root, p.dir, script); err != nil {
			t.Fatalf("%s: %s", script, out)
		}
	}
	defer sh(t, root, p.dir, "umount sub bound file proc; true")
	want := "in\nb\nb\nlinux\n"
	if got := strings.ToLower(mustSh(t, alice, p.mnt, "cat sub/f bound/f file proc/sys/kernel/ostype")); got != want {
		t.Errorf("through submounts: %q; want %q", got, want)
	}
	got := mustSh(t, alice, p.mnt, "mv bound/../sub/f . 2>&1 || true; stat -c %i . sub bound proc | sort -u | wc -l; ls -a .. >/dev/null; ls sub/../..")
	if strings.Contains(got, "in\n") {
		t.Error(got)
	}
}
