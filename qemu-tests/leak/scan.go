package leak

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
	"github.com/therootcompany/xz"

	"mosimg/internal/imageset"
	"mosimg/internal/zstdframe"
)

// Finding is a secret and the file that holds it.
type Finding struct {
	Secret string
	File   string
}

// maxDepth is how deep archives in archives are unpacked: the head archive
// holds an image set, which holds an initramfs, which holds modules.
const maxDepth = 4

// maxUnpacked bounds one compressed part, against a broken one.
const maxUnpacked = 2 << 30

// Scan searches every file of an image set, as it is and unpacked, and tells
// how many bytes it looked at.
func Scan(ctx context.Context, set *imageset.Set, secrets []Secret) (found []Finding, scanned int64, err error) {
	index := newIndex(secrets)
	names := []string{imageset.ManifestName}
	for _, f := range set.Manifest.Files {
		names = append(names, f.Name)
	}
	for _, name := range names {
		data, err := os.ReadFile(set.Path(name))
		if err != nil {
			return nil, 0, err
		}
		s := scanner{ctx: ctx, index: index, file: name, hit: make(map[string]bool)}
		if err := s.scan(data, maxDepth); err != nil {
			return nil, 0, fmt.Errorf("search %s: %w", name, err)
		}
		found, scanned = append(found, s.found...), scanned+s.scanned
	}
	return found, scanned, nil
}

// index finds all secrets in one pass: by their first two bytes.
type index [1 << 16][]Secret

func newIndex(secrets []Secret) *index {
	x := new(index)
	for _, s := range secrets {
		first := binary.LittleEndian.Uint16(s.Bytes)
		x[first] = append(x[first], s)
	}
	return x
}

// find calls hit for each secret that data holds, once for each place.
func (x *index) find(data []byte, hit func(Secret)) {
	for i := 0; i+minSecret <= len(data); i++ {
		for _, s := range x[uint16(data[i])|uint16(data[i+1])<<8] {
			if bytes.HasPrefix(data[i:], s.Bytes) {
				hit(s)
			}
		}
	}
}

type scanner struct {
	ctx     context.Context
	index   *index
	file    string
	found   []Finding
	hit     map[string]bool
	scanned int64
}

var (
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
	gzipMagic = []byte{0x1f, 0x8b, 0x08}
	xzMagic   = []byte{0xfd, '7', 'z', 'X', 'Z', 0}
)

// scan searches data, and everything compressed that begins anywhere in it.
func (s *scanner) scan(data []byte, depth int) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	s.scanned += int64(len(data))
	s.index.find(data, func(x Secret) {
		if !s.hit[x.Name] {
			s.hit[x.Name] = true
			s.found = append(s.found, Finding{x.Name, s.file})
		}
	})
	if depth == 0 {
		return nil
	}
	for at := 0; ; {
		i := bytes.Index(data[at:], zstdMagic)
		if i < 0 {
			break
		}
		at += i
		n := zstdframe.Length(data[at:])
		if n == 0 {
			at++ // the magic number as data
			continue
		}
		out, err := unpackZstd(data[at : at+n])
		if err != nil {
			at++
			continue
		}
		if err := s.scan(out, depth-1); err != nil {
			return err
		}
		at += n
	}
	for _, f := range []struct {
		magic  []byte
		unpack func([]byte) []byte
	}{{gzipMagic, unpackGzip}, {xzMagic, unpackXZ}} {
		for at := 0; ; at++ {
			i := bytes.Index(data[at:], f.magic)
			if i < 0 {
				break
			}
			at += i
			if out := f.unpack(data[at:]); len(out) > 0 {
				if err := s.scan(out, depth-1); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func unpackZstd(frame []byte) ([]byte, error) {
	d, err := zstd.NewReader(bytes.NewReader(frame), zstd.WithDecoderMaxMemory(maxUnpacked), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return io.ReadAll(io.LimitReader(d, maxUnpacked))
}

// unpackGzip and unpackXZ return what they could unpack of data that only
// looks compressed, perhaps nothing.
func unpackGzip(b []byte) []byte {
	r, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil
	}
	r.Multistream(false)
	out, _ := io.ReadAll(io.LimitReader(r, maxUnpacked))
	return out
}

func unpackXZ(b []byte) []byte {
	const headerCRC = 8
	if len(b) < headerCRC+4 || binary.BigEndian.Uint16(b[6:])>>8 != 0 {
		return nil // the first flag byte is 0 in every xz stream
	}
	r, err := xz.NewReader(bytes.NewReader(b), xz.DefaultDictMax)
	if err != nil {
		return nil
	}
	r.Multistream(false)
	out, err := io.ReadAll(io.LimitReader(r, maxUnpacked))
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && len(out) == 0 {
		return nil
	}
	return out
}
