package shim

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// saveTree writes the files below dir into a tar archive. Sockets are left
// out: CRIU makes those that are bound. Other file systems are left out too.
func saveTree(into *os.Root, archive, dir string) error {
	out, err := into.OpenFile(archive, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	w := tar.NewWriter(out)
	if err := writeTree(w, dir); err != nil {
		return err
	}
	return w.Close()
}

func writeTree(w *tar.Writer, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	top, err := root.Stat(".")
	if err != nil {
		return err
	}
	dev := top.Sys().(*syscall.Stat_t).Dev
	links := make(map[uint64]string)
	return fs.WalkDir(root.FS(), ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := root.Lstat(name)
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		if st.Dev != dev {
			if fi.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if fi.Mode()&(fs.ModeSocket|fs.ModeDevice) != 0 {
			return nil
		}
		target := ""
		if fi.Mode()&fs.ModeSymlink != 0 {
			if target, err = root.Readlink(name); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(fi, target)
		if err != nil {
			return err
		}
		h.Name, h.Format = name, tar.FormatPAX
		h.Uname, h.Gname = "", ""
		if first, ok := links[st.Ino]; ok && fi.Mode().IsRegular() {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else if st.Nlink > 1 {
			links[st.Ino] = name
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			return nil
		}
		f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
}

// loadTree makes the files of an archive below dir. It does not leave dir,
// whatever the names in the archive.
func loadTree(from *os.Root, archive, dir string) error {
	in, err := from.Open(archive)
	if err != nil {
		return err
	}
	defer in.Close()
	return readTree(tar.NewReader(in), dir)
}

func readTree(r *tar.Reader, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	var dirs []*tar.Header // their times change while they are filled
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if err := readEntry(root, r, h); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		if h.Typeflag == tar.TypeDir {
			dirs = append(dirs, h)
		}
	}
	for _, h := range dirs {
		if err := root.Chtimes(path.Clean(h.Name), h.ModTime, h.ModTime); err != nil {
			return err
		}
	}
	return nil
}

func readEntry(root *os.Root, r io.Reader, h *tar.Header) error {
	name := path.Clean(h.Name)
	switch h.Typeflag {
	case tar.TypeDir:
		if err := root.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	case tar.TypeSymlink:
		if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := root.Symlink(h.Linkname, name); err != nil {
			return err
		}
		return root.Lchown(name, h.Uid, h.Gid)
	case tar.TypeLink:
		return root.Link(path.Clean(h.Linkname), name)
	case tar.TypeFifo:
		d, err := root.Open(path.Dir(name))
		if err != nil {
			return err
		}
		defer d.Close()
		if err := unix.Mknodat(int(d.Fd()), filepath.Base(name), unix.S_IFIFO|0o600, 0); err != nil {
			return err
		}
	default:
		return fmt.Errorf("kind %q", h.Typeflag)
	}
	if err := root.Lchown(name, h.Uid, h.Gid); err != nil {
		return err
	}
	if err := root.Chmod(name, h.FileInfo().Mode()&(fs.ModePerm|fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)); err != nil {
		return err
	}
	return root.Chtimes(name, h.ModTime, h.ModTime)
}
