package pages

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"google.golang.org/protobuf/proto"
)

// Image files begin with two words (criu/include/magic.h).
const (
	magicCommon  = 0x54564319
	magicPagemap = 0x56084025
)

// Store writes pages and files into an images folder, as CRIU's own page
// server would: pages-N.img has the bytes, one page after the other, and
// pagemap-PID.img (or pagemap-shmem-ID.img) says where they belong. Pages
// without content are holes in pages-N.img. It is for one goroutine.
type Store struct {
	dir   *os.Root
	limit int64 // bytes that may still be stored

	last    uint32 // number of the pages file
	seen    map[ImageID]bool
	pages   *os.File
	image   ImageID
	written int64
	runs    []run
}

// NewStore makes a Store in a folder, which should be in memory. It refuses
// to store more than limit bytes, holes not counted.
func NewStore(dir *os.Root, limit int64) *Store {
	return &Store{dir: dir, limit: limit, seen: make(map[ImageID]bool)}
}

// Open implements Receiver.
func (s *Store) Open(id ImageID) error {
	if err := s.finish(); err != nil {
		return err
	}
	if s.seen[id] {
		return fmt.Errorf("image %d of kind %d comes twice", id.ID, id.Kind)
	}
	f, err := s.dir.OpenFile(fmt.Sprintf("pages-%d.img", s.last+1), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	s.last++
	s.seen[id] = true
	s.pages, s.image, s.written, s.runs = f, id, 0, nil
	return nil
}

// add books a run. CRIU reads a pagemap from low addresses to high.
func (s *Store) add(vaddr uint64, n uint32) error {
	if s.pages == nil {
		return errors.New("a run without an image")
	}
	if last := len(s.runs) - 1; last >= 0 {
		end := s.runs[last].vaddr + uint64(s.runs[last].n)*Size
		if vaddr < end {
			return fmt.Errorf("run at %#x after one that ends at %#x", vaddr, end)
		}
		if vaddr == end && s.runs[last].n+n > s.runs[last].n {
			s.runs[last].n += n
			return nil
		}
	}
	s.runs = append(s.runs, run{vaddr, n})
	return nil
}

// ErrFull is a job that needs more memory than this node gives.
var ErrFull = errors.New("not enough memory for the job")

// take books size bytes of what may be stored.
func (s *Store) take(size int64) error {
	if size > s.limit {
		return fmt.Errorf("%w: it needs %d bytes more than is left", ErrFull, size-s.limit)
	}
	s.limit -= size
	return nil
}

// Pages implements Receiver.
func (s *Store) Pages(vaddr uint64, data []byte) error {
	if err := s.take(int64(len(data))); err != nil {
		return err
	}
	if err := s.add(vaddr, uint32(len(data)/Size)); err != nil {
		return err
	}
	if _, err := s.pages.WriteAt(data, s.written); err != nil {
		return err
	}
	s.written += int64(len(data))
	return nil
}

// Zero implements Receiver.
func (s *Store) Zero(vaddr uint64, n uint32) error {
	if err := s.add(vaddr, n); err != nil {
		return err
	}
	s.written += int64(n) * Size
	return nil
}

// Sync implements Receiver.
func (s *Store) Sync() error { return s.finish() }

// finish completes the current image.
func (s *Store) finish() error {
	if s.pages == nil {
		return nil
	}
	f := s.pages
	s.pages = nil
	if err := errors.Join(f.Truncate(s.written), f.Close()); err != nil {
		return err
	}
	name := fmt.Sprintf("pagemap-%d.img", s.image.ID)
	if s.image.Kind == Shared {
		name = fmt.Sprintf("pagemap-shmem-%d.img", s.image.ID)
	}
	data, err := pagemapImage(s.last, s.runs)
	if err != nil {
		return err
	}
	return s.dir.WriteFile(name, data, 0o600)
}

// pagemapImage is the content of a pagemap file: magics, then messages with
// their length before them.
func pagemapImage(pages uint32, runs []run) ([]byte, error) {
	b := binary.LittleEndian.AppendUint32(nil, magicCommon)
	b = binary.LittleEndian.AppendUint32(b, magicPagemap)
	put := func(m proto.Message) error {
		data, err := proto.Marshal(m)
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(data))), data...)
		return err
	}
	if err := put(&pagemap.PagemapHead{PagesId: &pages}); err != nil {
		return nil, err
	}
	for _, r := range runs {
		err := put(&pagemap.PagemapEntry{Vaddr: proto.Uint64(r.vaddr), NrPages: proto.Uint32(r.n), Flags: proto.Uint32(flagPresent)})
		if err != nil {
			return nil, err
		}
	}
	return b, nil
}

// File implements FileReceiver. Names of folders, and those that the store
// makes itself, are refused.
func (s *Store) File(name string, size int64, data io.Reader) error {
	if strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "pages-") {
		return fmt.Errorf("a file may not be named %q", name)
	}
	if err := s.take(size); err != nil {
		return err
	}
	f, err := s.dir.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, data, size)
	return errors.Join(err, f.Close())
}
