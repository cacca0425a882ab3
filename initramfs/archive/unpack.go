package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/u-root/mkuimage/cpio"

	"mosimg/internal/zstdframe"
)

// maxUnpacked bounds an initramfs in memory, against a broken one.
const maxUnpacked = 1 << 30

// Unpack writes what lies below a folder of an initramfs into dir: folders,
// files and symbolic links, with their permissions and as the caller's. The initramfs
// is any number of archives in a row, each plain or compressed with zstd. It
// returns how many files there were; none is an error.
func Unpack(initramfs io.Reader, below, dir string) (files int, err error) {
	data, err := io.ReadAll(io.LimitReader(initramfs, maxUnpacked))
	if err != nil {
		return 0, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	for len(data) > 0 {
		var part []byte
		if part, data, err = nextPart(data); err != nil {
			return files, err
		}
		err = cpio.ForEachRecord(cpio.Newc.Reader(bytes.NewReader(part)), func(r cpio.Record) error {
			name, ok := strings.CutPrefix(path.Clean("/"+r.Name), path.Clean("/"+below)+"/")
			if !ok {
				return nil
			}
			files++
			return unpackRecord(root, name, r)
		})
		if err != nil {
			return files, fmt.Errorf("archive: unpack: %w", err)
		}
	}
	if files == 0 {
		return 0, fmt.Errorf("archive: the initramfs has nothing below %s", below)
	}
	return files, nil
}

// nextPart is the first archive of an initramfs, uncompressed, and what follows
// it. Padding of zeros may be between them.
func nextPart(data []byte) (part, rest []byte, err error) {
	trim := func(b []byte) []byte { return bytes.TrimLeft(b, "\x00") }
	if n := zstdframe.Length(data); n > 0 {
		d, err := zstd.NewReader(bytes.NewReader(data[:n]), zstd.WithDecoderMaxMemory(maxUnpacked))
		if err != nil {
			return nil, nil, err
		}
		defer d.Close()
		part, err := io.ReadAll(io.LimitReader(d, maxUnpacked))
		return part, trim(data[n:]), err
	}
	n, err := archiveLength(data)
	if err != nil {
		return nil, nil, err
	}
	return data[:n], trim(data[n:]), nil
}

// trailer is the name of the last record of an archive.
const trailer = "TRAILER!!!\x00"

// archiveLength is how long the archive at the beginning of data is.
func archiveLength(data []byte) (int, error) {
	if !bytes.HasPrefix(data, []byte("0707")) {
		return 0, errors.New("archive: not a cpio archive in newc form")
	}
	i := bytes.Index(data, []byte(trailer))
	if i < 0 {
		return 0, errors.New("archive: cut off: it has no last record")
	}
	return i + len(trailer), nil
}

func unpackRecord(root *os.Root, name string, r cpio.Record) error {
	perm := os.FileMode(r.Mode & 0o777)
	switch r.Mode & cpio.S_IFMT {
	case cpio.S_IFDIR:
		return root.MkdirAll(name, perm|0o700)
	case cpio.S_IFREG:
		if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
			return err
		}
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, io.NewSectionReader(r.ReaderAt, 0, int64(r.FileSize)))
		return errors.Join(err, f.Close())
	case cpio.S_IFLNK:
		target, err := io.ReadAll(io.NewSectionReader(r.ReaderAt, 0, int64(r.FileSize)))
		if err != nil {
			return err
		}
		if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
			return err
		}
		return root.Symlink(string(target), name)
	}
	return fmt.Errorf("%s is neither folder, file nor link", name)
}
