package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"mosimg/image/cache"
	"mosimg/internal/atomicfile"
	"mosimg/internal/fault"
	"mosimg/internal/imageset"
)

// output is the folder of the image set. The new set is made in a hidden
// folder beside it and exchanged with it in one system call.
type output struct {
	dir    string // absolute
	parent string
	tmp    *cache.TempDir
	made   []string // parents that did not exist, outermost first
	done   bool
}

// newOutput checks that dir can become an image set: it does not exist, is
// empty, or is an image set with nothing else in it.
func newOutput(dir string) (*output, error) {
	bad := func(err error, hint string) error {
		var p *fs.PathError
		if errors.As(err, &p) {
			err = fmt.Errorf("%s: %w", p.Path, p.Err)
		}
		return fault.New(fault.Environment, "prepare output folder", dir, err, hint)
	}
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, bad(err, "")
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		abs = real // the set replaces what a link names, not the link
	}
	o := &output{dir: abs, parent: filepath.Dir(abs)}
	if err := o.replaceable(); err != nil {
		return nil, err
	}
	if o.made, err = makeParents(o.parent); err != nil {
		o.removeParents()
		return nil, bad(err, "choose another with -o")
	}
	prefix := "." + filepath.Base(abs) + ".mosimg-"
	cache.RemoveStale(o.parent, prefix)
	if o.tmp, err = cache.NewTempDir(o.parent, prefix); err != nil {
		o.removeParents()
		return nil, bad(err, "the folder above it must be writable; choose another with -o")
	}
	if err := os.Chmod(o.tmp.Path, 0o755); err != nil {
		o.discard()
		return nil, bad(err, "")
	}
	return o, nil
}

const mountHint = "name a folder below it with -o"

// replaceable refuses a folder with anything in it that is not of an image
// set: swapping the set in would delete it.
func (o *output) replaceable() error {
	refuse := func(cause any, hint string) error {
		return fault.New(fault.Environment, "prepare output folder", o.dir, cause, hint)
	}
	st, err := os.Lstat(o.dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case errors.Is(err, syscall.ENOTDIR):
		return refuse("something above it is a file", "choose another with -o")
	case err != nil:
		return refuse(err, "")
	case !st.IsDir():
		return refuse("it is a file", "choose another with -o")
	}
	if wd, err := os.Getwd(); err == nil && (wd == o.dir || strings.HasPrefix(wd, o.dir+"/")) {
		return refuse("it is or contains the current folder, which would be deleted under you", "cd out of it, or choose another with -o")
	}
	if up, err := os.Stat(o.parent); err == nil && up.Sys().(*syscall.Stat_t).Dev != st.Sys().(*syscall.Stat_t).Dev {
		return refuse("it is a mounted folder, which cannot be replaced", mountHint)
	}
	entries, err := os.ReadDir(o.dir)
	if err != nil {
		return refuse(err, "")
	}
	if len(entries) == 0 {
		return nil
	}
	ours := map[string]bool{imageset.ManifestName: true, imageset.BootDir: true}
	if data, err := os.ReadFile(filepath.Join(o.dir, imageset.ManifestName)); err != nil {
		return refuse("it is not empty and not an image set", "choose another with -o, or empty it")
	} else if m, err := imageset.ParseManifest(data); err == nil {
		for _, f := range m.Files {
			ours[f.Name] = true
		}
	} else { // of another version, or damaged: its usual names
		for _, name := range []string{imageset.Kernel, imageset.Initramfs, imageset.HeadArchive, imageset.UKI, imageset.Disk, imageset.ISO, imageset.QCOW2} {
			ours[name] = true
		}
		loaders, _ := filepath.Glob(filepath.Join(o.dir, imageset.BootDir, "*"))
		for _, l := range loaders {
			ours[imageset.BootDir+"/"+filepath.Base(l)] = true
		}
	}
	return filepath.WalkDir(o.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return refuse(err, "")
		}
		name, _ := filepath.Rel(o.dir, path)
		if name = filepath.ToSlash(name); name == "." || ours[name] {
			return nil
		}
		return refuse(fmt.Sprintf("%s in it is not part of the image set and would be deleted", name), "move it away, or choose another folder with -o")
	})
}

// publish makes the new set the output, in one step.
func (o *output) publish() error {
	if err := o.replaceable(); err != nil { // somebody may have put a file there meanwhile
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, o.tmp.Path, unix.AT_FDCWD, o.dir, unix.RENAME_EXCHANGE)
	switch {
	case err == nil:
		o.done = true
		os.RemoveAll(o.tmp.Path) // the old set
		o.tmp.Keep()
	case errors.Is(err, unix.ENOENT):
		err = os.Rename(o.tmp.Path, o.dir)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		// A file system without exchange (NFS, some FUSE): for an instant
		// there is no set, but never half of one.
		err = o.swapSlowly()
	}
	if err != nil {
		hint := ""
		if errors.Is(err, unix.EBUSY) {
			hint = mountHint
		}
		return fault.New(fault.Environment, "publish image set", o.dir, err, hint)
	}
	if !o.done {
		o.done = true
		o.tmp.Keep()
	}
	_ = atomicfile.SyncDir(o.parent)
	return nil
}

func (o *output) swapSlowly() error {
	old := o.tmp.Path + ".old"
	if err := os.Rename(o.dir, old); err != nil {
		return err
	}
	if err := os.Rename(o.tmp.Path, o.dir); err != nil {
		return errors.Join(err, os.Rename(old, o.dir))
	}
	os.RemoveAll(old)
	return nil
}

// discard removes everything that was made, unless it was published.
func (o *output) discard() {
	if o.done || o.tmp == nil {
		return
	}
	o.tmp.Remove()
	o.removeParents()
}

func makeParents(dir string) (made []string, err error) {
	if _, err := os.Stat(dir); err == nil {
		return nil, nil
	}
	if made, err = makeParents(filepath.Dir(dir)); err != nil {
		return made, err
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return made, err
	} else if err == nil {
		made = append(made, dir)
	}
	return made, nil
}

func (o *output) removeParents() {
	for _, v := range slices.Backward(o.made) {
		os.Remove(v) // only while empty
	}
}
