package pages

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
)

// dumper writes what CRIU would.
type dumper struct {
	b bytes.Buffer
	p Protocol
}

func (d *dumper) command(what, flags uint32, pages, vaddr uint64, id ImageID) {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, flags<<psCommandBits|what)
	if d.p == Protocol42 {
		b = le.AppendUint64(le.AppendUint32(b, 0), pages)
	} else {
		b = le.AppendUint32(b, uint32(pages))
	}
	d.b.Write(le.AppendUint64(le.AppendUint64(b, vaddr), id.ID<<psKindBits|uint64(id.Kind)))
}

// sock is CRIU's end of the page socket, with all that it will say.
type sock struct {
	io.Reader
	answers bytes.Buffer
}

func (s *sock) Write(p []byte) (int, error) { return s.answers.Write(p) }

// memory is a Receiver and remembers.
type memory struct {
	pages map[ImageID]map[uint64][]byte
	image ImageID
	syncs int
	fail  error
}

func (m *memory) Open(id ImageID) error {
	if m.pages == nil {
		m.pages = make(map[ImageID]map[uint64][]byte)
	}
	m.image = id
	m.pages[id] = make(map[uint64][]byte)
	return m.fail
}

func (m *memory) Pages(vaddr uint64, data []byte) error {
	for ; len(data) > 0; vaddr, data = vaddr+Size, data[Size:] {
		m.pages[m.image][vaddr] = bytes.Clone(data[:Size])
	}
	return nil
}

func (m *memory) Zero(vaddr uint64, n uint32) error {
	for range n {
		m.pages[m.image][vaddr] = make([]byte, Size)
		vaddr += Size
	}
	return nil
}

func (m *memory) Sync() error { m.syncs++; return nil }

func (m *memory) File(_ string, size int64, data io.Reader) error {
	_, err := io.CopyN(io.Discard, data, size)
	return err
}

// job is some memory, as runs: one longer than MaxRun, with zero pages in it.
func job(r *rand.Rand) (runs map[ImageID][]run, content func(vaddr uint64) []byte) {
	runs = map[ImageID][]run{
		{Process, 1000}: {{0x400000, 3}, {0x7f0000000000, MaxRun*2 + 7}, {0x7fff00000000, 1}},
		{Shared, 77}:    {{0, 5}},
	}
	seed := r.Uint64()
	return runs, func(vaddr uint64) []byte {
		p := rand.New(rand.NewPCG(seed, vaddr))
		b := make([]byte, Size)
		if p.IntN(3) > 0 {
			b[p.IntN(Size)] = byte(1 + p.IntN(255))
		}
		return b
	}
}

// What CRIU dumps at one end is what it restores at the other, byte for byte.
func TestPagesArrive(t *testing.T) {
	for _, p := range []Protocol{Protocol41, Protocol42} {
		t.Run(fmt.Sprint(p), func(t *testing.T) {
			runs, content := job(rand.New(rand.NewPCG(1, uint64(p))))
			d := dumper{p: p}
			want := make(map[ImageID]map[uint64][]byte)
			opens := 0
			for id, rs := range runs {
				d.command(psOpen2, 0, 0, 0, id)
				opens++
				want[id] = make(map[uint64][]byte)
				for _, r := range rs {
					d.command(psAdd, flagPresent, uint64(r.n), r.vaddr, id)
					for i := range uint64(r.n) {
						b := content(r.vaddr + i*Size)
						d.b.Write(b)
						want[id][r.vaddr+i*Size] = b
					}
				}
			}
			d.command(psForceClose, 0, 0, 0, ImageID{})
			s := &sock{Reader: &d.b}
			dir := t.TempDir()
			root, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()

			src, dst := net.Pipe()
			received := make(chan error, 1)
			go func() { received <- Receive(dst, NewStore(root, 1<<30)) }()
			w := NewWriter(src)
			if err := Serve(s, p, w); err != nil {
				t.Fatal(err)
			}
			if err := w.File("core-1000.img", 5, strings.NewReader("hello")); err != nil {
				t.Fatal(err)
			}
			if err := w.End(); err != nil {
				t.Fatal(err)
			}
			if err := <-received; err != nil {
				t.Fatal(err)
			}
			if got, want := s.answers.Len(), opens+4; got != want || bytes.ContainsFunc(s.answers.Bytes(), func(r rune) bool { return r != 0 }) {
				t.Errorf("criu was answered % x; want %d zeros", s.answers.Bytes(), want)
			}
			if got := load(t, root); !maps.EqualFunc(want, got, func(a, b map[uint64][]byte) bool { return maps.EqualFunc(a, b, bytes.Equal) }) {
				t.Error("the stored pages are not those that were sent")
			}
			if data, err := root.ReadFile("core-1000.img"); err != nil || string(data) != "hello" {
				t.Errorf("file: %q, %v", data, err)
			}
		})
	}
}

// load reads image files as CRIU does.
func load(t *testing.T, root *os.Root) map[ImageID]map[uint64][]byte {
	t.Helper()
	got := make(map[ImageID]map[uint64][]byte)
	for id, name := range map[ImageID]string{{Process, 1000}: "pagemap-1000.img", {Shared, 77}: "pagemap-shmem-77.img"} {
		n, runs := parsePagemap(t, root, name)
		data, err := root.ReadFile(fmt.Sprintf("pages-%d.img", n))
		if err != nil {
			t.Fatal(err)
		}
		got[id] = make(map[uint64][]byte)
		for _, r := range runs {
			for i := range uint64(r.n) {
				got[id][r.vaddr+i*Size] = data[:Size]
				data = data[Size:]
			}
		}
		if len(data) > 0 {
			t.Errorf("%s: %d bytes too many", name, len(data))
		}
	}
	return got
}

// The source must learn why the destination cannot take the job.
func TestFullDestination(t *testing.T) {
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	src, dst := net.Pipe()
	received := make(chan error, 1)
	go func() {
		err := Receive(dst, NewStore(root, 10*Size))
		dst.Close()
		received <- err
	}()
	w := NewWriter(src)
	if err := w.Open(ImageID{Process, 1}); err != nil {
		t.Fatal(err)
	}
	err = nil
	for i := uint64(0); err == nil && i < 100; i++ {
		if err = w.Pages(i*MaxRun*Size, bytes.Repeat([]byte{1}, 8*Size)); err == nil {
			err = w.Sync()
		}
	}
	if !errors.Is(err, ErrDestination) || !strings.Contains(err.Error(), "not enough memory") {
		t.Errorf("source: %v; want the destination's reason", err)
	}
	if err := <-received; !errors.Is(err, ErrFull) {
		t.Errorf("destination: %v; want %v", err, ErrFull)
	}
}

func TestCRIUThatDies(t *testing.T) {
	d := dumper{}
	d.command(psOpen2, 0, 0, 0, ImageID{Process, 1})
	if err := Serve(&sock{Reader: &d.b}, Protocol41, new(memory)); !errors.Is(err, ErrHungUp) {
		t.Errorf("Serve = %v; want %v", err, ErrHungUp)
	}
}

func TestStoreRefuses(t *testing.T) {
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	s := NewStore(root, 1<<20)
	for _, name := range []string{"../x", "a/b", ".", "pages-7.img", "a\x00b"} {
		if err := s.File(name, 0, strings.NewReader("")); err == nil {
			t.Errorf("File(%q) = no error", name)
		}
	}
	if err := s.Zero(0, 1); err == nil {
		t.Error("pages before Open = no error")
	}
	id := ImageID{Process, 1}
	if err := s.Open(id); err != nil {
		t.Fatal(err)
	}
	if err := s.Zero(8*Size, 2); err != nil {
		t.Fatal(err)
	}
	if err := s.Zero(9*Size, 1); err == nil {
		t.Error("a run over another = no error")
	}
	if err := s.Open(id); err == nil {
		t.Error("an image twice = no error")
	}
}

func FuzzServe(f *testing.F) {
	d := dumper{}
	d.command(psOpen2, 0, 0, 0, ImageID{Process, 1})
	d.command(psAdd, flagPresent, 1, 0x1000, ImageID{Process, 1})
	d.b.Write(make([]byte, Size))
	d.command(psForceClose, 0, 0, 0, ImageID{})
	f.Add(d.b.Bytes(), false)
	f.Fuzz(func(_ *testing.T, data []byte, wide bool) {
		p := Protocol41
		if wide {
			p = Protocol42
		}
		Serve(&sock{Reader: bytes.NewReader(data)}, p, new(memory))
	})
}

func FuzzReceive(f *testing.F) {
	var b bytes.Buffer
	w := NewWriter(&struct {
		io.Reader
		io.Writer
	}{bytes.NewReader(make([]byte, 4)), &b})
	w.Open(ImageID{Process, 1})
	w.Pages(0x1000, make([]byte, Size))
	w.Zero(0x3000, 2)
	w.File("x.img", 1, strings.NewReader("x"))
	w.Sync()
	w.End()
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		root, err := os.OpenRoot(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		Receive(&sock{Reader: bytes.NewReader(data)}, NewStore(root, 1<<20))
	})
}
