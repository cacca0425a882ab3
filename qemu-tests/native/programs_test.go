package native

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"mosimg/internal/api"
)

// program is a script that does the same each time, in a folder of its own:
// it prints the same and leaves the same files.
type program struct {
	name   string
	needs  []string
	inputs func(dir string) error // makes what the script reads as ../NAME-input
	script string
}

var programs = []program{
	{"xz", []string{"xz"}, func(dir string) error { return os.WriteFile(dir, text(6<<20), 0o644) },
		`xz -6 -T1 -c ../xz-input >text.xz; xz -l text.xz | tail -1; xz -dc text.xz | cmp - ../xz-input`},
	{"make", []string{"make", "gcc"}, sources,
		`cp -r ../make-input src; cd src; make -s -j2; ./sum`},
	{"python", []string{"python3"}, func(dir string) error { return os.WriteFile(dir, []byte(pythonProgram), 0o644) },
		`python3 ../python-input`},
	{"perl", []string{"perl", "sort"}, func(dir string) error { return os.WriteFile(dir, []byte(perlProgram), 0o644) },
		`perl ../perl-input`},
	{"sqlite", []string{"sqlite3"}, transactions,
		`sqlite3 db 'create table t(a integer primary key, b text); create index i on t(b); create table c(n integer); insert into c values(0)'
		for part in ../sqlite-input/*; do sqlite3 db <$part; sleep ${PAUSE:-0}; done; sqlite3 db 'pragma integrity_check; select count(*), sum(length(b)), sum(n) from t, c; select * from t order by a' >result; head -2 result; rm db`},
	{"git", []string{"git"}, tree,
		`export HOME=$PWD GIT_AUTHOR_DATE='1000000000 +0000' GIT_COMMITTER_DATE='1000000000 +0000'
		git init -q -b main r; cd r; git config user.name n; git config user.email e; git config gc.auto 0
		for i in 1 2 3 4; do cp -r ../../git-input/d$i . ; git add .; git commit -qm "part $i"; done
		git gc -q; git fsck --full --no-progress; git status --short; git log --format='%H %s'; git count-objects -v | grep -v size; rm -rf .git`},
	// Not -x into folders: tar remembers a folder by its device, and that is another one on a guest.
	{"tar", []string{"tar"}, tree,
		`for i in 1 2 3 4 5 6 7 8; do tar --sort=name -cf $i.tar -C ../tar-input .; tar -xOf $i.tar | cksum; tar -df $i.tar -C ../tar-input; tar -tvf $i.tar | cksum; done; cksum *.tar`},
	{"sort", []string{"sort"}, func(dir string) error { return os.WriteFile(dir, lines(300_000), 0o644) },
		`mkdir tmp; LC_ALL=C sort -S 1M --batch-size=8 --parallel=2 -T tmp ../sort-input >sorted; ls tmp; LC_ALL=C sort -c sorted; LC_ALL=C sort -S 1M -T tmp -n -k2 -u sorted >unique; wc -l sorted unique`},
}

// text is n bytes that compress about as well as prose does.
func text(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	words := make([][]byte, 5000)
	for i := range words {
		words[i] = make([]byte, 2+r.IntN(9))
		for k := range words[i] {
			words[i][k] = byte('a' + r.IntN(26))
		}
	}
	b := make([]byte, 0, n+16)
	for len(b) < n {
		b = append(append(b, words[int(r.ExpFloat64()*500)%len(words)]...), " \n"[r.IntN(20)/19])
	}
	return b[:n]
}

// lines are n numbered lines in no order.
func lines(n int) []byte {
	r := rand.New(rand.NewPCG(3, 4))
	var b bytes.Buffer
	for range n {
		fmt.Fprintf(&b, "%016x %d some more words of a line\n", r.Uint64(), r.IntN(n))
	}
	return b.Bytes()
}

// tree is 500 files in folders, with links among them.
func tree(dir string) error {
	r := rand.New(rand.NewPCG(5, 6))
	content := text(4 << 20)
	for i := range 500 {
		d := filepath.Join(dir, fmt.Sprintf("d%d", i%4+1))
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
		name := filepath.Join(d, fmt.Sprintf("file%d", i))
		if i%25 == 24 {
			if err := os.Symlink(fmt.Sprintf("file%d", i-4), name); err != nil {
				return err
			}
			continue
		}
		at := r.IntN(len(content) - 32<<10)
		if err := os.WriteFile(name, content[at:at+r.IntN(32<<10)], []os.FileMode{0o644, 0o600, 0o755}[i%3]); err != nil {
			return err
		}
	}
	return nil
}

// sources are C files of one program; with $MOSIMG_LONG hundreds.
func sources(dir string) error {
	n := 12
	if os.Getenv("MOSIMG_LONG") != "" {
		n = 300
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	calls, protos := "", ""
	for i := range n {
		var b strings.Builder
		fmt.Fprintf(&b, "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include \"all.h\"\n")
		for k := range 25 {
			fmt.Fprintf(&b, "static long g%d(long x) { long v[64]; for (int i = 0; i < 64; i++) v[i] = x * i + %d; for (int i = 1; i < 64; i++) v[i] ^= v[i-1] >> 3; return v[%d]; }\n", k, k*i, (k*7+i)%64)
		}
		fmt.Fprintf(&b, "long f%d(long x) {", i)
		for k := range 25 {
			fmt.Fprintf(&b, " x += g%d(x);", k)
		}
		fmt.Fprintf(&b, " return x; }\n")
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%d.c", i)), []byte(b.String()), 0o644); err != nil {
			return err
		}
		protos += fmt.Sprintf("long f%d(long);\n", i)
		calls += fmt.Sprintf("\tx = f%d(x);\n", i)
	}
	for name, content := range map[string]string{
		"all.h":    protos,
		"main.c":   "#include <stdio.h>\n#include \"all.h\"\nint main(void) {\n\tlong x = 1;\n" + calls + "\tprintf(\"%ld\\n\", x);\n\treturn 0;\n}\n",
		"Makefile": "objects := $(patsubst %.c,%.o,$(sort $(wildcard *.c)))\nsum: $(objects)\n\tgcc -o $@ $^\n%.o: %.c all.h\n\tgcc -O2 -c -o $@ $<\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// transactions are files of SQL that writes in many small transactions; with
// $MOSIMG_LONG thousands: on a guest each takes tens of questions to the home.
func transactions(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	parts, each := 12, 40
	if os.Getenv("MOSIMG_LONG") != "" {
		parts, each = 30, 100
	}
	for part := range parts {
		var b strings.Builder
		for i := part * each; i < (part+1)*each; i++ {
			fmt.Fprintf(&b, "begin immediate; insert into t(b) values('%x'); update c set n=n+1; update t set b=b||'x' where a=%d; commit;\n", i*7919%10007, i/2)
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("part%02d", part)), []byte(b.String()), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// pythonProgram has threads that compute, write to files and hand results on.
const pythonProgram = `import hashlib, queue, threading, zlib
todo, done = queue.Queue(8), queue.Queue()
def work(n):
    with open(f"log{n % 4}-{n}", "w") as log:
        while (i := todo.get()) is not None:
            data = b"".join(b"%d," % (i * k) for k in range(30000))
            done.put((i, hashlib.sha256(zlib.compress(data, 6)).hexdigest()))
            log.write("x" * 1000)
            log.flush()
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
for t in threads: t.start()
results = {}
def collect():
    while len(results) < 120:
        i, h = done.get()
        results[i] = h
c = threading.Thread(target=collect)
c.start()
for i in range(120): todo.put(i)
for t in threads: todo.put(None)
for t in threads: t.join()
c.join()
import os
total = sum(os.path.getsize(f"log{n % 4}-{n}") for n in range(4))
for n in range(4): os.remove(f"log{n % 4}-{n}")
print(total)
for i in sorted(results): print(i, results[i])
`

// perlProgram forks, has a pipe to a sort, and matches text with expressions.
const perlProgram = `use strict;
pipe(my $r, my $w);
my $child = fork();
if (!$child) {
	close $r;
	my $x = 1;
	for my $i (1..600000) {
		$x = ($x * 16807) % 2147483647;
		print $w "word$x line$i\n";
	}
	close $w;
	exit 3;
}
close $w;
open(my $sort, "|-", "LC_ALL=C sort >sorted") or die;
my (%seen, $n);
while (my $line = <$r>) {
	$line =~ /^word(\d+?)(\d{2}) (line)(\d+)$/ or die "line $.: $line";
	$seen{$2} += $4;
	print $sort "$2 $3\n" if $1 % 3 == 0;
	$n++;
}
close $sort or die;
waitpid($child, 0);
printf "%d lines, child %d\n", $n, $? >> 8;
print "$_ $seen{$_}\n" for sort keys %seen;
`

// in is the cluster for the helpers of a subtest.
func (c *cluster) in(t *testing.T) *cluster {
	w := *c.world
	w.t = t
	return &cluster{world: &w, head: c.head, all: c.all}
}

// folder makes a folder for one job.
func (c *cluster) folder(name string) string {
	c.t.Helper()
	dir := filepath.Join(c.dir, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		c.t.Fatal(err)
	}
	return dir
}

// journey is what happened to a job that was moved round.
type journey struct {
	moves   int
	refused map[string]int
	downs   []time.Duration
}

func (y journey) String() string {
	s := fmt.Sprintf("%d moves, stood still for %v", y.moves, y.downs)
	for why, n := range y.refused {
		s += fmt.Sprintf("\n%3d x %s", n, why)
	}
	return s
}

var anyNumber = regexp.MustCompile(`[0-9]+(-[0-9]+)?`)

// travelTime is how long a job is moved: a machine that is busy with other
// things must not make it an endless journey.
const travelTime = 7 * time.Second

// travels moves a job round the cluster until it ends, as fast as migrate
// does, or its time is over and it was moved. A move that is refused is tried again.
func (j *job) travels() journey {
	y, began := journey{refused: map[string]int{}}, time.Now()
	for i := 0; ; {
		select {
		case <-j.done:
			return y
		default:
		}
		if d := time.Since(began); d > travelTime && y.moves > 0 || d > 4*travelTime {
			return y
		}
		if _, err := j.status(); err != nil && y.moves == 0 {
			time.Sleep(20 * time.Millisecond) // it has not begun
			continue
		}
		err := j.migrate([]api.NodeID{2, 3, 1}[i%3])
		var exit *exec.ExitError
		switch {
		case err == nil:
			y.moves++
			i++
			if st, err := j.status(); err == nil {
				y.downs = append(y.downs, st.Downtime.Round(10*time.Millisecond))
			}
		case errors.As(err, &exit) && exit.ExitCode() == 5: // it has ended
			<-j.done
		default:
			y.refused[anyNumber.ReplaceAllString(err.Error(), "N")]++
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// Programs that nobody wrote for this do under mosrun, while they go round the
// cluster, what they do without it: each byte of their output and files.
func TestProgramsMove(t *testing.T) {
	c := newCluster(t)
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			for _, n := range p.needs {
				if _, err := exec.LookPath(n); err != nil {
					t.Skipf("needs %s", n)
				}
			}
			c.in(t).moved(p)
		})
	}
	for _, s := range steerings {
		t.Run(s.name, func(t *testing.T) { s.do(c.in(t)) })
	}
}

// moved runs a program without mosrun and with it.
func (c *cluster) moved(p program) {
	t, home := c.t, c.all[0]
	input := filepath.Join(c.dir, p.name+"-input")
	if err := p.inputs(input); err != nil {
		t.Fatal(err)
	}
	native, moved := c.folder(p.name+"-native"), c.folder(p.name+"-moved")
	began := time.Now()
	want, err := c.shell(home, native, ":", "sh", "-e", "-c", p.script).CombinedOutput()
	if err != nil {
		t.Fatalf("without mosrun: %v: %s", err, want)
	}
	alone := time.Since(began)
	began = time.Now()
	// With locks a job cannot leave home: it has pauses in which it holds none.
	j := c.mosrunFrom(home, moved, "export PAUSE=1", nil, "sh", "-e", "-c", p.script)
	y := j.travels()
	t.Logf("%.1f s alone, %.1f s on the way: %v", alone.Seconds(), time.Since(began).Seconds(), y)
	if status := j.ends(); status != 0 || j.errs.String() != "" {
		t.Errorf("it ended with %d, %q", status, j.errs.String())
	}
	if diff := cmp.Diff(string(want), j.out.String()); diff != "" {
		t.Errorf("it has printed (-without mosrun +moved):\n%.2000s", diff)
	}
	if out, err := exec.Command("diff", "-rq", "--no-dereference", native, moved).CombinedOutput(); err != nil {
		t.Errorf("it has left other files: %v: %.2000s", err, out)
	}
	os.RemoveAll(native)
	os.RemoveAll(moved)
	os.RemoveAll(input)
	if y.moves == 0 {
		t.Skip("it was never moved, as no try had come to its end before the program had: see above")
	}
}
