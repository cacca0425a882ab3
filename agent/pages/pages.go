// Package pages carries a job's memory from CRIU on one node to CRIU on
// another, without a file at the source.
//
//	criu dump --(page-server protocol, socket pair)--> Serve --> Writer
//	    --(one stream, package migrate's connection)--> Receive --> Store --> criu restore
//
// Serve plays the page server that CRIU dumps to; Writer makes a stream of
// our own out of what it gets, with runs of zero pages as a few bytes;
// Receive reads that stream at the destination and Store writes the image
// files that restore understands. Small images travel in the same
// stream. What CRIU is told about the end of its pages is the destination's answer: when
// a dump says success, the destination has every page.
package pages

import (
	"fmt"
	"io"
)

// Size of a page on every machine that CRIU moves jobs between with us (x86).
const Size = 4096

// MaxRun is the largest number of pages that is handed over at once.
const MaxRun = 256

// Kind says whose pages an image has.
type Kind uint8

// Kinds; the numbers are those of CRIU's protocol (PS_TYPE_* in criu/page-xfer.c).
const (
	Process Kind = 1 // a process, by its pid
	Shared  Kind = 2 // shared anonymous memory, by CRIU's number for it
)

// ImageID names what a run of pages belongs to.
type ImageID struct {
	Kind Kind
	ID   uint64
}

func (id ImageID) check() error {
	if id.Kind != Process && id.Kind != Shared || id.ID == 0 || id.ID>>56 != 0 {
		return fmt.Errorf("image %d of kind %d", id.ID, id.Kind)
	}
	return nil
}

// Receiver takes a job's pages in the order in which they were dumped. Two
// exist: Writer sends them on, Store keeps them.
type Receiver interface {
	// Open says whose pages come next.
	Open(ImageID) error
	// Pages takes a run of at most MaxRun whole pages. The receiver may not
	// keep data.
	Pages(vaddr uint64, data []byte) error
	// Zero takes a run of pages without content.
	Zero(vaddr uint64, n uint32) error
	// Sync returns when all that came before has arrived where it is going to.
	Sync() error
}

// FileReceiver also takes the small images.
type FileReceiver interface {
	Receiver
	// File takes a file of size bytes.
	File(name string, size int64, data io.Reader) error
}

// run is a range of pages, checked.
type run struct {
	vaddr uint64
	n     uint32
}

// checkRun refuses what no address space has.
func checkRun(vaddr uint64, n uint32) error {
	if vaddr%Size != 0 || n == 0 || vaddr+uint64(n)*Size < vaddr {
		return fmt.Errorf("run of %d pages at %#x", n, vaddr)
	}
	return nil
}
