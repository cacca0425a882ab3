package filebench

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"mosimg/internal/fault"
)

// work is a piece of it, as a shell script. It runs in a folder of its own, with
// the home's files for it in $SRC and the root of the home's tree in $ROOT.
type work struct{ name, script string }

// What the home has for the work, in Config.Dir.
const (
	bigName  = "big"
	tarName  = "files.tar"
	repoName = "repo"
)

// repoFiles is how many files the repository has: git costs ten times as much for each.
func (c Config) repoFiles() int { return max(c.Files/10, 1) }

// python is the distribution's, which finds its modules by its own path: in the
// tree that it was started from.
const python = "/usr/bin/python3"

// worksOf are the pieces of work in the order in which they are done: the first
// needs a fresh mount, and some need what an earlier one has left.
func worksOf(conf Config) []work {
	read := "dd if=$SRC/" + bigName + " of=/dev/null bs=1M status=none"
	return []work{
		{fmt.Sprintf("read-cold-%dMiB", conf.MiB), read},
		{fmt.Sprintf("read-warm-%dMiB", conf.MiB), read},
		{fmt.Sprintf("write-fsync-%dMiB", conf.MiB), fmt.Sprintf("dd if=/dev/zero of=out bs=1M count=%d conv=fsync status=none", conf.MiB)},
		// As a user who is not root: the files are his, with his umask.
		{fmt.Sprintf("untar-%d", conf.Files), "tar -xf $SRC/" + tarName + " --no-same-owner --no-same-permissions"},
		{fmt.Sprintf("git-clone-%d", conf.repoFiles()), "git clone -q --no-hardlinks $SRC/" + repoName + " clone"},
		{fmt.Sprintf("git-status-%d", conf.repoFiles()), "git -C clone status --short"},
		{fmt.Sprintf("python3-starts-%d", conf.Starts), fmt.Sprintf("i=0; while [ $i -lt %d ]; do i=$((i+1)); $ROOT"+python+
			" -I -c 'import json, email.message, http.client'; done", conf.Starts)},
	}
}

// time does the work in dir of the tree at root, and gives the seconds.
func (w work) time(ctx context.Context, root, src, dir string) (float64, error) {
	// Not by Cmd.Dir: between fork and exec this process, which is the agent of the
	// mount, would wait for the child and the child for the mount.
	cmd := exec.CommandContext(ctx, "sh", "-euc", "cd \"$DIR\"\n"+w.script)
	cmd.Env = append(os.Environ(), "ROOT="+root, "SRC="+filepath.Join(root, src), "DIR="+filepath.Join(root, dir))
	cmd.WaitDelay = time.Second
	began := time.Now()
	out, err := cmd.CombinedOutput()
	took := time.Since(began).Seconds()
	if err != nil {
		return 0, fault.New(fault.Environment, "do", w.name+" in "+root, fmt.Errorf("%w: %s", err, bytes.TrimSpace(out)), "")
	}
	return took, nil
}

// fill makes what the work needs.
func fill(ctx context.Context, conf Config) error {
	err := create(filepath.Join(conf.Dir, bigName), func(w io.Writer) error {
		_, err := io.CopyN(w, rand.Reader, int64(conf.MiB)<<20)
		return err
	})
	if err == nil {
		err = create(filepath.Join(conf.Dir, tarName), func(w io.Writer) error { return writeTar(w, conf.Files) })
	}
	if err == nil {
		repo := filepath.Join(conf.Dir, repoName)
		small := filepath.Join(conf.Dir, "repo.tar")
		if err = create(small, func(w io.Writer) error { return writeTar(w, conf.repoFiles()) }); err == nil {
			_, err = command(ctx, "sh", "-euc", `mkdir $1; cd $1; tar -xf $2; git init -q -b main; git add .
				git -c user.name=bench -c user.email=bench@localhost commit -qm files`, "sh", repo, small)
		}
	}
	if err != nil {
		return fault.New(fault.Environment, "make", "files to measure with", err, "")
	}
	return nil
}

func create(name string, write func(io.Writer) error) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(write(f), f.Close())
}

// Files of a source tree: so many in each folder, of up to so many bytes.
const (
	perFolder = 100
	smallMost = 8 << 10
)

// writeTar writes an archive of small files; the same each time.
func writeTar(w io.Writer, files int) error {
	t := tar.NewWriter(w)
	for i := range files {
		dir := fmt.Sprintf("d%03d", i/perFolder)
		if i%perFolder == 0 {
			if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755}); err != nil {
				return err
			}
		}
		text := bytes.Repeat([]byte(fmt.Sprintf("line of file %d\n", i)), 1+i*37%smallMost/20)
		if err := t.WriteHeader(&tar.Header{Name: fmt.Sprintf("%s/f%d.txt", dir, i), Mode: 0o644, Size: int64(len(text))}); err != nil {
			return err
		}
		if _, err := t.Write(text); err != nil {
			return err
		}
	}
	return t.Close()
}
