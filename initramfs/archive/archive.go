// Package archive makes initramfs archives: a tree of files in memory, and
// from it a cpio (newc) archive whose bytes depend on nothing but the tree.
// Root is not needed: owners and device nodes are only records.
//
// An initramfs may be several archives one after the other, each compressed
// on its own; the kernel unpacks them in order. So a part that changes often
// (the agent) is made and compressed alone, and the rest is kept as it is.
package archive

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"sort"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"
)

// Source is this package's code: results in the build cache depend on it.
//
//go:embed *.go
var Source embed.FS

// Entry is one file of a Tree.
type Entry struct {
	Name     string      // relative and clean: "usr/bin/dash"
	Mode     fs.FileMode // type and permission bits
	UID, GID int
	Data     []byte // of a regular file
	Body     io.ReaderAt
	Size     int64  // of Body, when the content is not in Data
	Link     string // target of a symbolic link; name in the tree for a hard link
	HardLink bool
	Major    uint32 // of a device node
	Minor    uint32
}

// Tree is a file tree for an archive. Parent folders appear by themselves
// with mode 0755. The first fault is kept and told by Write.
type Tree struct {
	// MTime is the time of all files, in seconds since 1970.
	MTime   int64
	entries map[string]*Entry
	err     error
}

// merged are the folders that are links into usr in every image. The kernel
// would replace such a link by a folder of the same name in a later archive,
// and the files behind it would be gone; so names are rewritten instead.
var merged = []string{"bin", "sbin", "lib", "lib64"}

// Merge gives the place of a name in a tree with merged /usr.
func Merge(name string) string {
	for _, d := range merged {
		if strings.HasPrefix(name, d+"/") {
			return "usr/" + name
		}
	}
	return name
}

// Add puts an entry in. A second entry of the same name must be the same.
func (t *Tree) Add(e Entry) {
	e.Name = Merge(e.Name)
	if !fs.ValidPath(e.Name) || e.Name == "." {
		t.fail(fmt.Errorf("archive: name %q is not a clean relative path", e.Name))
		return
	}
	if e.HardLink {
		e.Link = Merge(e.Link)
	}
	if t.entries == nil {
		t.entries = make(map[string]*Entry)
	}
	if old := t.entries[e.Name]; old != nil && !old.equal(&e) {
		t.fail(fmt.Errorf("archive: two different files are to be %s", e.Name))
		return
	}
	t.entries[e.Name] = &e
	for d := path.Dir(e.Name); d != "."; d = path.Dir(d) {
		if up := t.entries[d]; up == nil {
			t.entries[d] = &Entry{Name: d, Mode: fs.ModeDir | 0o755}
		} else if !up.Mode.IsDir() {
			t.fail(fmt.Errorf("archive: %s cannot be below %s, which is not a folder", e.Name, d))
			return
		}
	}
}

// Replace is Add that takes the place of an entry of the same name.
func (t *Tree) Replace(e Entry) {
	delete(t.entries, Merge(e.Name))
	t.Add(e)
}

// Dir adds a folder.
func (t *Tree) Dir(name string, perm fs.FileMode) { t.Add(Entry{Name: name, Mode: fs.ModeDir | perm}) }

// File adds a regular file.
func (t *Tree) File(name string, perm fs.FileMode, data []byte) {
	t.Add(Entry{Name: name, Mode: perm, Data: data})
}

// Symlink adds a symbolic link.
func (t *Tree) Symlink(name, target string) {
	t.Add(Entry{Name: name, Mode: fs.ModeSymlink | 0o777, Link: target})
}

// Get is the entry of that name, or nil.
func (t *Tree) Get(name string) *Entry { return t.entries[Merge(name)] }

// Entries are all entries, parents before children, sorted by name.
func (t *Tree) Entries() []*Entry {
	list := make([]*Entry, 0, len(t.entries))
	for _, e := range t.entries {
		list = append(list, e)
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Name < list[j].Name })
	return list
}

func (t *Tree) fail(err error) {
	if t.err == nil {
		t.err = err
	}
}

// equal compares what can be compared in memory.
func (e *Entry) equal(o *Entry) bool {
	return e.Mode == o.Mode && e.UID == o.UID && e.GID == o.GID && e.Link == o.Link && e.HardLink == o.HardLink &&
		e.Major == o.Major && e.Minor == o.Minor && e.Body == o.Body && bytes.Equal(e.Data, o.Data)
}

// AddCPIO adds the folders, files and symbolic links of a cpio archive. f must
// stay open until the tree is written. Of the modes only whether the owner may
// run a file is taken: the rest is the umask of whoever built it.
func (t *Tree) AddCPIO(f io.ReaderAt) error {
	records := 0
	err := cpio.ForEachRecord(cpio.Newc.Reader(f), func(r cpio.Record) error {
		records++
		perm := fs.FileMode(0o755)
		if r.Mode&(cpio.S_IFMT|0o100) == cpio.S_IFREG {
			perm = 0o644
		}
		switch r.Mode & cpio.S_IFMT {
		case cpio.S_IFDIR:
			t.Dir(r.Name, perm)
		case cpio.S_IFREG:
			t.Add(Entry{Name: r.Name, Mode: perm, Body: r.ReaderAt, Size: int64(r.FileSize)})
		case cpio.S_IFLNK:
			target, err := io.ReadAll(io.NewSectionReader(r.ReaderAt, 0, int64(r.FileSize)))
			if err != nil {
				return err
			}
			t.Symlink(r.Name, string(target))
		default:
			return fmt.Errorf("archive: %s is neither folder, file nor link", r.Name)
		}
		return nil
	})
	if err == nil && records == 0 {
		err = errors.New("archive: nothing in it")
	}
	return errors.Join(err, t.err)
}

// Stat says what a written archive holds.
type Stat struct {
	Files int
	Bytes int64 // of the archive, uncompressed
}

// Write writes the tree as one cpio archive, padded to 4 bytes.
func (t *Tree) Write(w io.Writer) (Stat, error) {
	if t.err != nil {
		return Stat{}, t.err
	}
	entries := t.Entries()
	// A hard link is another name of the same inode. The inode's content is
	// stored with its first name; the others must have none.
	links := make(map[*Entry]uint64)
	for _, e := range entries {
		target, err := t.inode(e)
		if err != nil {
			return Stat{}, err
		}
		links[target]++
	}
	ino := make(map[*Entry]uint64)
	count := &countWriter{w: w}
	out := cpio.Newc.Writer(count)
	for _, e := range entries {
		target, _ := t.inode(e)
		r, err := target.record()
		if err != nil {
			return Stat{}, err
		}
		if ino[target] == 0 {
			ino[target] = uint64(len(ino) + 1)
		} else {
			r.ReaderAt, r.FileSize = nil, 0
		}
		r.Name, r.Ino, r.NLink, r.MTime = e.Name, ino[target], links[target], uint64(t.MTime)
		if err := out.WriteRecord(r); err != nil {
			return Stat{}, fmt.Errorf("archive: write %s: %w", e.Name, err)
		}
	}
	if err := cpio.WriteTrailer(out); err != nil {
		return Stat{}, err
	}
	err := count.pad()
	return Stat{Files: len(entries), Bytes: count.n}, err
}

// inode is the entry that holds the content and mode of e: e itself, or what
// a hard link names.
func (t *Tree) inode(e *Entry) (*Entry, error) {
	if !e.HardLink {
		return e, nil
	}
	target := t.entries[e.Link]
	if target == nil || !target.Mode.IsRegular() || target.HardLink {
		return nil, fmt.Errorf("archive: hard link %s names %s, which is not a file of this archive", e.Name, e.Link)
	}
	return target, nil
}

func (e *Entry) record() (cpio.Record, error) {
	info := cpio.Info{
		Name: e.Name, Mode: uint64(e.Mode.Perm()), UID: uint64(e.UID), GID: uint64(e.GID),
		Rmajor: uint64(e.Major), Rminor: uint64(e.Minor),
	}
	for bit, unix := range map[fs.FileMode]uint64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if e.Mode&bit != 0 {
			info.Mode |= unix
		}
	}
	switch e.Mode.Type() {
	case 0:
		info.Mode |= cpio.S_IFREG
		if e.Body != nil {
			info.FileSize = uint64(e.Size)
			return cpio.Record{ReaderAt: io.NewSectionReader(e.Body, 0, e.Size), Info: info}, nil
		}
		return cpio.StaticRecord(e.Data, info), nil
	case fs.ModeDir:
		info.Mode |= cpio.S_IFDIR
		return cpio.Record{Info: info}, nil
	case fs.ModeSymlink:
		info.Mode |= cpio.S_IFLNK
		return cpio.StaticRecord([]byte(e.Link), info), nil
	case fs.ModeDevice | fs.ModeCharDevice:
		info.Mode |= cpio.S_IFCHR
		return cpio.Record{Info: info}, nil
	}
	return cpio.Record{}, fmt.Errorf("archive: %s is of a kind (%v) that an image does not hold", e.Name, e.Mode)
}

type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

// pad fills up to a multiple of 4: the kernel looks for the next archive
// behind zero bytes, and for an uncompressed one at such offsets only.
func (c *countWriter) pad() error {
	_, err := c.Write(make([]byte, -c.n&3))
	return err
}

// window is how far back the compressor looks. The kernel's unpacker takes up
// to 128 MiB (lib/decompress_unzstd.c) but has to allocate it at boot, on
// machines that may have 128 MiB in all.
const window = 8 << 20

// WriteZstd writes the tree compressed, padded to 4 bytes, and says how many
// bytes that were.
func (t *Tree) WriteZstd(w io.Writer) (Stat, int64, error) {
	count := &countWriter{w: w}
	// One goroutine: steps of a build run side by side already.
	z, err := zstd.NewWriter(count, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return Stat{}, 0, err
	}
	stat, err := t.Write(z)
	if err = errors.Join(err, z.Close()); err != nil {
		return Stat{}, 0, err
	}
	err = count.pad()
	return stat, count.n, err
}
