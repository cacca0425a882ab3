// Package leader makes the program that sits at the root of a job's tree.
//
// A job is dumped as a tree of processes from its root down. The program that
// a user starts cannot be that root: its daemonised children would fall to
// process 1 and be left out of the dump without an error. The leader is a child-subreaper above
// the program, so they fall to it instead; it collects what ends and,
// when the last process is gone, ends as the program ended.
//
// The leader is dumped and moved with every job, so it has to be small. It is
// written in Go's assembler (leader_amd64.s, leader_386.s): its bytes are copied
// out of our own text into a static ELF file of some 600 bytes, with no
// compiler on the machine. A leader in Go was tried: with a sleeping child it
// dumps as 5 to 6 threads and 640 to 780 KB of pages, this one as 2 threads and 20 to 24 KB
// (CRIU 4.1.1), and its file of 1.4 MB would have to be on every node.
//
// How it is called: leader PATH ARGV0 ARG..., with the write end of a pipe as
// descriptor 3. On it comes one native-endian word: the program's pid, or
// minus the errno of a fork that failed. A second one, negative, is
// the errno with which exec failed. The pipe closes when exec succeeded.
package leader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"unsafe"

	"golang.org/x/sys/unix"
)

// code is the leader's text; never called. It ends with the marker.
func code() //nolint:unused // the assembler's codeAddr names it

// codeAddr is where code lies in memory: the value of the Go function is the
// address of a wrapper around it.
func codeAddr() uintptr

var marker = []byte("\xccmosldr\xcc")

// maxCode bounds the search for the marker; the text is about 400 bytes.
const maxCode = 4096

// loadAddr is where the file is mapped. The address is fixed, so that a
// leader looks the same on every node.
const loadAddr = 0x400000

// wordSize is the length of a word on the pipe.
const wordSize = int(unsafe.Sizeof(uintptr(0)))

func text() []byte {
	b := unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&addr))), maxCode)
	return b[:bytes.Index(b, marker)]
}

// addr is a variable, because vet takes a uintptr that becomes a pointer for
// an address that the garbage collector may have moved. Text does not move.
var addr = codeAddr()

// Image is the leader as an ELF file for the machine that we run on.
func Image() []byte { return elf(text()) }

// ErrExec is a program that could not be started. It wraps the errno.
var ErrExec = errors.New("exec")

// Started reads the leader's report from its pipe until it closes, and
// returns the program's pid as the leader sees it.
func Started(r io.Reader) (pid int, err error) {
	data, err := io.ReadAll(io.LimitReader(r, 4*int64(wordSize)))
	if err != nil {
		return 0, err
	}
	if len(data) == 0 || len(data)%wordSize != 0 {
		return 0, fmt.Errorf("the leader ended before it started the program (%d bytes of report)", len(data))
	}
	for ; len(data) > 0; data = data[wordSize:] {
		word := int(int32(binary.NativeEndian.Uint32(data)))
		if word < 0 {
			return 0, fmt.Errorf("%w: %w", ErrExec, unix.Errno(-word))
		}
		pid = word
	}
	return pid, nil
}
