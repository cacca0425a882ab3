package debian

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"

	"mosimg/internal/fault"
)

// Bounds on what a .deb may unpack to: far above any package we use, far
// below what would hurt the build machine.
const (
	maxUnpacked = 4 << 30
	maxMember   = 1 << 30
	maxMembers  = 200_000
	maxWindow   = 128 << 20 // of xz and zstd
)

// DebFile is one entry of a package's data archive.
type DebFile struct {
	Name     string // "usr/bin/dash": relative, clean, without ".."
	Mode     os.FileMode
	Size     int64
	Linkname string // of a symbolic link as it is; of a hard link like Name
	HardLink bool
	Body     io.Reader // valid during the call; nil unless a regular file
}

// WalkDeb calls each for every entry of the .deb at name, in its order. It
// unpacks in memory as it goes; entries that each does not read cost little.
func WalkDeb(ctx context.Context, name string, each func(*DebFile) error) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	err = walkDeb(bufio.NewReaderSize(ctxReader{ctx, f}, 256<<10), each)
	var stop callerError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &stop):
		return stop.error
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return fault.New(fault.Untrusted, "read package", path.Base(name), err, "it is not a Debian package that we can read")
}

// callerError tells an error of the callback from one of the format.
type callerError struct{ error }

// ctxReader makes a long unpacking end soon after its context does.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}

// walkDeb reads the outer ar archive: debian-binary, control.tar.*, data.tar.*.
func walkDeb(r io.Reader, each func(*DebFile) error) error {
	members := &arReader{r: r}
	version := false
	for {
		name, body, err := members.next()
		if errors.Is(err, io.EOF) {
			return errors.New("it has no data.tar")
		}
		if err != nil {
			return err
		}
		switch {
		case !version:
			text, err := io.ReadAll(io.LimitReader(body, 16))
			if err != nil {
				return err
			}
			if name != "debian-binary" || !bytes.HasPrefix(text, []byte("2.")) {
				return fmt.Errorf("its first member is %q with %q, not debian-binary with 2.x", name, text)
			}
			version = true
		case strings.HasPrefix(name, "data.tar"):
			data, err := decompress(strings.TrimPrefix(name, "data.tar"), body)
			if err != nil {
				return err
			}
			defer data.Close()
			return walkTar(data, each)
		}
	}
}

// decompress opens the compression that the suffix names.
func decompress(suffix string, r io.Reader) (io.ReadCloser, error) {
	switch suffix {
	case "":
		return io.NopCloser(r), nil
	case ".gz":
		return gzip.NewReader(r)
	case ".xz":
		x, err := xz.NewReader(r, maxWindow)
		return io.NopCloser(x), err
	case ".zst":
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}
	return nil, fmt.Errorf("compression %q is not gz, xz or zst", suffix)
}

func walkTar(r io.Reader, each func(*DebFile) error) error {
	budget := &io.LimitedReader{R: r, N: maxUnpacked}
	t := tar.NewReader(budget)
	for n := 0; ; n++ {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			if budget.N <= 0 {
				err = fmt.Errorf("it unpacks to more than %d bytes", int64(maxUnpacked))
			}
			return err
		}
		if n >= maxMembers {
			return fmt.Errorf("it has more than %d files", maxMembers)
		}
		f, err := debFile(h, t)
		if err != nil {
			return err
		}
		if f == nil {
			continue
		}
		if err := each(f); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) { // the archive ended inside a file
				return err
			}
			return callerError{err}
		}
	}
}

// debFile checks one tar header. It is nil for the root folder itself.
func debFile(h *tar.Header, body io.Reader) (*DebFile, error) {
	name, err := inside(h.Name)
	if err != nil || name == "." {
		return nil, err
	}
	f := &DebFile{Name: name, Mode: h.FileInfo().Mode(), Size: h.Size}
	switch h.Typeflag {
	case tar.TypeReg:
		if h.Size > maxMember {
			return nil, fmt.Errorf("%s has %d bytes, more than %d", name, h.Size, maxMember)
		}
		f.Body = body
	case tar.TypeDir:
	case tar.TypeSymlink:
		if h.Linkname == "" || strings.ContainsRune(h.Linkname, 0) {
			return nil, fmt.Errorf("symbolic link %s has no usable target", name)
		}
		f.Linkname = h.Linkname
	case tar.TypeLink:
		f.HardLink = true
		if f.Linkname, err = inside(h.Linkname); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%s is of type %q; packages hold files, folders and links", name, h.Typeflag)
	}
	return f, nil
}

// inside cleans the name of an entry and refuses one that leaves the root.
func inside(name string) (string, error) {
	clean := path.Clean(strings.TrimPrefix(name, "./"))
	if name == "" || path.IsAbs(name) || clean == ".." || strings.HasPrefix(clean, "../") || strings.ContainsRune(name, 0) {
		return "", fmt.Errorf("file name %q leaves the package", name)
	}
	return clean, nil
}

// arReader reads the common ar format: an 8-byte magic, then for each member
// a 60-byte header (name 16, date 12, uid 6, gid 6, mode 8, size 10, "`\n")
// and the content, padded to an even length.
type arReader struct {
	r       io.Reader
	started bool
	current *io.LimitedReader
	pad     int64
}

func (a *arReader) next() (name string, body io.Reader, err error) {
	if !a.started {
		var magic [8]byte
		if _, err := io.ReadFull(a.r, magic[:]); err != nil || string(magic[:]) != "!<arch>\n" {
			return "", nil, errors.New("it does not begin with the magic of an ar archive")
		}
		a.started = true
	}
	if a.current != nil {
		rest := a.current.N + a.pad
		// Some writers leave the padding of the last member out.
		if n, _ := io.CopyN(io.Discard, a.r, rest); n < rest-a.pad {
			return "", nil, io.ErrUnexpectedEOF
		}
	}
	var h [60]byte
	if _, err := io.ReadFull(a.r, h[:]); err != nil {
		return "", nil, err // io.EOF: the regular end
	}
	size, err := strconv.ParseInt(strings.TrimSpace(string(h[48:58])), 10, 64)
	if err != nil || size < 0 || h[58] != '`' || h[59] != '\n' {
		return "", nil, errors.New("broken ar header")
	}
	name = strings.TrimSuffix(strings.TrimRight(string(h[:16]), " "), "/")
	a.current, a.pad = &io.LimitedReader{R: a.r, N: size}, size&1
	return name, a.current, nil
}
